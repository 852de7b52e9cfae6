"""One contract for every registered algorithm; a new one is picked up from `ALGORITHMS`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

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
from mezo_dist.directions.combination import ZERO
from mezo_dist.directions.laws import GAUSSIAN

DIM = 20
FAST = {
    "mezo": {"lr": 5e-3},
    "mezo-svrg": {"lr": 5e-3, "anchor_lr": 1e-2, "q": 2},
}
Loss = Callable[[torch.Tensor, str], float]


def make(name: str, num_steps: int = 300) -> Algorithm:
    problem = Problem(seed=3, num_steps=num_steps, batch_size=4, full_size=16)
    return build(name, ALGORITHMS[name][0](**FAST[name]), problem)


def direction(seed: int) -> torch.Tensor:
    return GAUSSIAN.chunks(seed, 0, 0, 1).flatten()[:DIM].double()


def at(w: torch.Tensor, variant: Variant) -> torch.Tensor:
    return w + sum((c * direction(seed) for seed, c in variant.shift.terms), torch.zeros(DIM, dtype=torch.float64))


def run_step(algorithm: Algorithm, state: object, step: int, w: torch.Tensor, loss: Loss) -> Update:
    rounds: list[Losses] = []
    request: Evaluation | Update = algorithm.plan(state, step)
    while isinstance(request, Evaluation):
        rounds.append(Losses(tuple(loss(at(w, v), request.batch) for v in request.variants)))
        request = algorithm.update(state, step, rounds)
    return request


def quadratic(w: torch.Tensor, batch: str) -> float:
    return float(((w - 1) ** 2).sum() / 2)


every_algorithm = pytest.mark.parametrize("name", sorted(ALGORITHMS))


def test_every_algorithm_has_settings_for_this_test() -> None:
    assert FAST.keys() == ALGORITHMS.keys()


@every_algorithm
def test_minimises_a_quadratic(name: str) -> None:
    algorithm = make(name)
    state, w = algorithm.init(), torch.zeros(DIM, dtype=torch.float64)
    for step in range(300):
        update = run_step(algorithm, state, step, w, quadratic)
        state, w = update.state, at(w, Variant(update.combination))
    assert quadratic(w, "") < 0.05 * quadratic(torch.zeros(DIM), "")


@every_algorithm
def test_is_deterministic_and_its_state_survives_json(name: str) -> None:
    algorithm, other = make(name), make(name)
    state, w = algorithm.init(), torch.zeros(DIM, dtype=torch.float64)
    for step in range(12):
        update = run_step(algorithm, state, step, w, quadratic)
        restored: object = state_from_json(algorithm.State, json.loads(json.dumps(state_to_json(state))))
        assert restored == state
        assert run_step(other, restored, step, w, quadratic) == update
        state, w = update.state, at(w, Variant(update.combination))


@every_algorithm
def test_equal_losses_give_a_zero_update(name: str) -> None:
    algorithm = make(name)
    state = algorithm.init()
    for step in range(5):
        update = run_step(algorithm, state, step, torch.zeros(DIM), lambda w, batch: 0.0)
        assert update.combination == ZERO
        state = update.state


@every_algorithm
def test_moves_only_along_directions_that_were_probed(name: str) -> None:
    algorithm = make(name)
    state, w = algorithm.init(), torch.zeros(DIM, dtype=torch.float64)
    probed: set[int] = set()

    def remember(variants: Sequence[Variant]) -> None:
        probed.update(seed for v in variants for seed, _ in v.shift.terms)

    for step in range(6):
        remember(algorithm.plan(state, step).variants)
        update = run_step(algorithm, state, step, w, quadratic)
        assert {seed for seed, _ in update.combination.terms} <= probed
        state, w = update.state, at(w, Variant(update.combination))


@every_algorithm
def test_steps_draw_different_directions(name: str) -> None:
    algorithm = make(name)
    state = algorithm.init()
    first = []
    for step in range(20):
        first.append(algorithm.plan(state, step).variants[0].shift.terms[-1][0])
        state = run_step(algorithm, state, step, torch.zeros(DIM), quadratic).state
    assert len(set(first)) == 20
