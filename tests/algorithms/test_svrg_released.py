"""The released code of MeZO-SVRG: its three steps in one and its annealing, worked out by hand."""

from __future__ import annotations

import pytest

from mezo_dist.algorithms.base import Evaluation, Losses, Problem, Update
from mezo_dist.algorithms.schedules import Annealing
from mezo_dist.algorithms.svrg_released import MeZOSVRGReleased, SVRGReleasedPlanner, SVRGReleasedState
from mezo_dist.directions.combination import Combination

PROBLEM = Problem(seed=1, num_steps=10, batch_size=2, full_size=4)
SEEDS = [PROBLEM.direction_seed(0, k) for k in range(4)]
RELEASED = SVRGReleasedPlanner(MeZOSVRGReleased(lr=0.5, anchor_lr=0.1, eps=0.5, annealing=Annealing(5.0, 2)), PROBLEM)


def test_the_released_code_takes_three_steps_for_one_and_never_leaves_for_the_anchor() -> None:
    state = RELEASED.update(RELEASED.init(), 0, [Losses((3.0, 1.0))])
    assert isinstance(state, Update)
    z1, z2 = (PROBLEM.direction_seed(1, k) for k in range(2))
    first = RELEASED.plan(state.state, 1)
    assert [v.shift for v in first.variants] == [Combination.single(z1, 0.5), Combination.single(z1, -0.5)]
    rounds = [Losses((4.0, 1.0))]  # 3
    second = RELEASED.update(state.state, 1, rounds)
    assert isinstance(second, Evaluation)
    moved = Combination.single(z1, -1.5)
    assert [v.shift for v in second.variants] == [moved + Combination.single(z2, step) for step in (0.5, -0.5)]
    done = RELEASED.update(state.state, 1, [*rounds, Losses((2.0, 1.0))])
    assert isinstance(done, Update)
    assert done.combination == moved + Combination.of([(z2, 0.5), (SEEDS[0], -0.5 * 2)])


def test_the_released_annealing_raises_small_rates() -> None:
    state = SVRGReleasedState(lr=1e-8, anchor_lr=0.1, losses=(1.0, 1.0, 1.0, 1.0, 2.0, 2.0))
    for step, expected in ((8, (1e-8, 0.1)), (9, (1e-8, 0.1)), (10, (1e-6, 0.02))):
        planned = RELEASED.update(state, step, [Losses((1.0, 1.0)), Losses((1.0, 1.0))])
        assert isinstance(planned, Update)
        assert (planned.state.lr, planned.state.anchor_lr) == pytest.approx(expected), step
