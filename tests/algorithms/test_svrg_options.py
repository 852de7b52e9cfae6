"""What each option of MeZO-SVRG does to the numbers, worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mezo_dist.algorithms.base import Losses, Problem, Variant
from mezo_dist.algorithms.momentum import Momentum
from mezo_dist.algorithms.svrg import MeZOSVRG, SVRGPlanner, SVRGState
from mezo_dist.directions.combination import ZERO, Combination

PROBLEM = Problem(seed=1, num_steps=10, batch_size=2, full_size=4)
SEEDS = [PROBLEM.direction_seed(0, k) for k in range(4)]


def test_svrg_has_several_directions_per_sample_in_both_kinds_of_step() -> None:
    config = MeZOSVRG(eps=0.5, q=2, per_sample=True, directions=3, anchor_directions=2)
    planner: Any = SVRGPlanner(config, replace(PROBLEM, batch_size=2, full_size=5))
    shapes = []
    for state in (SVRGState(), SVRGState(0, Combination.single(9, 1.0), Combination.single(9, -3.0))):
        plan = planner.plan(state, 1)
        shapes.append((len(plan.variants), {len(v.per_sample) for v in plan.variants}))
        assert len({s for v in plan.variants for s in v.per_sample}) == 2 * 2 * (5 if state.anchor_step < 0 else 3)
    assert shapes == [(2 * 2, {5}), (2 * 2 * 3, {2})]


def test_svrg_with_several_directions_averages_differences() -> None:
    config = MeZOSVRG(lr=1.0, anchor_lr=0.1, eps=0.5, q=3, directions=2, clip=2.5)
    planner: Any = SVRGPlanner(config, PROBLEM)
    state = planner.update(planner.init(), 0, [Losses((3.0, 1.0))]).state
    plan = planner.plan(state, 1)
    z1, z2 = (PROBLEM.direction_seed(1, k) for k in range(2))
    shifts = [Combination.single(z, step) for z in (z1, z2) for step in (0.5, -0.5)]
    assert [v.shift for v in plan.variants] == [*shifts, *(shift - state.displacement for shift in shifts)]
    losses = Losses((5.0, 1.0, 2.0, 1.0, 2.0, 1.0, 1.0, 2.0))  # here 4 and 1, at the anchor 1 and -1
    done = planner.update(state, 1, [losses])
    assert done.combination == Combination.of([(z1, -2.5 / 2), (z2, -2.0 / 2), (SEEDS[0], -2.0)])


def test_svrg_one_sided_probes_both_points_themselves() -> None:
    planner: Any = SVRGPlanner(MeZOSVRG(eps=0.5, q=2, one_sided=True), PROBLEM)
    state = SVRGState(0, Combination.single(9, 1.0), Combination.single(9, -3.0))
    z = PROBLEM.direction_seed(1)
    shifts = [v.shift for v in planner.plan(state, 1).variants]
    assert shifts == [
        Combination.single(z, 0.5),
        ZERO,
        Combination.of([(z, 0.5), (9, 3.0)]),
        Combination.single(9, 3.0),
    ]
    done = planner.update(state, 1, [Losses((2.0, 1.0, 4.0, 3.5))])
    assert done.metrics["projected_difference"] == 2.0 - 1.0


def test_svrg_with_a_stored_anchor_probes_a_copy() -> None:
    planner: Any = SVRGPlanner(MeZOSVRG(eps=0.5, q=2, anchor="stored"), PROBLEM)
    first = planner.update(planner.init(), 0, [Losses((3.0, 1.0))])
    assert first.copies_anchor
    z = PROBLEM.direction_seed(1)
    around = [Combination.single(z, step) for step in (0.5, -0.5)]
    assert planner.plan(first.state, 1).variants == (*map(Variant, around), *(Variant(s, (), "anchor") for s in around))
    second = planner.update(first.state, 1, [Losses((5.0, 1.0, 3.0, 2.0))])
    replayed: Any = SVRGPlanner(MeZOSVRG(eps=0.5, q=2), PROBLEM)
    assert second.combination == replayed.update(first.state, 1, [Losses((5.0, 1.0, 3.0, 2.0))]).combination
    assert not second.copies_anchor
    assert second.state.displacement == ZERO


@pytest.mark.parametrize(
    ("settings", "problem", "stored"),
    [
        ({"q": 9}, {}, False),  # before the next anchor, the displacement has 8 directions
        ({"q": 10}, {}, True),
        ({"q": 3, "directions": 4, "anchor_directions": 4}, {}, False),
        ({"q": 3, "directions": 4, "anchor_directions": 5}, {}, True),
        ({"q": 2, "per_sample": True}, {"full_size": 8}, False),
        ({"q": 3, "per_sample": True}, {"full_size": 8}, True),
        ({"q": 2, "per_sample": True, "anchor_directions": 2}, {"full_size": 8}, True),
        ({"q": 2}, {"has_16bit_weights": True}, True),
        ({"q": 1}, {"has_16bit_weights": True}, False),
        ({"q": 5, "momentum": Momentum(0.5, 10)}, {}, True),
    ],
)
def test_auto_stores_what_is_long_or_rounded(settings: dict[str, Any], problem: dict[str, Any], stored: bool) -> None:
    planner: Any = SVRGPlanner(MeZOSVRG(anchor="auto", **settings), replace(PROBLEM, **problem))
    number = len(planner.plan(planner.init(), 0).variants)
    losses = Losses((1.0,) * number, ((1.0,) * planner.problem.full_size,) * number)
    assert planner.update(planner.init(), 0, [losses]).copies_anchor is stored


def test_svrg_stores_anchors_of_16_bit_weights_unless_told_otherwise() -> None:
    for settings, stored in ((MeZOSVRG(), True), (MeZOSVRG(anchor="replay"), False)):
        planner: Any = SVRGPlanner(settings, replace(PROBLEM, has_16bit_weights=True))
        assert planner.update(planner.init(), 0, [Losses((1.0, 1.0))]).copies_anchor is stored
    default: Any = SVRGPlanner(MeZOSVRG(), PROBLEM)
    assert not default.update(SVRGState(), 0, [Losses((1.0, 1.0))]).copies_anchor
