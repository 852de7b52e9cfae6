"""Every kind of task is the same run on any number of processes and every layout, bit for bit.

Every run begins with the probe (`mezo_dist.engines.probe`): what the engine says about shifted weights, and about
directions per sample, is what the model says on weights that are really changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from mezo_dist.config import reader
from mezo_dist.config.kinds import KINDS
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.runs import training
from mezo_dist.storage import trajectory
from mezo_dist.tasks import kinds
from mezo_dist.testing import spawn
from tests.one_thread import one_thread
from tests.parts import Parts, run_parts
from tests.run_folders import results
from tests.tasks.kind_configs import TASKS, write_kind_config

__all__ = ["one_thread"]
LAYOUTS = {"replicated": [], "fsdp": ["layout.name=fsdp"], "zero": ["layout.name=zero"]}
OPTIONS = {
    name: ["algorithm.lr=1e-2", "train.micro_batch=2", "output.test=false", "output.export=false"] for name in TASKS
}
OPTIONS["choice"] += ["law=lowrank", "algorithm.per_sample=true", "train.objective=metric", "algorithm.eps=0.05"]
OPTIONS["long words"] += ["train.calibrate=true"]


def train(comm: Communicator, root: Path, name: str, layout: str, *more: str) -> Path:
    options = [*OPTIONS[name], *LAYOUTS[layout], f"output.dir={root / f'{name} {layout} {comm.world_size}'}", *more]
    return training.train(reader.load(root / name / "config.yaml", options), comm, quiet=True)


def everything(comm: Communicator, root: Path) -> Parts:
    parts: dict[str, Callable[[], Path]] = {
        f"{name} {layout}": functools.partial(train, comm, root, name, layout) for layout in LAYOUTS for name in TASKS
    }
    return run_parts(parts)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kinds")
    for name in TASKS:
        write_kind_config(root / name, name)
    return root


@pytest.fixture(scope="module")
def two(root: Path) -> Parts:
    parts: Parts = spawn(everything, 2, root)[0]
    return parts


def test_every_kind_has_an_implementation() -> None:
    assert list(KINDS.values()) == list(kinds.KINDS)
    assert {task.get("kind", "classification") for task in TASKS.values()} == set(KINDS)


@pytest.mark.distributed
@pytest.mark.parametrize("name", TASKS)
def test_bits_are_equal_on_one_and_two_processes_and_all_layouts(root: Path, two: Parts, name: str) -> None:
    alone = train(Communicator(), root, name, "replicated")
    steps = trajectory.read(alone / "trajectory.jsonl").steps
    assert len(steps) == 3
    assert all(step.update for step in steps)
    for layout in LAYOUTS:
        folder = two[f"{name} {layout}"]
        assert results(folder)["weights"] == results(alone)["weights"]
        assert trajectory.read(folder / "trajectory.jsonl").steps == steps
        assert results(folder)["validation"] == results(alone)["validation"]
        assert (folder / "answers.json").read_bytes() == (alone / "answers.json").read_bytes()
