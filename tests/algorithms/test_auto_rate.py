"""``lr: auto``: the rate that a curvature gives, and what it does not go together with."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from mezo_dist.algorithms.auto_rate import RECENT, RELEASE, SPREAD, WARM_UP, AutoRate
from mezo_dist.algorithms.base import Losses, Problem, Update
from mezo_dist.algorithms.mezo import MeZO, MeZOPlanner
from mezo_dist.algorithms.schedules import Annealing, Schedule
from mezo_dist.algorithms.svrg import MeZOSVRG, SVRGPlanner


def test_the_rate_is_a_share_of_directions_over_the_recent_mean_curvature() -> None:
    state = AutoRate().after(4.0)
    assert state.rate(0.1, 8) == pytest.approx(0.1 * 8 / 4)
    state = state.after(8.0)
    mean = (RECENT * 4 + 8) / (RECENT + 1)  # of two steps, the later one with more weight
    assert state.curvature == pytest.approx(mean)
    for _ in range(200):
        state = state.after(8.0)
    assert state.rate(0.1, 8) == pytest.approx(0.1)


def test_the_rate_does_not_run_away_from_a_model_that_grows_sure() -> None:
    """The curvature falls by half in every step, as p (1 - p) does where answers become certain."""
    state, rates = AutoRate(), []
    for step in range(100):
        state = state.after(2.0**-step)
        rates.append(state.rate(0.1, 1))
    growth = [later / earlier for earlier, later in itertools.pairwise(rates)]
    assert max(growth) <= 1 / RELEASE * (1 + 1e-12)
    assert rates[-1] < 0.1 / 2.0**-99 * 1e-20  # where the curvature alone would have it
    assert state.after(16.0).curvature > 1  # up it goes at once


def test_a_loss_that_becomes_steep_at_once_is_not_met_with_the_rate_of_before() -> None:
    state = AutoRate()
    for _ in range(20):
        state = state.after(1.0, 7)
    assert state.after(100.0, 7).curvature == pytest.approx(100 / (2 + 6 / 7))
    assert state.after(2.6, 7).curvature == pytest.approx(
        state.after(2.6, 1).curvature
    )  # by chance: what the mean says


def test_the_default_share_falls_with_the_square_root_of_the_number_of_steps() -> None:
    def rate(num_steps: int, **more: Any) -> float:
        planner: Any = MeZOPlanner(MeZO(lr="auto", **more), Problem(num_steps=num_steps))
        return planner.update(planner.init(), 0, [Losses((1.0, 0.5), curvature=1.0)]).metrics["rate/lr"]

    assert [rate(steps) for steps in (64, 256, 1024)] == pytest.approx([0.1, 0.05, 0.025])
    assert rate(4) == rate(1) == 0.1  # not known in a loop of one's own
    assert rate(1024, eta=0.3) == 0.3


def test_where_no_loss_changes_there_is_no_rate_and_no_step() -> None:
    assert AutoRate().after(0.0).rate(0.1, 4) == 0
    planner: Any = MeZOPlanner(MeZO(lr="auto"), Problem())
    update = planner.update(planner.init(), 0, [Losses((1.0, 1.0), curvature=0.0)])
    assert not update.combination


def planner_of(**more: Any) -> Any:
    return MeZOPlanner(MeZO(lr="auto", eta=0.2, **more), Problem(num_steps=10))


def rates(planner: Any, *rounds: Losses) -> list[float]:
    """The learning rates of a step for each of the losses."""
    state, values = planner.init(), []
    for step, losses in enumerate(rounds):
        update = planner.update(state, step, [losses])
        state = update.state
        values.append(update.metrics["lr"])
    return values


LOSSES = Losses((1.0, 0.5), curvature=4.0)


def test_it_warms_up_unless_a_schedule_does() -> None:
    assert rates(planner_of(), *[LOSSES] * 10) == pytest.approx([0.05 * min(1, n / WARM_UP) for n in range(1, 11)])
    warm = planner_of(schedule=Schedule(warmup_steps=2))
    assert rates(warm, *[LOSSES] * 3) == pytest.approx([0.025, 0.05, 0.05])
    metrics = planner_of().update(planner_of().init(), 0, [LOSSES]).metrics
    assert (metrics["rate/lr"], metrics["rate/curvature"]) == pytest.approx((0.05, 4.0))


def test_annealing_comes_on_top() -> None:
    annealed = planner_of(annealing=Annealing(window=1, divisor=2.0), schedule=Schedule(warmup_steps=1))
    rising = [Losses((2.0**step,) * 2, curvature=4.0) for step in range(6)]
    assert rates(annealed, *rising) == pytest.approx([0.05] * 5 + [0.025])


def test_the_steps_of_an_svrg_cycle_share_the_best_step_along_the_anchor() -> None:
    settings = MeZOSVRG(
        lr="auto", anchor_lr="auto", eta=0.3, q=3, anchor_directions=2, schedule=Schedule(warmup_steps=1)
    )
    anchor = Losses((1.0, 0.9, 1.1, 0.8), curvature=4.0)
    inner = Losses((1.0, 0.9) * 2, curvature=2.0)
    share = 0.3 * 2 / 3
    steps = rates(SVRGPlanner(settings, Problem()), anchor, inner, inner, anchor)
    assert steps == pytest.approx([share / 4, share / 2, share / 2, share / 4])  # each kind by its own curvature


def test_a_direction_per_sample_is_worth_less_than_one_that_all_samples_share() -> None:
    """For the gradients of samples differ: their number is divided by 1 + SPREAD."""
    one_each = MeZO(lr="auto", eta=0.3, per_sample=True, directions=2, schedule=Schedule(warmup_steps=1))
    each = ((1.0,) * 5, (0.5,) * 5) * 2
    losses = Losses((1.0, 0.5) * 2, each, curvature=4.0)
    assert rates(MeZOPlanner(one_each, Problem(batch_size=5)), losses) == pytest.approx([0.3 * 10 / (1 + SPREAD) / 4])
    several = MeZOSVRG(
        lr="auto", anchor_lr="auto", eta=0.3, per_sample=True, anchor_directions=2, schedule=Schedule(warmup_steps=1)
    )
    found = rates(SVRGPlanner(several, Problem(batch_size=5, full_size=5)), losses)
    assert found == pytest.approx([0.3 * 10 / (1 + SPREAD) / 4 / 2])


def test_an_objective_of_few_values_has_the_slope_over_eps_for_a_curvature() -> None:
    """So that an estimate as large as usual moves each direction by the share of eps; no pass more is asked for."""
    settings = MeZO(lr="auto", directions=2, eps=0.5, per_sample=True, schedule=Schedule(warmup_steps=1))
    planner: Any = MeZOPlanner(settings, Problem(num_steps=100, batch_size=2, num_train=400, is_discrete=True))
    state = planner.init()
    assert planner.plan(state, 0).pairs == ()
    for step in range(40):
        update = planner.update(state, step, [Losses((0.5, 0.0) * 2, ((1.0, 0.0), (0.0, 0.0), (0.0, 1.0), (0.0, 0.0)))])
        assert isinstance(update, Update), "looks back"
        state = update.state
    rms = 0.5**0.5
    assert update.metrics["rate/curvature"] == pytest.approx(rms * 0.5)
    assert update.metrics["lr"] == pytest.approx(0.08 * 4 * 0.5 / rms)
    moved = [abs(c) for _, c in update.combination.terms if c]
    assert moved == pytest.approx([0.08 * 0.5 / rms] * 2)
    stays = planner.update(planner.init(), 0, [Losses((0.0, 0.0) * 2, ((0.0, 0.0),) * 4)])
    assert not stays.combination, "nothing changes along any direction"


def test_only_auto_asks_for_curvature() -> None:
    def pairs(settings: Any, planner: Any) -> int:
        algorithm = planner(settings, Problem(eps=1e-3))
        return len(algorithm.plan(algorithm.init(), 0).pairs)

    assert pairs(MeZO(directions=3), MeZOPlanner) == 0
    assert pairs(MeZO(lr="auto", directions=3), MeZOPlanner) == 3
    assert pairs(MeZO(lr="auto", directions=3, one_sided=True), MeZOPlanner) == 3
    assert pairs(MeZOSVRG(), SVRGPlanner) == 0
    assert pairs(MeZOSVRG(lr="auto", anchor_lr="auto"), SVRGPlanner) == 1


def test_a_trajectory_without_curvatures_is_refused_by_the_planner() -> None:
    planner = MeZOPlanner(MeZO(lr="auto"), Problem())
    with pytest.raises(ValueError, match="without a curvature"):
        planner.update(planner.init(), 0, [Losses((1.0, 1.0))])


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (MeZO, {"scaling": "sign"}, "algorithm.lr: auto does not go together with algorithm.scaling"),
        (
            MeZO,
            {"scaling": "normalised", "directions": 4},
            "algorithm.lr: auto does not go together with algorithm.scaling",
        ),
        (MeZO, {"weight_decay": 0.1}, "algorithm.lr: auto does not go together with algorithm.weight_decay"),
        (MeZO, {"pool": 8, "pull": 0.1}, "algorithm.lr: auto does not go together with algorithm.pull"),
        (MeZO, {"eta": 0.0}, "algorithm.eta: must be above 0"),
        (MeZO, {"eta": math.inf}, "algorithm.eta: must be above 0"),
        (MeZO, {"lr": 0.1, "eta": 0.2}, "algorithm.eta: is a setting of algorithm.lr: auto"),
        (
            MeZOSVRG,
            {},
            "algorithm.lr: auto, but algorithm.anchor_lr is 5e-05; write both as auto, or",
        ),
        (MeZOSVRG, {"anchor_lr": "auto", "weight_decay": 0.1}, "does not go together with algorithm.weight_decay"),
    ],
)
def test_what_does_not_go_together_is_said(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**{"lr": "auto", **settings})
