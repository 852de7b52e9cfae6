"""Compiled blocks: the same losses but for rounding, the same bits whenever they are asked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mezo_dist.config import reader
from mezo_dist.directions.law import Law
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines import compiled
from mezo_dist.engines.engine import Engine
from mezo_dist.errors import UserError
from mezo_dist.runs.load import audit, open_run
from mezo_dist.runs.training import train
from mezo_dist.storage import trajectory
from mezo_dist.testing import write_tiny_config
from tests.engines.models import VARIANTS, assert_same, assert_untouched, attributes, make, state


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name", ["opt", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "gpt2", "bert", "t5"))]
)
def test_compiled_blocks_give_the_same_outputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks as torch's tracer sees them, run by torch's own operations: with the engine's hooks, shared buffers, tied
    weights, and items of several lengths."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    model, items, forward = make(name)
    config: Any = model.config
    config.use_cache = False
    before, modules = state(model), attributes(model)
    engine = Engine(model, Law("gaussian"), compile="units")
    assert engine._materialise._compiled
    results = engine.evaluate(VARIANTS, items, forward)
    assert_untouched(model, before, modules)
    wanted = Engine(model, Law("gaussian")).evaluate(VARIANTS, items, forward)
    for row, other in zip(results, wanted, strict=True):
        torch.testing.assert_close(row, other, rtol=1e-5, atol=1e-6)
    alone = [[engine.evaluate([v], [item], forward)[0][0] for v in VARIANTS] for item in items]
    assert_same(results, alone)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_run_with_compiled_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MEZO_DIST_COMPILE=inductor really compiles, which takes g++ minutes."""
    monkeypatch.setattr(compiled, "BACKEND", os.environ.get("MEZO_DIST_COMPILE", "eager"))
    path = write_tiny_config(tmp_path / "config", "llama", "mezo", steps=2, batch_size=2, micro_batch=2)
    options = ["output.looks=0", "output.answers=0", "output.test=false", "output.export=false", "monitor=[]"]
    losses = {}
    for name, how in (("plain", "off"), ("compiled", "units"), ("again", "units")):
        config = reader.load(path, [*options, f"output.dir={tmp_path / name}", f"train.compile={how}"])
        folder = train(config, Communicator(), quiet=True)
        losses[name] = [
            x for s in trajectory.read(folder / trajectory.FILE).steps for round in s.rounds for x in round.mean
        ]
    assert losses["compiled"] == losses["again"]
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=1e-4)
    with monkeypatch.context() as elsewhere:  # where there is no compiler, and no GPU for graphs

        def refused(*_: object, **options: object) -> None:
            raise UserError("train.compile: not here")

        elsewhere.setattr(compiled, "CompiledUnit", refused)
        audit(open_run(folder, None, Communicator()), Communicator())  # raises if weights are others


@pytest.mark.usefixtures("no_gpu")
def test_graphs_need_a_gpu() -> None:
    with pytest.raises(UserError, match=r"train.compile: graphs needs a GPU.*set it to units or off"):
        Engine(make("llama")[0], Law("gaussian"), compile="graphs")


def test_what_torch_cannot_compile_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> nn.Module:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(compiled, "BACKEND", broken)
    model, items, forward = make("llama")
    engine = Engine(model, Law("gaussian"), compile="units")
    with pytest.raises(UserError, match=r"train.compile: torch cannot compile a LlamaDecoderLayer.*set it to off"):
        engine.evaluate(VARIANTS, items, forward)
