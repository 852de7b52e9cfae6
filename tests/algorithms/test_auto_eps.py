"""``eps: auto`` finds the size at which noise and bend, both known here, make estimates least wrong."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest

from mezo_dist.algorithms.auto_eps import LADDER, choose_eps, is_too_bent
from mezo_dist.algorithms.base import Evaluation, Losses, Problem
from mezo_dist.algorithms.groups import Group, GroupedPlanner
from mezo_dist.algorithms.mezo import MeZO, MeZOPlanner
from mezo_dist.algorithms.step import run_step
from mezo_dist.algorithms.svrg import MeZOSVRG, SVRGPlanner

PROBLEM = Problem(3, 100, 4, 16, num_train=16, eps=1e-3)


def rows_of(noise: float, bend: float, power: int, number: int = 40) -> list[list[float]]:
    """Projected gradients of size 1 at every rung, shifted by ``noise`` / eps and ``bend`` eps^power."""
    rng = random.Random(0)
    right = [(rng.gauss(0, 1), rng.gauss(0, bend)) for _ in range(number)]
    return [[p + b * eps**power + rng.gauss(0, noise) / eps for p, b in right] for eps in LADDER]


@pytest.mark.parametrize(
    ("noise", "bend", "one_sided", "best"),
    [
        (1e-12, 10, False, 1e-3),
        (1e-7, 1, False, 5e-3),
        (1e-4, 100, False, 1e-2),
        (1e-2, 1, False, 5e-2),
        (1e-12, 10, True, 1e-3),
        (1e-4, 1, True, 1e-2),
        (1e-5, 1, True, 2e-3),
        (1e-2, 0.1, True, 5e-2),
    ],
)
def test_the_rung_that_is_least_wrong_is_chosen(noise: float, bend: float, one_sided: bool, best: float) -> None:
    power = 1 if one_sided else 2
    choice = choose_eps(LADDER, rows_of(noise, bend, power), one_sided=one_sided)
    wrong = {eps: math.hypot(noise / eps, bend * eps**power) for eps in LADDER}
    assert wrong[choice.eps] < 1.5 * min(wrong.values()), "or as good as that"
    assert choice.eps == best
    assert math.hypot(choice.noise, choice.bend) == pytest.approx(wrong[best], rel=0.8)


def test_people_are_told_when_no_rung_will_do_and_when_nothing_changes() -> None:
    assert (
        "rounding of losses makes projected gradients wrong by"
        in choose_eps(LADDER, rows_of(1e-7, 1, 2), one_sided=False).note
    )
    note = choose_eps(LADDER, rows_of(0.1, 100, 2), one_sided=False).note
    assert "no eps has both in hand: take a larger train.batch_size" in note
    none = choose_eps(LADDER, [[0.0] * 4] * 6, one_sided=False)
    assert none.eps == 5e-2, "the largest"
    assert "most differences of losses are zero; give a larger number for algorithm.eps" in none.note
    few = [[0.0, 0.0, 0.0, q] for q in (0.0, 0.0, 0.0, 0.1, 0.1, 0.1)]
    assert choose_eps(LADDER, few, one_sided=False).eps == 5e-2, "of those with a difference"


def test_a_rung_whose_differences_are_mostly_zero_does_not_count() -> None:
    flat = [[0.0, 0.0, 0.0, 1.0]] * 3
    choice = choose_eps(
        LADDER, [*flat, [0.4, -0.3, 0.5, 0.1], [0.5, -0.3, 0.4, 0.2], [0.5, -0.3, 0.5, 0.2]], one_sided=False
    )
    assert choice.eps >= 1e-2


def test_climbing_ends_where_the_loss_bends() -> None:
    rows = rows_of(1e-9, 1e4, 2)
    assert [is_too_bent(rows[:n]) for n in range(1, 5)] == [False, False, False, True]
    noisy = rows_of(0.1, 1, 2)
    assert not any(is_too_bent(noisy[:n]) for n in range(1, 7)), "noise falls, and ends nothing"


def losses_of(request: Evaluation) -> Losses:
    """A cubic of the coefficients, with samples that are alike."""
    number = 16 if request.batch == "full" else 4
    shifts = [v.per_sample or (v.shift,) * number for v in request.variants]
    rows = tuple(tuple(sum(c + 1e5 * c**3 for _, c in s.terms) for s in row) for row in shifts)
    return Losses(tuple(sum(row) / len(row) for row in rows), rows if request.each_sample else ())


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("kind", ["mezo", "mezo-svrg", "groups"])
def test_the_first_step_asks_and_the_others_use_the_answer(kind: str, per_sample: bool, one_sided: bool) -> None:
    settings: dict[str, Any] = {"eps": "auto", "per_sample": per_sample, "one_sided": one_sided, "directions": 2}
    planner: Any
    if kind == "mezo":
        planner = MeZOPlanner(MeZO(**settings), PROBLEM)
    elif kind == "groups":
        planner = GroupedPlanner(MeZO(**settings), PROBLEM, (Group(("a",)), Group(("b",))))
    else:
        planner = SVRGPlanner(MeZOSVRG(**settings), PROBLEM)
    asked: list[Evaluation] = []

    def evaluate(request: Evaluation, number: int) -> Losses:
        asked.append(request)
        return losses_of(request)

    result = run_step(planner, planner.init(), 0, evaluate)
    update = result.update
    assert update is not None
    assert any("algorithm.eps: auto: 0.001 from now on" in note for note in update.notes)
    ladder = asked[1:]
    assert all(request.batch == "minibatch" for request in ladder)
    assert all(len(request.variants) == (3 if one_sided else 4) for request in ladder), "no larger than a step"
    rounds_per_rung = 1 if per_sample else 2
    assert len(ladder) % rounds_per_rung == 0
    assert len(ladder) // rounds_per_rung < len(LADDER), "climbing ended early"
    again = planner.update(planner.init(), 0, result.rounds)
    assert again == update, "what a replay sees"
    asked.clear()
    run_step(planner, update.state, 1, evaluate)
    assert len(asked) == 1, "once"


def test_one_rung_is_no_choice() -> None:
    """Neither in the first step nor where a later one has a second round, to look back at."""
    problem = replace(PROBLEM, eps=5e-2, num_steps=1000, num_train=1000)
    planner = MeZOPlanner(MeZO(eps="auto", lr="auto", directions=4), problem)
    state, numbers = planner.init(), []
    for step in range(10):
        result = run_step(planner, state, step, lambda request, _: replace(losses_of(request), curvature=1.0))
        assert result.update is not None
        assert not result.update.notes
        state = result.update.state
        numbers.append(len(result.rounds))
    assert numbers == [1, 1, 1, 1, 2, 1, 1, 1, 2, 1], "looks back after 4 and 8 steps"
