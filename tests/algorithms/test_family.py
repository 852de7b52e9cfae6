"""What each option that the algorithms share does to the numbers, worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from mezo_dist.algorithms.base import Losses, Problem, Update, Variant
from mezo_dist.algorithms.mezo import MeZO, MeZOPlanner, MeZOState
from mezo_dist.algorithms.momentum import Momentum, Past
from mezo_dist.algorithms.schedules import Schedule
from mezo_dist.algorithms.svrg import MeZOSVRG, SVRGPlanner
from mezo_dist.directions.combination import ZERO, Combination
from mezo_dist.errors import UserError

PROBLEM = Problem(seed=1, num_steps=10, batch_size=2, full_size=4)


SEEDS = [PROBLEM.direction_seed(0, k) for k in range(4)]


def mezo(**settings: Any) -> Any:
    return MeZOPlanner(MeZO(lr=1.0, eps=0.5, **settings), PROBLEM)


def update(planner: Any, *losses: float, state: MeZOState | None = None) -> Update[Any]:
    return planner.update(state or planner.init(), 0, [Losses(losses)])


def test_one_sided_estimates_share_one_evaluation_of_the_weights() -> None:
    planner = mezo(directions=2, one_sided=True)
    plan = planner.plan(planner.init(), 0)
    assert plan.variants == (*(Variant(Combination.single(seed, 0.5)) for seed in SEEDS[:2]), Variant())
    done = update(planner, 3.0, 1.5, 2.0)  # slopes 2 and -1, of each half
    assert done.combination == Combination.of([(SEEDS[0], -1.0), (SEEDS[1], 0.5)])
    assert done.metrics["loss"] == 2.0


def test_several_directions_per_sample_average_over_samples_and_directions() -> None:
    planner = MeZOPlanner(MeZO(lr=1.0, eps=0.5, per_sample=True, directions=2), replace(PROBLEM, batch_size=2))
    rows = (SEEDS[:2], SEEDS[2:4])  # a first direction of both samples, then a second one
    plan = planner.plan(planner.init(), 0)
    assert plan.each_sample
    assert [v.per_sample for v in plan.variants] == [
        tuple(Combination.single(seed, eps) for seed in row) for row in rows for eps in (0.5, -0.5)
    ]
    each = ((3.0, 0.0), (1.0, 1.0), (1.0, 5.0), (1.0, 1.0))  # slopes 2 and -1 along the first, 0 and 4 along the second
    done = planner.update(planner.init(), 0, [Losses((1.5, 1.0, 3.0, 1.0), each)])
    assert isinstance(done, Update)
    assert done.combination == Combination.of([(SEEDS[0], -0.5), (SEEDS[1], 0.25), (SEEDS[3], -1.0)])


def test_one_sided_per_sample_compares_each_sample_with_itself() -> None:
    config = MeZO(lr=1.0, eps=0.5, per_sample=True, directions=2, one_sided=True)
    planner = MeZOPlanner(config, replace(PROBLEM, batch_size=2))
    plan = planner.plan(planner.init(), 0)
    assert len(plan.variants) == 3
    assert plan.variants[-1] == Variant()
    done = planner.update(planner.init(), 0, [Losses((2.0, 2.0, 1.5), ((3.0, 1.0), (2.0, 2.0), (2.0, 1.0)))])
    assert isinstance(done, Update)
    assert done.combination == Combination.of([(SEEDS[0], -0.5), (SEEDS[3], -0.5)])
    assert done.metrics["loss"] == 1.5


def test_sign() -> None:
    done = update(mezo(directions=3, scaling="sign"), 3.0, 1.0, 1.0, 1.5, 2.0, 2.0)
    assert done.combination == Combination.of([(SEEDS[0], -1 / 3), (SEEDS[1], 1 / 3)])


def test_normalised_by_the_standard_deviation_of_one_sided_losses() -> None:
    planner = mezo(directions=3, one_sided=True, scaling="normalised")
    done = update(planner, 1.0, 2.0, 6.0, 2.0)  # slopes -2, 0, 8: mean 2, deviation sqrt((16 + 4 + 36) / 2)
    deviation = math.sqrt(28)
    assert done.combination == Combination.of([(SEEDS[0], 2 / 3 / deviation), (SEEDS[2], -8 / 3 / deviation)])


def test_normalised_steps_are_as_long_whatever_the_loss_is_multiplied_by() -> None:
    planner = mezo(directions=2, scaling="normalised")
    losses = (3.0, 1.0, 0.5, 1.5)
    assert update(planner, *losses).combination == update(planner, *(64 * loss for loss in losses)).combination


def test_clip_cuts_single_projected_gradients() -> None:
    done = update(mezo(directions=2, clip=1.5), 3.0, 1.0, 1.0, 2.0)  # 2 and -1
    assert done.combination == Combination.of([(SEEDS[0], -0.75), (SEEDS[1], 0.5)])
    assert done.metrics["projected_gradient"] == pytest.approx(math.sqrt(2.5)), "what is shown is what was measured"


def test_momentum_is_a_weighted_mean_of_the_last_estimates() -> None:
    rule, past = Momentum(decay=0.5, window=2), Past()
    a, b, c = (Combination.single(seed, 4.0) for seed in (1, 2, 3))
    first, past = past.with_now(a, rule)
    second, past = past.with_now(b, rule)
    third, past = past.with_now(c, rule)
    assert first == a
    assert second == Combination.of([(2, 4 * 2 / 3), (1, 4 / 3)])
    assert third == Combination.of([(3, 4 * 2 / 3), (2, 4 / 3)]), "the oldest has left the window"


def test_without_momentum_nothing_is_remembered() -> None:
    assert Past().with_now(Combination.single(1, 0.3), Momentum()) == (Combination.single(1, 0.3), Past())


def test_a_pool_holds_all_directions() -> None:
    planner = mezo(directions=2, pool=5)
    drawn = [
        seed for step in range(50) for v in planner.plan(planner.init(), step).variants for seed, _ in v.shift.terms
    ]
    assert len(set(drawn)) == 5
    assert drawn[:4] != drawn[4:8]


def test_pull_takes_off_a_part_of_the_way_from_the_base() -> None:
    planner = MeZOPlanner(MeZO(lr=0.5, eps=0.5, pool=100, pull=0.25), PROBLEM)
    way = Combination.of([(5, 8.0), (6, -16.0)])
    done = update(planner, 1.0, 1.0, state=MeZOState(total=way))
    assert done.combination == -0.125 * way
    assert done.state.total == 0.875 * way


def test_the_total_is_the_sum_of_all_updates() -> None:
    planner: Any = MeZOPlanner(MeZO(lr=0.5, eps=0.5, pool=4, pull=0.25), PROBLEM)
    state, total = planner.init(), ZERO
    for step in range(9):
        done = planner.update(state, step, [Losses((1.0 + step, 0.5))])
        state, total = done.state, total + done.combination
    assert state.total == total
    assert 0 < len(total) <= 4


def test_eps_follows_its_schedule() -> None:
    planner = mezo(eps_schedule=Schedule("linear", final=0.1))
    sizes = [abs(planner.plan(planner.init(), step).variants[0].shift.terms[0][1]) for step in (0, 9)]
    assert sizes == pytest.approx([0.5, 0.05])
    last = planner.update(planner.init(), 9, [Losses((3.0, 1.0))])
    assert last.metrics["projected_gradient"] == pytest.approx(2 / (2 * 0.05))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip": 0.0}, "algorithm.clip: must be above 0"),
        ({"pool": 0}, "algorithm.pool: must be at least 1"),
        ({"pull": 0.1}, "algorithm.pull: .*needs algorithm.pool"),
        ({"weight_decay": -1.0}, "algorithm.weight_decay: must be at least 0"),
        ({"lr": 0.5, "weight_decay": 2.0}, "algorithm.weight_decay: .*below 1 / algorithm.lr"),
        ({"pool": 4, "pull": 0.1, "weight_decay": 0.1}, "algorithm.weight_decay: does not go together with pull"),
        ({"one_sided": True, "scaling": "normalised"}, "algorithm.directions: must be at least 2"),
        ({"eps_schedule": Schedule("linear")}, "algorithm.eps_schedule.final: must be above 0"),
    ],
)
def test_contradictions_name_the_setting(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeZO(**settings)


@pytest.mark.parametrize(
    "planner",
    [MeZOPlanner(MeZO(eps="auto"), PROBLEM), SVRGPlanner(MeZOSVRG(eps="auto"), PROBLEM)],
    ids=["mezo", "svrg"],
)
def test_a_chosen_eps_is_used_and_a_missing_one_is_named(planner: Any) -> None:
    chosen = replace(planner, problem=replace(PROBLEM, eps=0.25))
    assert {abs(c) for v in chosen.plan(chosen.init(), 0).variants for _, c in v.shift.terms} == {0.25}
    with pytest.raises(UserError, match=r"algorithm\.eps: auto is chosen when a run begins"):
        planner.plan(planner.init(), 0)


@pytest.mark.parametrize("settings", [{"decay": 1.0}, {"decay": -0.1}, {"window": 0}])
def test_momentum_that_never_forgets_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^(decay|window): must be at least"):
        Momentum(**settings)
