"""One contract for every registered algorithm, and for the options that make another one of it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from mezo_dist.algorithms import ALGORITHMS, build
from mezo_dist.algorithms.base import (
    Algorithm,
    Evaluation,
    Losses,
    Problem,
    Update,
    Variant,
    state_from_json,
    state_to_json,
)
from mezo_dist.algorithms.momentum import Momentum
from mezo_dist.algorithms.operations import apply_updates
from mezo_dist.algorithms.schedules import Annealing, Schedule
from mezo_dist.algorithms.step import run_step
from mezo_dist.directions.combination import ZERO, Combination

DIM = 20
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mezo": ("mezo", {"lr": 1e-2}),
    "mezo, 4 directions": ("mezo", {"lr": 2e-2, "directions": 4}),
    "mezo, one-sided": ("mezo", {"lr": 2e-2, "directions": 4, "one_sided": True}),
    "mezo, per sample": ("mezo", {"lr": 2e-2, "per_sample": True}),
    "mezo, several per sample": ("mezo", {"lr": 2e-2, "per_sample": True, "directions": 3, "one_sided": True}),
    "mezo, sign": ("mezo", {"lr": 3e-2, "scaling": "sign"}),
    "mezo, as FZOO": ("mezo", {"lr": 3e-2, "directions": 8, "one_sided": True, "scaling": "normalised"}),
    "mezo, ranks": ("mezo", {"lr": 3e-2, "directions": 4, "scaling": "ranks"}),
    "mezo, one-sided ranks": ("mezo", {"lr": 3e-2, "directions": 8, "one_sided": True, "scaling": "ranks"}),
    "mezo, clipped": ("mezo", {"lr": 1e-2, "clip": 2.0}),
    "mezo, momentum": ("mezo", {"lr": 1e-2, "momentum": Momentum(0.7, 4)}),
    "mezo, as FedKSeed": ("mezo", {"lr": 1e-2, "pool": 10_000, "pull": 1e-3}),
    "mezo, weight decay": ("mezo", {"lr": 1e-2, "weight_decay": 0.05}),
    "mezo, weight decay on all": ("mezo", {"lr": 1e-2, "weight_decay": 0.05, "weight_decay_all": True}),
    "mezo, annealing": ("mezo", {"lr": 1e-2, "annealing": Annealing(window=20, floor=0.5)}),
    "mezo, chosen eps": ("mezo", {"lr": 1e-2, "eps": "auto"}),
    "mezo, auto rate": ("mezo", {"lr": "auto", "eta": 0.5}),
    "mezo, auto rate, one-sided": ("mezo", {"lr": "auto", "eta": 0.5, "directions": 4, "one_sided": True}),
    "mezo, auto rate, momentum": ("mezo", {"lr": "auto", "eta": 0.5, "momentum": Momentum(0.7, 4)}),
    "mezo, auto rate, pool": ("mezo", {"lr": "auto", "eta": 0.5, "pool": 10_000, "clip": 100.0}),
    "mezo, smaller eps": ("mezo", {"lr": 1e-2, "eps": 0.1, "eps_schedule": Schedule("cosine", final=0.01)}),
    "mezo-svrg": ("mezo-svrg", {"lr": 5e-3, "anchor_lr": 1e-2, "q": 2}),
    "mezo-svrg, q = 5": ("mezo-svrg", {"lr": 5e-3, "anchor_lr": 5e-3, "q": 5, "anchor_directions": 40}),
    "mezo-svrg, directions": ("mezo-svrg", {"lr": 1e-2, "anchor_lr": 2e-2, "directions": 3, "anchor_directions": 4}),
    "mezo-svrg, one-sided": ("mezo-svrg", {"lr": 1e-2, "anchor_lr": 1e-2, "directions": 3, "one_sided": True}),
    "mezo-svrg, per sample": ("mezo-svrg", {"lr": 1e-2, "anchor_lr": 2e-2, "per_sample": True}),
    "mezo-svrg, several per sample": (
        "mezo-svrg",
        {"lr": 1e-2, "anchor_lr": 2e-2, "per_sample": True, "directions": 3, "anchor_directions": 2},
    ),
    "mezo-svrg, auto rates": ("mezo-svrg", {"lr": "auto", "anchor_lr": "auto", "eta": 0.5}),
    "mezo-svrg, auto rates, directions": (
        "mezo-svrg",
        {
            "lr": "auto",
            "anchor_lr": "auto",
            "eta": 0.5,
            "q": 3,
            "directions": 2,
            "anchor_directions": 4,
            "one_sided": True,
        },
    ),
    "mezo-svrg, replayed": ("mezo-svrg", {"lr": 5e-3, "anchor_lr": 1e-2, "q": 2, "anchor": "replay"}),
    "mezo-svrg, chosen eps": ("mezo-svrg", {"lr": 5e-3, "anchor_lr": 1e-2, "q": 2, "eps": "auto"}),
    "mezo-svrg, stored": (
        "mezo-svrg",
        {"lr": 5e-3, "anchor_lr": 5e-3, "q": 5, "anchor_directions": 40, "anchor": "stored"},
    ),
    "mezo-svrg, weight decay": (
        "mezo-svrg",
        {"lr": 5e-3, "anchor_lr": 1e-2, "q": 2, "anchor": "auto", "weight_decay": 0.05},
    ),
    "mezo-svrg, stored, per sample": (
        "mezo-svrg",
        {"lr": 1e-2, "anchor_lr": 2e-2, "per_sample": True, "q": 3, "anchor": "auto"},
    ),
    "mezo-svrg, clipped, momentum": (
        "mezo-svrg",
        {"lr": 5e-3, "anchor_lr": 1e-2, "clip": 5.0, "momentum": Momentum(0.5, 3)},
    ),
    "mezo-svrg-released": ("mezo-svrg-released", {"lr": 2e-3, "anchor_lr": 2e-2, "annealing": Annealing(divisor=1)}),
}
"""Settings that are quick on the quadratic, for every algorithm and every option that makes another one of it."""
NUM_STEPS, BATCH_SIZE, FULL_SIZE = 300, 4, 16
Loss = Callable[[torch.Tensor, str], float]


def make(case: str) -> Algorithm[Any]:
    name, settings = CASES[case]
    problem = Problem(3, NUM_STEPS, BATCH_SIZE, FULL_SIZE, num_train=FULL_SIZE, eps=1e-2)
    return build(name, ALGORITHMS[name][0](**settings), problem)


@functools.cache
def direction(seed: int) -> torch.Tensor:
    """Any law does here, and this one is quick."""
    return torch.randn(DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(w: torch.Tensor, *shifts: Combination) -> torch.Tensor:
    return w + sum((c * direction(seed) for s in shifts for seed, c in s.terms), torch.zeros(DIM, dtype=torch.float64))


@dataclass(frozen=True)
class Point:
    """Where the weights are, and the copy of them that was kept last."""

    current: torch.Tensor = field(default_factory=lambda: torch.zeros(DIM, dtype=torch.float64))
    anchor: torch.Tensor | None = None

    def at(self, variant: Variant, *sample_shifts: Combination) -> torch.Tensor:
        base = self.current if variant.base == "current" else self.anchor
        assert base is not None, "nothing was kept yet"
        return moved(base, variant.shift, *sample_shifts)

    def after(self, update: Update[Any]) -> Point:
        weights = _Weights(self.current, self.anchor)
        apply_updates(weights, 0, [(0, update.operations)])
        return Point(weights.current, weights.anchor)


@dataclass
class _Weights:
    """See `EditableWeights`."""

    current: torch.Tensor
    anchor: torch.Tensor | None

    def copy_anchor(self) -> None:
        self.anchor = self.current

    def scale(
        self, factor: float, rounding_seed: int, *, exempt_vectors: bool, only: tuple[str, ...] | None = None
    ) -> None:
        assert only is None
        self.current = factor * self.current

    def advance(self, updates: Sequence[tuple[Combination, int]], only: tuple[str, ...] | None = None) -> None:
        assert only is None
        self.current = moved(self.current, *(combination for combination, _ in updates))


def answer(request: Evaluation, w: Point, loss: Loss) -> Losses:
    """What the training loop would find, if all samples had the same loss."""
    if not request.each_sample:
        # The curvature of `quadratic`, whose matrix is the identity.
        slopes = [w.at(request.variants[p.ahead]) - w.at(request.variants[p.behind]) for p in request.pairs]
        squares = [float((d**2).sum()) / p.distance**2 for d, p in zip(slopes, request.pairs, strict=True)]
        curvature = sum(squares) / len(squares) if squares else None
        return Losses(tuple(loss(w.at(v), request.batch) for v in request.variants), curvature=curvature)
    no_shifts = {"minibatch": (ZERO,) * BATCH_SIZE, "full": (ZERO,) * FULL_SIZE}[request.batch]
    each = tuple(tuple(loss(w.at(v, o), request.batch) for o in v.per_sample or no_shifts) for v in request.variants)
    return Losses(tuple(sum(row) / len(row) for row in each), each)


def one_step(
    algorithm: Algorithm[Any], state: object, step: int, w: Point, loss: Loss, probed: set[int] | None = None
) -> Update[Any]:
    """One step; the directions of its variants are added to ``probed``."""

    def evaluate(request: Evaluation, round_number: int) -> Losses:
        if probed is not None:
            probed.update(seed for v in request.variants for s in (v.shift, *v.per_sample) for seed, _ in s.terms)
        return answer(request, w, loss)

    update = run_step(algorithm, state, step, evaluate).update
    assert update is not None
    return update


def quadratic(w: torch.Tensor, batch: str) -> float:
    return float(((w - 1) ** 2).sum() / 2)


every_case = pytest.mark.parametrize("case", CASES)


def test_every_algorithm_is_tested_here() -> None:
    assert {name for name, _ in CASES.values()} == ALGORITHMS.keys()


@every_case
def test_minimises_a_quadratic(case: str) -> None:
    algorithm = make(case)
    state, w = algorithm.init(), Point()
    for step in range(NUM_STEPS):
        update = one_step(algorithm, state, step, w, quadratic)
        state, w = update.state, w.after(update)
    assert quadratic(w.current, "") < 0.05 * quadratic(torch.zeros(DIM), "")


@every_case
def test_is_deterministic_and_its_state_survives_json(case: str) -> None:
    algorithm, other = make(case), make(case)
    state, w = algorithm.init(), Point()
    for step in range(12):
        update = one_step(algorithm, state, step, w, quadratic)
        restored: object = state_from_json(algorithm.State, json.loads(json.dumps(state_to_json(state))))
        assert restored == state
        assert one_step(other, restored, step, w, quadratic) == update
        state, w = update.state, w.after(update)


@every_case
def test_equal_losses_give_a_zero_update(case: str) -> None:
    algorithm = make(case)
    state, w = algorithm.init(), Point()
    for step in range(5):
        update = one_step(algorithm, state, step, w, lambda w, batch: 0.0)
        assert update.combination == ZERO
        state, w = update.state, w.after(update)


@every_case
def test_moves_only_along_directions_that_were_probed(case: str) -> None:
    algorithm = make(case)
    state, w = algorithm.init(), Point()
    probed: set[int] = set()
    for step in range(6):
        update = one_step(algorithm, state, step, w, quadratic, probed)
        assert update.combination
        assert {seed for seed, _ in update.combination.terms} <= probed
        state, w = update.state, w.after(update)


@every_case
def test_steps_draw_different_directions(case: str) -> None:
    algorithm = make(case)
    state, w = algorithm.init(), Point()
    fresh: list[set[int]] = []
    for step in range(20):
        fresh.append(set())
        update = one_step(algorithm, state, step, w, quadratic, fresh[-1])
        state, w = update.state, w.after(update)
    assert all(seeds - set().union(*fresh[:step]) for step, seeds in enumerate(fresh))


@every_case
def test_a_skipped_step_is_survived(case: str) -> None:
    algorithm = make(case)
    state, w = algorithm.init(), Point()
    for step in (2, 3, 7, 8, 9):  # the state stays as it was where a loss was not finite
        update = one_step(algorithm, state, step, w, quadratic)
        state, w = update.state, w.after(update)
    assert update.metrics.keys() >= {"loss", "projected_gradient", "lr"}
