"""Variants: what a forward pass finds is what a really changed model would find, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mezo_dist.algorithms.base import Variant
from mezo_dist.directions.bits import GAUSSIAN, RADEMACHER, BitLayout
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.kernels import reference
from mezo_dist.directions.law import Law
from mezo_dist.directions.seeds import param_id
from mezo_dist.engines.engine import Engine
from tests.engines.models import (
    AROUND,
    SHIFTS,
    VARIANTS,
    assert_same,
    assert_untouched,
    attributes,
    changed,
    every_model,
    make,
    state,
)


@every_model
def test_variants_are_bit_for_bit_changed_models(name: str) -> None:
    model, items, forward = make(name)
    engine = Engine(model, Law("gaussian"), width=2)
    before, modules = state(model), attributes(model)
    results = engine.evaluate(VARIANTS, items, forward)
    assert_untouched(model, before, modules)
    with torch.no_grad():
        models = [changed(model, shift) for shift in SHIFTS]
        assert_same(results, [[forward(m, item) for m in models] for item in items])
    assert not torch.equal(results[0][0], results[0][1])  # the directions do matter
    assert engine.never_used() == []


@every_model
def test_bits_do_not_depend_on_what_else_is_evaluated(name: str) -> None:
    model, items, forward = make(name)
    together = Engine(model, Law("gaussian"), width=8).evaluate(VARIANTS, items, forward)
    one_by_one = Engine(model, Law("gaussian"), width=1)
    alone = [[one_by_one.evaluate([variant], [item], forward)[0][0] for variant in VARIANTS] for item in items]
    assert_same(together, alone)


class Doubled(nn.Module):
    """An embedding whose lookup somebody replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(64, 8), nn.Linear(8, 3)
        look_up = self.table.forward
        self.table.forward = lambda ids: 2 * look_up(ids) + self.table.weight[0]  # type: ignore[assignment, method-assign]

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


def test_a_replaced_embedding_lookup_is_left_to_itself() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Doubled()
    ids = torch.tensor([[3, 9, 9], [1, 3, 2]])
    engine = Engine(model, Law("gaussian"))
    (results_of_ids,) = engine.evaluate(VARIANTS, [ids], lambda m, x: m(x))
    for shift, result in zip(SHIFTS, results_of_ids, strict=True):
        weight = dict(changed(_plain(model), shift).named_parameters())
        table = 2 * weight["table.weight"][ids] + weight["table.weight"][0]
        torch.testing.assert_close(result, table @ weight["head.weight"].T + weight["head.bias"])


def _plain(model: Doubled) -> nn.Module:
    plain = Doubled()
    plain.load_state_dict(model.state_dict())
    return plain


@pytest.mark.parametrize("bits", [GAUSSIAN, RADEMACHER], ids=lambda bits: bits.name)
def test_add_is_the_definition(bits: BitLayout) -> None:
    model, _, _ = make("mixtral")
    wanted = changed(model, SHIFTS[2], bits)
    Engine(model, Law(bits.name)).add(SHIFTS[2], rounding_seed=0)
    assert_untouched(model, state(wanted), attributes(model))


def test_tied_weights_change_once() -> None:
    model, _, _ = make("llama-tied")
    wanted = changed(model, AROUND).get_parameter("model.embed_tokens.weight")
    Engine(model, Law("gaussian")).add(AROUND, rounding_seed=0)
    embedding, head = model.get_parameter("model.embed_tokens.weight"), model.get_submodule("lm_head").weight
    assert head is embedding
    assert torch.equal(embedding, wanted)


def test_frozen_weights_stay() -> None:
    model, items, forward = make("opt")
    frozen = {name for name, _ in model.named_parameters() if "embed" in name or "fc1" in name}
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    before = state(model)
    engine = Engine(model, Law("gaussian"))
    results = engine.evaluate(VARIANTS, items, forward)
    with torch.no_grad():
        assert_same(results, [[forward(changed(model, shift), item) for shift in SHIFTS] for item in items])
    engine.add(AROUND, rounding_seed=0)
    moved = {name for name, weight in state(model).items() if not torch.equal(weight, before[name])}
    assert moved == before.keys() - frozen
    assert not any(model.get_parameter(name).requires_grad for name in frozen)


@pytest.mark.parametrize("name", ["llama-tied", "opt", "bert", "mixtral"])
def test_forward_in_bf16_from_fp32_weights(name: str) -> None:
    """As if the changed model were cast, frozen weights too; the fp32 weights themselves are not."""
    model, items, forward = make(name)
    next(model.parameters()).requires_grad_(False)
    before, modules = state(model), attributes(model)
    engine = Engine(model, Law("gaussian"), compute_dtype=torch.bfloat16)
    results = engine.evaluate(VARIANTS, items, forward)
    assert_untouched(model, before, modules)
    assert results[0][0].dtype == torch.bfloat16
    with torch.no_grad():
        models = [changed(model, shift, dtype=torch.bfloat16) for shift in SHIFTS]
        assert_same(results, [[forward(m, item) for m in models] for item in items])


def test_bf16_weights_are_rounded_stochastically_by_updates_alone() -> None:
    model, items, forward = make("llama")
    model.bfloat16()
    tiny = Combination.of([(3, 1e-5)])  # far below half a step of bf16 for most weights
    to_nearest, before = changed(model, tiny), copy.deepcopy(model)
    engine = Engine(model, Law("gaussian"), stochastic_rounding=True)
    results = engine.evaluate([Variant(AROUND)], items[:1], forward)
    with torch.no_grad():
        assert torch.equal(results[0][0], forward(changed(model, AROUND), items[0]))
    engine.add(tiny, rounding_seed=77)
    moved = 0
    for name, weight in model.named_parameters():
        old, wanted = before.get_parameter(name).data.view(1, -1), torch.empty(1, weight.numel(), dtype=torch.bfloat16)
        reference.add(old, [tiny], [wanted], param_id=param_id(name), offsets=[0], bits=GAUSSIAN, rounding_seed=77)
        assert torch.equal(weight.data.view(1, -1), wanted)
        moved += int((wanted != to_nearest.get_parameter(name).data.view(1, -1)).sum())
    assert moved > 100


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle, self.sometimes = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + (self.sometimes(x) if x.shape[0] > 2 else 0)


def test_weights_that_no_forward_uses_are_named() -> None:
    model = Unused()
    engine = Engine(model, Law("gaussian"))
    assert engine.never_used() == ["used.weight", "used.bias", "idle.weight", "sometimes.weight"]
    engine.evaluate(VARIANTS, [torch.ones(2, 8)], lambda m, x: m(x))
    assert engine.never_used() == ["idle.weight", "sometimes.weight"]
    engine.evaluate(VARIANTS, [torch.ones(3, 8)], lambda m, x: m(x))
    assert engine.never_used() == ["idle.weight"]
