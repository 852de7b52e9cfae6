"""Memory of an evaluation: which weights are made anew for variants, how often, and how much is held at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mezo_dist.algorithms.base import Variant
from mezo_dist.directions.law import Law
from mezo_dist.directions.parts import Part
from mezo_dist.directions.seeds import param_id
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.hooked import find_hooked_modules
from mezo_dist.engines.lockstep.call_order import CallOrder
from mezo_dist.engines.lockstep.head_slice import HeadSlice
from mezo_dist.engines.units import find_units
from mezo_dist.testing import tiny_model
from tests.engines.models import AROUND, SHIFTS, TOYS, VARIANTS, changed, every_model, make

VOCABULARY, WIDTH = 5000, 16


class Lookup(nn.Module):
    """A large table, of which a batch needs a few rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.table(ids)))

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@pytest.fixture
def num_made(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The number of elements of each weight of which variants were made, over all calls."""
    names = {param_id(name): name for name, _ in Lookup().named_parameters()}
    counts = dict.fromkeys(names.values(), 0)
    real = Law.add_parts

    def add_parts(self: Law, parts: Sequence[Part], *args: Any, **options: Any) -> None:
        for part in parts:
            counts[names[part.param_id]] += part.weight.numel()
        real(self, parts, *args, **options)

    monkeypatch.setattr(Law, "add_parts", add_parts)
    return counts


IDS = [torch.tensor([[7, 4999, 7]]), torch.tensor([[0, 7, 3], [3, 3, 3]])]


def test_only_the_rows_that_are_looked_up_are_made(num_made: dict[str, int]) -> None:
    model = Lookup()
    needed = torch.tensor([0, 3, 7, 4999])
    wanted = changed(model, AROUND).get_parameter("table.weight")[IDS[1]]
    poisoned = torch.full_like(model.table.weight, torch.nan)
    poisoned[needed] = model.table.weight.data[needed]
    model.table.weight.data = poisoned
    engine = Engine(model, Law("gaussian"))
    results = engine.evaluate([Variant(AROUND), Variant(-AROUND)], IDS, lambda m, x: m.get_submodule("table")(x))
    assert torch.equal(results[1][0], wanted)
    assert num_made["table.weight"] == len(needed) * WIDTH  # once for both variants and both micro-batches


def test_only_the_rows_of_the_label_words_are_made(num_made: dict[str, int]) -> None:
    model = Lookup()
    head_slice = HeadSlice(model.head, torch.tensor([40, 2]))
    engine = Engine(model, Law("gaussian"))
    (results,) = engine.evaluate(VARIANTS, IDS[:1], lambda m, x: m(x))
    assert num_made["head.weight"] == 2 * WIDTH
    head_slice.detach()
    for shift, result in zip(SHIFTS, results, strict=True):
        torch.testing.assert_close(result, changed(model, shift)(IDS[0])[..., [40, 2]])


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_head_that_owns_its_bias_twice_is_made_by_rows_too(kind: str) -> None:
    """The module around it has the same bias, tied: that must not make the whole vocabulary one hooked module with
    it."""
    _, items, _ = make(kind)
    model = tiny_model(kind)
    model.resize_token_embeddings(2000)
    head_slice = HeadSlice(model.get_output_embeddings(), torch.tensor([40, 2]))
    engine = Engine(model, Law("gaussian"))
    engine.evaluate(VARIANTS, items, lambda m, x: m(x).logits)
    head_slice.detach()
    assert engine._materialise.scratch.buffer.numel() < 4 * 2000 * 32  # not even one variant of the table


def test_scratch_that_only_a_trial_needed_is_given_back() -> None:
    """Whole logits are tried out before a run; its steps read a few rows, and must not keep memory for all of them."""
    engine = Engine(Lookup(), Law("gaussian"))
    engine.evaluate([Variant(AROUND)], IDS[:1], lambda m, x: m(x))
    assert engine._materialise.scratch.buffer.numel() >= 4 * VOCABULARY * WIDTH
    engine.evaluate([Variant(AROUND)], IDS[:1], lambda m, x: m.get_submodule("table")(x))
    assert engine._materialise.scratch.buffer.numel() < 4 * VOCABULARY * WIDTH / 2


def test_nothing_is_made_for_the_weights_as_they_are(num_made: dict[str, int]) -> None:
    engine = Engine(Lookup(), Law("gaussian"))
    engine.evaluate([Variant(), Variant()], IDS, lambda m, x: m(x))
    assert set(num_made.values()) == {0}
    assert engine._materialise.scratch.buffer.numel() == 0


def test_every_weight_is_made_once_for_all_variants_and_micro_batches(num_made: dict[str, int]) -> None:
    model = Lookup()
    Engine(model, Law("gaussian"), width=4).evaluate(VARIANTS[:3], IDS * 4, lambda m, x: m(x))
    groups = 2  # 8 micro-batches, 4 at a time
    assert num_made["body.weight"] == groups * model.body.weight.numel()
    assert num_made["head.weight"] == groups * model.head.weight.numel()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@every_model
def test_scratch_holds_one_site_for_all_variants(name: str, dtype: torch.dtype | None) -> None:
    model, items, forward = make(name)
    engine = Engine(model, Law("gaussian"), compute_dtype=dtype)
    if dtype is None or name not in ("t5", *(toy.__name__ for toy in TOYS)):  # those ask weights for their dtype
        engine.evaluate(VARIANTS, items, forward)
    padding = 64
    largest = max(
        sum((dtype or torch.float32).itemsize * weight.tensor.numel() + padding for weight in hooked.weights)
        for hooked in find_hooked_modules(model, include_frozen=False)
        if not hooked.spans_blocks
    )
    assert engine._materialise.scratch.buffer.numel() <= largest * len(VARIANTS)
    assert engine._materialise.scratch.buffer.numel() < 4 * sum(p.numel() for p in model.parameters()) * len(VARIANTS)


def test_scratch_never_holds_a_whole_table() -> None:
    model = Lookup()
    head_slice = HeadSlice(model.head, torch.tensor([40, 2]))
    engine = Engine(model, Law("gaussian"))
    engine.evaluate(VARIANTS, IDS, lambda m, x: m(x))
    head_slice.detach()
    body = 4 * (model.body.weight.numel() + model.body.bias.numel())
    assert 0 < engine._materialise.scratch.buffer.numel() <= body * len(VARIANTS)


def test_no_scratch_is_allocated_after_the_second_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cycle of MeZO-SVRG: an anchor step of two variants, an inner one of four."""
    model, ids = tiny_model("llama"), torch.arange(4, 24).view(2, 10)
    engine, sizes = Engine(model, Law("rademacher")), []
    real = torch.empty

    def empty(*size: Any, **options: Any) -> Tensor:
        if options.get("dtype") == torch.uint8:
            sizes.append(size)
        return real(*size, **options)

    monkeypatch.setattr(torch, "empty", empty)
    two = [Variant(AROUND), Variant(-AROUND)]
    per_step = []
    for step in range(6):
        sizes.clear()
        engine.evaluate(two * (1 + step % 2), [ids], lambda m, x: m(x, use_cache=False).logits)
        engine.add(AROUND, 1)
        per_step.append(len(sizes))
    assert per_step[0] > 0
    assert per_step[2:] == [0] * 4


class Counting(dict[nn.Module, Any]):
    """A dict that counts how often it is looked into."""

    number = 0

    def __getitem__(self, module: nn.Module) -> Any:
        self.number += 1
        return super().__getitem__(module)


def test_what_follows_is_learnt_in_time_that_grows_with_the_calls_alone() -> None:
    """Decoding calls all modules once per token, and another number of tokens is another order."""
    order = CallOrder(find_units(tiny_model("llama")))
    order._unit_of = units = Counting(order._unit_of)
    followers = []
    for times in (1, 200):
        units.number = 0
        for module in [*units] * times:
            order.add(module)
        assert order.end()
        followers.append([order.following(module) for module in units])
    assert any(followers[0])
    assert followers[1] == followers[0]
    assert units.number < 2 * 200 * len(units)
