"""Runs that were cut short, as copies of undisturbed ones: what tests of going on begin with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from mezo_dist.config import reader
from mezo_dist.config.schema import RunConfig
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.runs import training
from mezo_dist.testing import write_tiny_config
from tests.cases import CASES

STEPS = 7
TORN = b'{"step":3,"loss":[{"mean":[0.69'


def load(root: Path, name: str, *options: str) -> RunConfig:
    return reader.load(root / name / "config.yaml", [*CASES[name].options, *options])


def train_undisturbed(root: Path, names: Sequence[str]) -> None:
    """The runs ``names`` of `CASES`, each in ``root``/NAME/run."""
    for name in names:
        kind, algorithm = CASES[name].model, CASES[name].algorithm
        write_tiny_config(root / name, kind, algorithm, steps=STEPS, batch_size=5, micro_batch=3)
        training.train(load(root, name), Communicator())


def killed(root: Path, name: str, num_steps: int, to: Path, torn: bytes = TORN) -> Path:
    """A copy of the run as it would be if it had died in the step after the first ``num_steps``."""
    shutil.copytree(root / name / "run", to)
    lines = (to / "trajectory.jsonl").read_bytes().splitlines(keepends=True)
    (to / "trajectory.jsonl").write_bytes(b"".join(lines[: 1 + num_steps]) + torn)
    before = json.loads((to / "results.json").read_text())["before"]
    (to / "results.json").write_text(json.dumps({"before": before}))
    shutil.rmtree(to / "model")
    return to
