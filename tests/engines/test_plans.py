"""What is made is planned once, and updates look weights up once: both notice weights that are others by now.

Tensors in host memory take the way of those on a GPU here: modules of a block are made together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mezo_dist.algorithms.base import Variant
from mezo_dist.directions import devices
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.law import Law
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.lockstep.materialise import Materialiser
from mezo_dist.engines.lockstep.passes import Coroutine
from mezo_dist.testing import tiny_model

SHIFT = Combination.single(3, 1e-2)
VARIANTS = [Variant(SHIFT), Variant(-SHIFT), Variant()]
IDS = torch.arange(8).view(2, 4)
LAWS = [Law("gaussian"), Law("lowrank", 2)]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "takes_launches", lambda device: True)


class Block(nn.Module):
    """Linear layers, one of which uses the other's weight, and one hands its own out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), Neighbour()
        self.second.neighbour = [self.first]  # not a module of its own

    def forward(self, x: Tensor) -> Tensor:
        table, x = self.second(self.first(x))
        return self.first(x) + table


class Neighbour(nn.Linear):
    """Computes with the weight of another layer, too, and gives a view of its own bias."""

    neighbour: list[nn.Linear]

    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.bias[:4], super().forward(x) @ self.neighbour[0].weight


class Toy(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, ids: Tensor) -> Tensor:
        x = ids.float()
        for block in self.blocks:
            x = block(x)
        return x


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return Toy() if kind == "toy" else tiny_model(kind)


def outputs(engine: Engine, variants: Sequence[Variant] = VARIANTS) -> list[Tensor]:
    def forward(model: nn.Module, ids: Tensor) -> Tensor:
        result = model(ids)
        return result if isinstance(result, Tensor) else result.logits

    return [output for row in engine.evaluate(variants, [IDS, IDS.flip(1)], forward) for output in row]


def assert_same(some: list[Tensor], others: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
@pytest.mark.parametrize("kind", ["toy", "llama-tied", "opt"])
def test_bits_are_those_of_modules_that_are_made_one_by_one(
    kind: str, law: Law, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = outputs(Engine(model_of(kind), law))
    monkeypatch.setattr(devices, "takes_launches", lambda device: True)
    engine = Engine(model_of(kind), law)
    for _ in range(3):
        assert_same(outputs(engine), expected)


def test_passes_wait_once_for_what_is_made_together(launches: None, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, real = Engine(model_of("llama"), LAWS[0]), Coroutine.wait
    waited: list[object] = []

    def wait(caller: Coroutine, request: Any) -> Any:
        waited.append(request)
        return real(caller, request)

    monkeypatch.setattr(Coroutine, "wait", wait)
    counts = []
    for _ in range(3):
        waited.clear()
        outputs(engine)
        counts.append(len(waited) // (2 * len(VARIANTS)))
    assert counts == [2 * 9 + 3, 2 + 3, 2 + 3]  # modules of two blocks, and the embedding, the norm and the head


def test_the_stored_anchor_has_plans_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    variants = [*VARIANTS[:2], Variant(SHIFT, base="anchor"), Variant(-SHIFT, base="anchor")]
    planned: list[object] = []
    counts: list[int] = []
    plan = Materialiser._plan

    def steps() -> list[Tensor]:
        engine, results = Engine(model_of("opt"), LAWS[0]), []
        for step in range(4):
            planned.clear()
            if step % 2 == 0:
                engine.copy_anchor()
            engine.add(SHIFT, 0)
            results += outputs(engine, variants)
            counts.append(len(planned))
        return results

    def counted(materialiser: Materialiser, group: Any, *more: Any) -> Any:
        planned.append(group)
        return plan(materialiser, group, *more)

    monkeypatch.setattr(Materialiser, "_plan", counted)
    expected = steps()
    monkeypatch.setattr(devices, "takes_launches", lambda device: True)
    counts.clear()
    assert_same(steps(), expected)
    rows = 2 * 1  # of the embedding, whose rows are those of a batch; by base
    assert counts[1] > counts[2] == counts[3] == rows


@pytest.mark.parametrize("kind", ["llama-tied", "opt", "gpt2"])
def test_what_is_called_often_is_made_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits are those of making it anew in every call."""
    waited: list[object] = []
    wait = Coroutine.wait

    def counted(caller: Coroutine, request: Any) -> Any:
        waited.append(request)
        return wait(caller, request)

    def forward(model: nn.Module, ids: Tensor) -> Tensor:
        logits = [model(ids[:, :k]).logits[:, -1] for k in (2, 3, 4)]
        waited.clear()
        return torch.stack([*logits, model(ids).logits[:, 0]])

    def texts(only: list[str] | None = None) -> list[Tensor]:
        model = model_of(kind)
        next(model.parameters()).requires_grad_(False)
        engine, results = Engine(model, LAWS[1]), []
        for shift in (SHIFT, Combination.of([(5, 0.1), (6, 0.2)])):
            with engine.called_often(), nullcontext() if only is None else engine.moving_only(only):
                rows = engine.evaluate([Variant(shift), Variant(-shift), Variant()], [IDS, IDS.flip(1)], forward)
            results += [output for row in rows for output in row]
            engine.add(SHIFT, 0)
        return results

    some = Engine(model_of(kind), LAWS[1]).trainable[::2]
    with monkeypatch.context() as patch:
        patch.setattr(Materialiser, "_can_keep", lambda *_: False)
        expected = texts(), texts(some)
    monkeypatch.setattr(Coroutine, "wait", counted)
    assert_same(texts(), expected[0])
    tables = int(kind == "opt")  # of positions, whose class is one of OPT's own
    assert len(waited) <= 2 * len(VARIANTS) * tables
    monkeypatch.setattr(devices, "takes_launches", lambda device: True)
    assert_same(texts(some), expected[1])


@pytest.mark.parametrize("kind", ["llama-tied", "opt", "gpt2", "mixtral"])
def test_directions_per_sample_go_with_what_is_made_together(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    signs = [tuple(Combination.of([(seed, sign), (seed + 9, 0.1)]) for seed in range(4)) for sign in (0.1, -0.1)]
    variants = [Variant(SHIFT, per_sample=signs[0]), Variant(SHIFT, per_sample=signs[1]), Variant(-SHIFT)]
    batches = [SimpleNamespace(slots=slots, ids=IDS.roll(slots[0])) for slots in ((0, 1), (2, 3))]
    waited: list[object] = []
    wait = Coroutine.wait

    def counted(caller: Coroutine, request: Any) -> Any:
        waited.append(request)
        return wait(caller, request)

    def steps() -> list[Tensor]:
        engine, results = Engine(model_of(kind), LAWS[1]), []
        for _ in range(3):
            waited.clear()
            rows = engine.evaluate(variants, batches, lambda model, batch: model(batch.ids).logits)
            results += [output for row in rows for output in row]
            engine.add(SHIFT, 0)
        return results

    expected = steps()
    monkeypatch.setattr(devices, "takes_launches", lambda device: True)
    monkeypatch.setattr(Coroutine, "wait", counted)
    assert_same(steps(), expected)
    if kind == "opt":  # two blocks, their embeddings of tokens and places, the last norm and the head
        assert len(waited) == 2 * len(variants) * 6


def replace_parameter(model: nn.Module, name: str) -> None:
    owner, _, attribute = name.rpartition(".")
    parameter = model.get_parameter(name)
    setattr(model.get_submodule(owner), attribute, nn.Parameter(parameter.detach() + 1, parameter.requires_grad))


def replace_data(model: nn.Module, name: str) -> None:
    parameter = model.get_parameter(name)
    parameter.data = parameter.detach() + 1


@pytest.mark.parametrize("replace", [replace_parameter, replace_data])
@pytest.mark.parametrize("frozen", [False, True])
def test_weights_that_were_replaced_are_used(
    launches: None, replace: Callable[[nn.Module, str], None], frozen: bool
) -> None:
    name = "blocks.1.first.weight"
    models = [model_of("toy"), model_of("toy")]
    for model in models:
        model.get_parameter(name).requires_grad_(not frozen)
    engine = Engine(models[0], LAWS[0])
    for _ in range(3):
        before = outputs(engine)
        engine.add(SHIFT, 0)
        engine.scale(0.5, 0, exempt_vectors=True)
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        replace(model, name)
    fresh = Engine(models[1], LAWS[0])
    after = outputs(engine)
    assert_same(after, outputs(fresh))
    assert not torch.equal(after[0], before[0])
    for some in (engine, fresh):
        some.add(SHIFT, 0)
        some.scale(0.5, 0, exempt_vectors=True)
    assert_same([*models[0].parameters()], [*models[1].parameters()])


def test_plans_do_not_keep_memory_that_weights_have_left(launches: None) -> None:
    model = model_of("toy")
    engine = Engine(model, LAWS[0])
    for _ in range(3):
        outputs(engine)
        engine.add(SHIFT, 0)
    parameter = model.get_parameter("blocks.0.first.weight")
    old = parameter.data.untyped_storage()
    parameter.data = parameter.detach().clone()
    assert torch._C._storage_Use_Count(old._cdata) == 1
