"""Wherever the weights live, a run is the same run: equal losses in every step, equal weights at the end, bit for bit.

Under one process, FSDP2 on 2, 3 and 4, two copies sharded over two processes each, and ZeRO-3 on 2 and 3. (Whole
weights on 1, 2 and 3 processes: test_layouts.py.) And what was begun on one layout goes on with another.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mezo_dist.config import reader
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.runs import training
from mezo_dist.testing import spawn, write_tiny_config
from tests.cases import CASES, WORLD_SIZES
from tests.parts import Parts, run_parts
from tests.run_folders import results
from tests.runs.test_world_sizes import SIZES

pytestmark = pytest.mark.distributed

SETTINGS = {
    "replicated": [],
    "fsdp": ["layout.name=fsdp"],
    "fsdp twice": ["layout.name=fsdp", "layout.replicate=2", "layout.prefetch=true", "distributed.variant_groups=2"],
    "zero": ["layout.name=zero"],
}
LAYOUTS = [("fsdp", 2), ("zero", 2), ("fsdp", 3), ("zero", 3), ("fsdp", 4), ("fsdp twice", 4)]
STEPS_DONE = 3


def folder_of(root: Path, name: str, layout: str, world: int) -> Path:
    return root / f"{name} under {layout} on {world}"


def train(comm: Communicator, root: Path, name: str, layout: str, *more: str) -> None:
    folder = folder_of(root, name, layout, comm.world_size)
    options = [*CASES[name].options, *SETTINGS[layout], f"output.dir={folder}", *more]
    training.train(reader.load(root / name / "config.yaml", options), comm)


def everything(comm: Communicator, root: Path) -> Parts:
    parts: dict[str, Callable[[], None]] = {
        f"{name} under {layout}": functools.partial(train, comm, root, name, layout)
        for layout, world in LAYOUTS
        if world == comm.world_size
        for name in WORLD_SIZES
    }
    if comm.world_size == 2:
        more = (f"output.dir={root / 'begun alone'}", "output.if_exists=resume")
        parts["begun alone"] = lambda: train(comm, root, "mezo-svrg", "zero", *more)
    return run_parts(parts)


@dataclass(frozen=True)
class Trained:
    """Runs under all layouts, and what each rank says of them."""

    root: Path
    worlds: dict[int, list[Parts]]

    def folder(self, name: str, layout: str, world: int) -> Path:
        """Folder of a run; fails the test if the run did."""
        for rank in self.worlds.get(world, []):
            rank[f"{name} under {layout}"]
        return folder_of(self.root, name, layout, world)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("sharded")
    for name in WORLD_SIZES:
        write_tiny_config(root / name, CASES[name].model, CASES[name].algorithm, **SIZES)
        train(Communicator(), root, name, "replicated")
    cut(folder_of(root, "mezo-svrg", "replicated", 1), root / "begun alone")
    return Trained(root, {world: spawn(everything, world, root, timeout_s=280) for world in (2, 3, 4)})


def cut(folder: Path, target: Path) -> None:
    """A run as if it had been killed after `STEPS_DONE` steps."""
    shutil.copytree(folder, target)
    lines = (folder / "trajectory.jsonl").read_bytes().splitlines(keepends=True)
    (target / "trajectory.jsonl").write_bytes(b"".join(lines[: 1 + STEPS_DONE]))
    shutil.rmtree(target / "model")
    (target / "results.json").unlink()


def steps_of(folder: Path) -> list[dict[str, object]]:
    """The steps of a trajectory, without what chains a line to those before it (the header names the layout)."""
    lines = [json.loads(line) for line in (folder / "trajectory.jsonl").read_text().splitlines()[1:]]
    return [{key: value for key, value in line.items() if key != "check"} for line in lines]


@pytest.mark.parametrize("name", WORLD_SIZES)
@pytest.mark.parametrize(("layout", "world"), LAYOUTS)
def test_a_run_is_the_same_on_every_layout(trained: Trained, layout: str, world: int, name: str) -> None:
    alone, folder = trained.folder(name, "replicated", 1), trained.folder(name, layout, world)
    assert steps_of(folder) == steps_of(alone)
    assert len([step for step in steps_of(alone) if "step" in step]) == SIZES["steps"]
    assert results(folder) == results(alone)  # with the final fingerprint
    model, expected = (place / "model" / "model.safetensors" for place in (folder, alone))
    assert model.read_bytes() == expected.read_bytes()


def test_a_run_goes_on_under_another_layout(trained: Trained, tmp_path: Path) -> None:
    alone = trained.folder("mezo-svrg", "replicated", 1)
    for rank in trained.worlds[2]:
        rank["begun alone"]
    assert results(trained.root / "begun alone")["weights"] == results(alone)["weights"]
    cut(trained.folder("mezo-svrg", "fsdp", 3), tmp_path / "begun sharded")
    options = [f"output.dir={tmp_path / 'begun sharded'}", "output.if_exists=resume"]
    train(Communicator(), trained.root, "mezo-svrg", "replicated", *options)
    assert results(tmp_path / "begun sharded")["weights"] == results(alone)["weights"]


@pytest.mark.parametrize(("layout", "world"), LAYOUTS)
def test_gathers_are_in_the_log(trained: Trained, layout: str, world: int) -> None:
    """A step gathers the weights once, an SVRG step too (four variants); an anchor step as well (two variants)."""
    weights = (trained.root / "mezo-svrg" / "model" / "model.safetensors").stat().st_size
    lines = (trained.folder("mezo-svrg", layout, world) / "metrics.jsonl").read_text().splitlines()
    steps = [s for s in (json.loads(line)["scalars"] for line in lines) if "loss/train" in s]
    assert len(steps) == SIZES["steps"]
    assert {step["gathers/number_per_step"] for step in steps} == {4}
    for step in steps:
        assert 0.9 * weights < step["gathers/bytes_per_step"] <= 1.05 * weights
