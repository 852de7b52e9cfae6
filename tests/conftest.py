"""Fixtures that several files of this folder share; the helpers that they stand on are beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mezo_dist.storage.trajectory import Mark
from tests.config.configs import CONFIG, TASK, Write
from tests.monitoring.consoles import Clock
from tests.storage.trajectories import FINGERPRINT, STEPS, write


@pytest.fixture
def write_config(tmp_path: Path) -> Write:
    """Writes a config, by default a good one, and its task file; returns the config's path."""

    def write(text: str = CONFIG, task: str = TASK) -> Path:
        (tmp_path / "tasks").mkdir(exist_ok=True)
        (tmp_path / "tasks/reviews.yaml").write_text(task)
        (tmp_path / "run.yaml").write_text(text)
        return tmp_path / "run.yaml"

    return write


@pytest.fixture
def clock() -> Clock:
    """Stands still until it is told to go."""
    return Clock()


@pytest.fixture
def trajectory_path(tmp_path: Path) -> Path:
    """A trajectory of three steps, the second of which was skipped."""
    return write(tmp_path / "trajectory.jsonl", [*STEPS[:2], Mark(2, FINGERPRINT), STEPS[2]])
