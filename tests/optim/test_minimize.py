"""`minimize` does with any function what an engine does with a model's loss."""

from __future__ import annotations

import concurrent.futures
import math
from typing import Any

import pytest
import torch
from torch import nn

from mezo_dist.algorithms.base import Problem, Variant
from mezo_dist.algorithms.first_order import SGD
from mezo_dist.algorithms.mezo import MeZO
from mezo_dist.algorithms.svrg import MeZOSVRG
from mezo_dist.algorithms.svrg_released import MeZOSVRGReleased
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.law import Law
from mezo_dist.engines.engine import Engine
from mezo_dist.errors import UserError
from mezo_dist.optim.minimize import Draw, Minimum, Params, minimize

START = {"matrix": torch.zeros(3, 4), "vector": torch.zeros(2), "scalar": torch.zeros(())}
MEZO = MeZO(lr=0.02, directions=2)


def cost(weights: Params, draw: Draw) -> float:
    """Least where all weights are 1."""
    return sum(float(((tensor.float() - 1) ** 2).sum()) for tensor in weights.values())


def run(algorithm: Any = MEZO, steps: int = 150, **more: Any) -> Minimum:
    return minimize(cost, START, algorithm, steps=steps, **more)


@pytest.mark.parametrize(
    ("algorithm", "law"),
    [
        (MEZO, "gaussian"),
        (MEZO, "rademacher"),
        (MEZO, "lowrank"),
        (MeZOSVRG(lr=0.01, anchor_lr=0.02), "gaussian"),
        (MeZOSVRGReleased(lr=1e-3, anchor_lr=0.02), "gaussian"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_it_minimises(algorithm: Any, law: str) -> None:
    minimum = run(algorithm, law=law)
    assert cost(minimum.weights, Draw(0)) < 0.1 * cost(START, Draw(0))
    assert minimum.losses[0] == pytest.approx(15, rel=0.01)
    assert len(minimum.losses) == 150
    assert all(not tensor.any() for tensor in START.values()), "what was given is left as it was"


def test_it_does_what_an_engine_does() -> None:
    """The same names, shapes and seeds: the same bits as MeZO by hand on a model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    start = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    x = torch.randn(5, 4)

    def loss(weights: Params, draw: Draw) -> float:
        return float(torch.func.functional_call(model, weights, x).square().mean())

    minimum = minimize(loss, start, MeZO(lr=0.5, eps=0.25), steps=3, seed=7)
    engine = Engine(model, Law("gaussian"))
    for step in range(3):
        z = Combination.single(Problem(7).direction_seed(step), 0.25)
        plus, minus = engine.evaluate([Variant(z), Variant(-z)], [x], lambda m, x: m(x).square().mean().item())[0]
        engine.add(z * (-0.5 * (plus - minus) / 0.5 / 0.25), 0)
    for name, tensor in model.named_parameters():
        assert torch.equal(minimum.weights[name], tensor), name


def test_the_same_again_here_or_on_other_threads() -> None:
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        runs = [run(steps=5), run(steps=5), run(steps=5, mapper=pool.map)]
    for other in runs[1:]:
        assert other.losses == runs[0].losses
        assert all(torch.equal(other.weights[name], tensor) for name, tensor in runs[0].weights.items())
    assert not torch.equal(run(steps=5, seed=1).weights["matrix"], runs[0].weights["matrix"])


def test_all_calls_of_a_step_get_the_same_draw() -> None:
    draws: list[Draw] = []

    def remember(weights: Params, draw: Draw) -> float:
        draws.append(draw)
        return cost(weights, draw)

    minimum = minimize(remember, START, MeZOSVRG(q=2, anchor_directions=3), steps=3)
    assert draws == [Draw(0, "full")] * 6 + [Draw(1)] * 4 + [Draw(2, "full")] * 6
    assert minimum.calls == 16


def test_values_that_are_not_finite_skip_the_step() -> None:
    def sometimes(weights: Params, draw: Draw) -> float:
        return math.nan if draw.step in (1, 2) else cost(weights, draw)

    seen: list[tuple[int, float]] = []
    minimum = minimize(
        sometimes, START, MEZO, steps=5, max_skipped=3,
        after_step=lambda step, weights, metrics: seen.append((step, float(weights["scalar"]))),
    )  # fmt: skip
    assert [math.isnan(loss) for loss in minimum.losses] == [False, True, True, False, False]
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5]
    assert seen[0][1] == seen[1][1] == seen[2][1] != seen[3][1]


def test_it_gives_up_after_too_many_of_them() -> None:
    with pytest.raises(UserError, match="max_skipped: 3 steps in a row had no finite value, the last one step 3"):
        minimize(lambda weights, draw: math.inf, START, MEZO, steps=9, max_skipped=3)


def test_small_updates_of_bf16_weights_are_not_lost() -> None:
    start = {"weight": torch.ones(4096, dtype=torch.bfloat16)}
    minimum = minimize(lambda w, _: float(w["weight"].double().sum()), start, MeZO(lr=1e-6, eps=0.1), steps=1)
    moved = minimum.weights["weight"] != 1
    assert 0 < int(moved.sum()) < 4096


@pytest.mark.parametrize(
    ("start", "more", "message"),
    [
        ({"x": torch.zeros(2, dtype=torch.float64)}, {}, "start: 'x' is torch.float64; use float32"),
        (START, {"per_sample": True}, "algorithm.per_sample: a function has no samples"),
        (
            START,
            {"lr": "auto"},
            "algorithm.lr: auto reads curvature off the losses of samples, and a function has none",
        ),
    ],
)
def test_what_cannot_be_used_is_said(start: Params, more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        minimize(cost, start, MeZO(**more), steps=1)


def test_algorithms_that_need_gradients_are_refused() -> None:
    with pytest.raises(UserError, match=r"algorithm: sgd needs gradients, which a function does not give"):
        minimize(cost, START, SGD(lr=0.1), steps=1)  # type: ignore[arg-type]
