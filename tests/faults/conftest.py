"""The job that the tests in this folder disturb, and what it comes to when nobody does."""

from __future__ import annotations

from pathlib import Path

import pytest

from mezo_dist.config import reader
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.runs import training
from mezo_dist.testing import write_tiny_config
from tests.faults.jobs import OPTIONS, STEPS


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, and the undisturbed run of it in undisturbed/, on one process; a test that damages it mends it."""
    root = tmp_path_factory.mktemp("faults")
    write_tiny_config(root, "llama-tied", "mezo-svrg", steps=STEPS)
    config = reader.load(root / "config.yaml", [*OPTIONS, f"--output.dir={root / 'undisturbed'}"])
    training.train(config, Communicator())
    return root
