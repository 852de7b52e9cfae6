"""Weights that a model reads without calling their module: right in every variant, and cheap to ask about."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezo_dist.algorithms.base import Variant
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.law import Law
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.lockstep.reads import WeightHandle
from mezo_dist.errors import UserError
from tests.engines import zoo
from tests.engines.models import (
    SHIFTS,
    VARIANTS,
    assert_same,
    assert_untouched,
    attributes,
    changed,
    state,
)

ITEMS = [zoo.ids((3, 8)), zoo.ids((2, 5))]
ELSEWHERE = ("rwkv", "recurrent-gemma", "funnel")  # refused, or run pass by pass: see test_probe.py
IN_BF16 = ("mobilebert", "deberta", "t5-classifier", "mamba", "mamba2", "lfm2")


@pytest.mark.parametrize("name", [name for name in zoo.NAMES if name not in ELSEWHERE])
def test_variants_are_changed_models_however_these_read_their_weights(name: str) -> None:
    model = zoo.build(name)
    before, modules = state(model), attributes(model)
    results = Engine(model, Law("gaussian")).evaluate(VARIANTS, ITEMS, zoo.forward)
    assert_untouched(model, before, modules)
    with torch.no_grad():
        models = [changed(model, shift) for shift in SHIFTS]
        assert_same(results, [[zoo.forward(m, item) for m in models] for item in ITEMS])
    assert not torch.equal(results[0][0], results[0][1])


@pytest.mark.parametrize("name", IN_BF16)
def test_code_that_asks_for_a_dtype_is_told_that_of_the_forward_pass(name: str) -> None:
    model = zoo.build(name)
    results = Engine(model, Law("gaussian"), compute_dtype=torch.bfloat16).evaluate(
        VARIANTS[:2], ITEMS[:1], zoo.forward
    )
    with torch.no_grad():
        models = [changed(model, shift, dtype=torch.bfloat16) for shift in SHIFTS[:2]]
        assert_same(results, [[zoo.forward(m, item) for m in models] for item in ITEMS[:1]])


class Toy(nn.Module):
    """Two layers; what is done with the weights of the second one, a test says."""

    def __init__(self, use: Callable[[Toy, Tensor], Any]) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second, self.table = nn.Linear(8, 8), nn.Linear(8, 8), nn.Embedding(4, 8)
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(self, self.first(x))


X = torch.linspace(-1, 1, 24).view(3, 8)


def as_argument(toy: Toy, x: Tensor) -> Any:
    return x + toy.first(toy.second.weight).sum()


def as_result(toy: Toy, x: Tensor) -> Any:
    return {"loss": x, "weight": toy.second.weight}


def in_a_list(toy: Toy, x: Tensor) -> Any:
    return x @ torch.cat([toy.second.weight.t(), toy.first.weight], dim=1)


def kept_for_later(toy: Toy, x: Tensor) -> Any:
    weight, bias = toy.second.weight, toy.second.bias
    for _ in range(3):
        x = F.linear(toy.first(x), weight, bias)
    return x


def by_parameters(toy: Toy, x: Tensor) -> Any:
    return x * sum(parameter.square().sum() for parameter in toy.second.parameters())


def by_name(toy: Toy, x: Tensor) -> Any:
    bias: Any = toy.second._parameters["bias"]
    return x + toy.second.get_parameter("weight")[0] + bias + toy.table.weight[1]


def beside_a_call(toy: Toy, x: Tensor) -> Any:
    return toy.second(x) @ toy.second.weight


@pytest.mark.parametrize(
    "use", [as_argument, as_result, in_a_list, kept_for_later, by_parameters, by_name, beside_a_call]
)
def test_weights_can_be_used_in_any_way(use: Callable[[Toy, Tensor], Any]) -> None:
    model = Toy(use)
    before, modules = state(model), attributes(model)
    (results_of_x,) = Engine(model, Law("gaussian")).evaluate(VARIANTS, [X], lambda m, x: m(x))
    assert_untouched(model, before, modules)
    assert all(type(module._parameters) is dict for module in model.modules())
    with torch.no_grad():
        for shift, result in zip(SHIFTS, results_of_x, strict=True):
            wanted = changed(model, shift)(X)
            assert type(result) is type(wanted)
            for one, other in zip(_tensors(result), _tensors(wanted), strict=True):
                assert not isinstance(one, WeightHandle)
                assert torch.equal(one, other)


def _tensors(result: Any) -> list[Tensor]:
    return list(result.values()) if isinstance(result, dict) else [result]


class Borrowing(nn.Module):
    """Its forward, which the hub runs, reads a weight of a module that is none of its own."""

    def __init__(self, lender: nn.Linear) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((8,), 1.5))
        self.lender = [lender]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x * self.scale, self.lender[0].weight)


class Lending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.linear = nn.Linear(8, 8)
        self.borrowing = Borrowing(self.linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.borrowing(self.linear(x))


def test_one_module_reads_the_weight_of_another_in_its_own_forward() -> None:
    model = Lending()
    (results_of_x,) = Engine(model, Law("gaussian")).evaluate(VARIANTS, [X], lambda m, x: m(x))
    for shift, result in zip(SHIFTS, results_of_x, strict=True):
        weights = dict(changed(model, shift).named_parameters())  # not called: a copy would borrow from the original
        inner = F.linear(X, weights["linear.weight"], weights["linear.bias"])
        assert torch.equal(result, F.linear(inner * weights["borrowing.scale"], weights["linear.weight"]))


def test_asking_what_a_weight_is_like_makes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def use(toy: Toy, x: Tensor) -> Tensor:
        weight = toy.second.weight
        asked.extend([weight.dtype, weight.device.type, weight.shape, weight.size(0), weight.dim(), len(weight)])
        asked.extend([weight.numel(), weight.is_floating_point(), weight.requires_grad, isinstance(weight, Tensor)])
        asked.extend([isinstance(weight, nn.Parameter), next(toy.parameters()).dtype])
        return x

    model = Toy(use)
    engine = Engine(model, Law("gaussian"), compute_dtype=torch.bfloat16)
    monkeypatch.setattr(engine._materialise, "read", lambda *_, **__: pytest.fail("a weight was made"))
    engine.evaluate([Variant(SHIFTS[0])], [X.bfloat16()], lambda m, x: m(x))
    shape = torch.Size([8, 8])
    assert asked == [torch.bfloat16, "cpu", shape, 8, 2, 8, 64, True, True, True, True, torch.bfloat16]


def test_what_was_served_is_gone_when_the_passes_are_over() -> None:
    served: list[weakref.ref[Tensor]] = []

    def use(toy: Toy, x: Tensor) -> Tensor:
        weight = toy.second.weight
        y = x @ weight
        assert isinstance(weight, WeightHandle)
        served.append(weakref.ref(weight.value()))
        return y

    engine = Engine(Toy(use), Law("gaussian"))
    engine.evaluate(VARIANTS, [X], lambda m, x: m(x))
    gc.collect()
    assert len(served) == len(VARIANTS)
    assert [ref() for ref in served[:3]] == [None] * 3  # the fourth has no shift: it is the weight itself


def test_all_passes_share_one_making_of_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(Toy(lambda toy, x: x @ toy.second.weight), Law("gaussian"))
    calls: list[int] = []
    real = engine._materialise.read

    def read(reads: Any, *, nested: bool) -> dict[int, Tensor]:
        calls.append(len(reads))
        return real(reads, nested=nested)

    monkeypatch.setattr(engine._materialise, "read", read)
    engine.evaluate(VARIANTS, [X, X[:2]], lambda m, x: m(x))
    assert calls == [2 * len(VARIANTS)]


def test_writing_to_a_weight_is_refused_before_it_happens() -> None:
    model = Toy(lambda toy, x: x + toy.second.weight.div_(2).sum())
    before = state(model)
    with pytest.raises(NotImplementedError, match=r"writes to its weight second.weight \(div_\)"):
        Engine(model, Law("gaussian")).evaluate(VARIANTS, [X], lambda m, x: m(x))
    assert_untouched(model, before, attributes(model))


def functionally(toy: Toy, x: Tensor) -> Any:
    return torch.func.functional_call(toy.second, {"weight": torch.ones(8, 8)}, (x,))


def by_assignment(toy: Toy, x: Tensor) -> Any:
    toy.second.weight = nn.Parameter(torch.ones(8, 8))
    return toy.second(x)


def by_deletion(toy: Toy, x: Tensor) -> Any:
    del toy.second.weight
    return x


@pytest.mark.parametrize("use", [functionally, by_assignment, by_deletion])
def test_replacing_a_weight_is_refused_before_it_happens(use: Callable[[Toy, Tensor], Any]) -> None:
    """Other passes would compute with it; `functional_call` left a handle in place of the weight, besides."""
    model = Toy(use)
    before, modules = state(model), attributes(model)
    with pytest.raises(NotImplementedError, match=r"replaces its weight second.weight"):
        Engine(model, Law("gaussian")).evaluate(VARIANTS, [X], lambda m, x: m(x))
    assert_untouched(model, before, modules)
    assert type(model.second._parameters["weight"]) is nn.Parameter


def test_code_below_torchs_functions_is_refused() -> None:
    """Compiled code, say, which would compute with the memory that a handle has not."""

    def use(toy: Toy, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return x + toy.second.weight.sum()

    with pytest.raises(NotImplementedError, match=r"hands second.weight to compiled code"):
        Engine(Toy(use), Law("gaussian")).evaluate(VARIANTS, [X], lambda m, x: m(x))


def test_a_direction_per_sample_cannot_reach_such_a_weight() -> None:
    model = Toy(lambda toy, x: x @ toy.second.weight)
    variant = Variant(Combination(), tuple(Combination.single(i, 0.1) for i in range(3)))

    class Item:
        slots = (0, 1, 2)

    with pytest.raises(UserError, match=r"algorithm.per_sample: second.weight is used by other modules than its own"):
        Engine(model, Law("lowrank")).evaluate([variant], [Item()], lambda m, _: m(X))


def test_weights_that_are_only_read_count_as_used() -> None:
    engine = Engine(Toy(lambda toy, x: x @ toy.second.weight), Law("gaussian"))
    engine.evaluate(VARIANTS, [X], lambda m, x: m(x))
    assert engine.never_used() == ["second.bias", "table.weight"]
