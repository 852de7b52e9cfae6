"""Fixtures that several files of this folder share; the helpers that they stand on are beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mezo_dist.storage.trajectory import Mark
from tests import gpus
from tests.config.configs import CONFIG, TASK, Write
from tests.monitoring.consoles import Clock
from tests.storage.trajectories import FINGERPRINT, STEPS, write


def pytest_configure(config: pytest.Config) -> None:
    """Before anything asks for GPUs; where pytest-xdist starts workers, these see what this process sees."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        gpus.keep()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Also for the fixtures that the test is the first to use."""
    with pytest.MonkeyPatch.context() as patch:
        is_marked = any(item.get_closest_marker(mark) for mark in ("assets", "distributed"))
        if is_marked or "no_gpu" in getattr(item, "fixturenames", ()):
            gpus.hide(patch)
        return (yield)


@pytest.fixture
def no_gpu() -> None:
    """The test computes on the CPU; see `tests.gpus`."""


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
