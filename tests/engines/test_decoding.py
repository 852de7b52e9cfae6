"""Generation under variants: the three ways write the same texts, and so does every layout."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mezo_dist.algorithms.base import Variant
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.law import Law
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines import decoding
from mezo_dist.engines.decoding import Way, choose_way, evaluate_decoding
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.layouts.base import Layout
from mezo_dist.engines.layouts.fsdp import Fsdp
from mezo_dist.engines.layouts.zero import Zero
from mezo_dist.tasks.generation.decode import Decoding, decode
from mezo_dist.testing import spawn, tiny_model
from tests.one_thread import one_thread  # noqa: F401
from tests.parts import Parts, run_parts

SHIFT = Combination.of([(1, 0.3), (2, -0.2)])
VARIANTS = [Variant(SHIFT), Variant(), Variant(-SHIFT)]
WAYS: list[Way] = ["activations", "copies", "lock step"]


@dataclass(frozen=True)
class Item:
    slots: tuple[int, ...]
    inputs: dict[str, Tensor]


def items() -> list[Item]:
    """Three micro-batches of two prompts, some of them padded on the left."""
    draw = torch.Generator().manual_seed(1)
    batches = []
    for k in range(3):
        ids = torch.randint(4, 60, (2, 6), generator=draw)
        mask = torch.ones_like(ids)
        mask[0, :k], ids[0, :k] = 0, 0
        batches.append(Item((2 * k, 2 * k + 1), {"input_ids": ids, "attention_mask": mask}))
    return batches


def write(model: nn.Module, item: Item, temperature: float = 0.0) -> list[list[int]]:
    settings = Decoding(10, eos_ids=tuple(range(4, 24)), pad_id=0, temperature=temperature)
    return decode(model, item.inputs, settings, seeds=[100 + slot for slot in item.slots])


def texts(engine: Engine, way: Way, some: list[Item], temperature: float = 0.0, **more: Any) -> list[list[Any]]:
    forward = functools.partial(write, temperature=temperature)
    return [row for group in evaluate_decoding(engine, way, VARIANTS, some, forward, **more) for row in group]


def really_changed(law: Law, temperature: float = 0.0) -> list[list[Any]]:
    """The texts of models whose weights were moved for good."""
    columns = []
    for variant in VARIANTS:
        model = tiny_model("llama-tied")
        Engine(model, law).add(variant.shift, rounding_seed=0)
        columns.append([write(model, item, temperature) for item in items()])
    return [list(row) for row in zip(*columns, strict=True)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("way", WAYS)
def test_texts_are_those_of_really_changed_weights(way: Way, temperature: float) -> None:
    engine = Engine(tiny_model("llama-tied"), Law("lowrank"))
    before = engine.fingerprint()
    written = texts(engine, way, items(), temperature)
    assert written == really_changed(Law("lowrank"), temperature)
    assert engine.fingerprint() == before
    lengths = {len(text) for row in written for texts_of_variant in row for text in texts_of_variant}
    assert len(lengths) > 3  # they end at different places
    assert written[0][0] != written[0][2]  # the shift matters


def test_the_way_is_chosen_by_law_and_memory(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    model = tiny_model("llama-tied")
    assert choose_way(Engine(model, Law("lowrank")), 1) == "activations"
    assert choose_way(Engine(model, Law("gaussian")), 1) == "copies"
    monkeypatch.setattr(decoding, "free_bytes", lambda: 1000)
    assert choose_way(Engine(model, Law("gaussian")), 1) == "lock step"
    assert "they are made for each token" in caplog.records[-1].message


class Reads(nn.Module):
    """Uses a matrix without calling the module that owns it."""

    def __init__(self, *, directly: bool) -> None:
        super().__init__()
        self.linear, self.directly = nn.Linear(4, 4), directly

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.linear.weight.T if self.directly else self.linear(input=x)


@pytest.mark.parametrize("directly", [False, True])
def test_a_matrix_that_is_read_without_its_module_is_noticed(directly: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    engine = Engine(Reads(directly=directly), Law("lowrank"))
    way = choose_way(engine, 1, torch.ones(2, 4), lambda model, x: model(x))
    assert way == ("copies" if directly else "activations")
    assert ("shifts in activation space are wrong for this model" in caplog.text) is directly


def test_the_anchor_writes_too() -> None:
    engine = Engine(tiny_model("llama-tied"), Law("gaussian"))
    engine.copy_anchor()
    engine.add(SHIFT, rounding_seed=0)
    variants = [Variant(base="anchor"), Variant(-SHIFT, base="anchor"), Variant()]
    for way in WAYS[1:]:
        (row,) = [row for group in evaluate_decoding(engine, way, variants, items()[:1], write) for row in group]
        alone = [write(tiny_model("llama-tied"), items()[0]), row[1], write(engine.model, items()[0])]
        assert row == alone
        assert row[0] != row[1]


LAYOUTS: dict[str, Callable[[nn.Module, Communicator], Layout]] = {
    "fsdp": Fsdp,
    "zero": lambda model, comm: Zero(model, comm, {}),
}


def write_sharded(comm: Communicator, layout: str, way: Way) -> list[list[Any]]:
    """Rank 0 has two micro-batches, rank 1 has one."""
    torch.set_num_threads(1)
    model = tiny_model("llama-tied")
    engine = Engine(model, Law("lowrank" if way == "activations" else "gaussian"), LAYOUTS[layout](model, comm))
    mine = items()[comm.rank :: 2]
    return texts(engine, way, mine, most=2, filler=items()[0], width=1)


def everything(comm: Communicator) -> Parts:
    return run_parts(
        {f"{layout} {way}": functools.partial(write_sharded, comm, layout, way) for layout in LAYOUTS for way in WAYS}
    )


@pytest.fixture(scope="module")
def sharded() -> list[Parts]:
    return spawn(everything, 2)


@pytest.mark.distributed
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_texts_are_the_same_on_sharded_layouts(sharded: list[Parts], layout: str, way: Way) -> None:
    first, second = (rank[f"{layout} {way}"] for rank in sharded)
    assert [first[0], second[0], first[1]] == really_changed(Law("lowrank" if way == "activations" else "gaussian"))
