"""What looking back makes of the share of the best step that ``lr: auto`` takes."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest

from mezo_dist.algorithms.base import Evaluation, Losses, Problem, Update
from mezo_dist.algorithms.look_back import CHANGE, LEAST, MOST, TRUST, LookBack
from mezo_dist.algorithms.mezo import MeZO, MeZOPlanner
from mezo_dist.algorithms.schedules import Schedule
from mezo_dist.directions.combination import Combination

LONG = Problem(num_steps=1000, batch_size=4, num_train=400)


def after(share: float, *updates: Combination, schedule: float = 1.0) -> LookBack:
    state = LookBack().starting_at(share)
    for update in updates:
        state = state.after_step(update, schedule)
    return state


def test_a_look_compares_the_weights_before_the_steps_with_those_after_them() -> None:
    state = after(0.1, Combination.of([(1, 0.5)]), Combination.of([(1, 0.25), (2, -1.0)]))
    request = state.evaluation()
    assert [variant.shift.terms for variant in request.variants] == [((1, -0.75), (2, 1.0)), ()]
    assert (request.batch, request.pairs[0].ahead, request.pairs[0].behind) == ("minibatch", 1, 0)


def test_the_share_is_what_the_parabola_says_averaged_with_the_one_at_the_start() -> None:
    state = after(0.1, Combination.of([(1, 3.0), (2, -4.0)]))
    # two directions that together are 5 long: 25 times the curvature 0.2 of one is what they are expected to have
    looked = state.after_look(Losses((2.0, 1.0), curvature=4.0), 0.2, 0.1, 1)
    gain = (2.0 - 1.0 + 4.0 / 2) / 5
    assert looked.share == pytest.approx((TRUST * 0.1 + 0.1 * gain) / (TRUST + 4.0 / 5))
    assert (looked.looks, looked.steps, looked.displacement.terms) == (1, 0, ())
    # a step on a schedule took a smaller share, and says how much longer that should have been
    slowed = after(0.1, Combination.of([(1, 3.0), (2, -4.0)]), schedule=0.5)
    half = slowed.after_look(Losses((2.0, 1.0), curvature=4.0), 0.2, 0.1, 1)
    assert half.share == pytest.approx((TRUST * 0.1 + 0.05 * gain) / (TRUST + 4.0 / 5))


def test_one_look_cannot_carry_the_share_away() -> None:
    state = after(0.1, *[Combination.single(k, 1.0) for k in range(8)])
    assert state.after_look(Losses((1e6, 0.0), curvature=8.0), 1.0, 0.1, 1).share == pytest.approx(0.1 * CHANGE)
    at_its_end = after(MOST, Combination.single(1, 1.0))
    assert at_its_end.after_look(Losses((1e6, 0.0), curvature=1.0), 1.0, 0.1, 1).share == MOST
    assert state.after_look(Losses((1.0, 1.0), curvature=0.0), 0.0, 0.1, 1).share == pytest.approx(0.1)  # nothing moved
    with pytest.raises(ValueError, match="without a curvature"):
        state.after_look(Losses((1.0, 1.0)), 1.0, 0.1, 1)


def test_one_look_can_end_what_goes_wrong() -> None:
    state = after(0.4, Combination.single(1, 1.0))
    assert state.after_look(Losses((0.0, 1e6), curvature=1.0), 1.0, 0.1, 1).share == pytest.approx(0.1 * LEAST)


@pytest.mark.parametrize("alignment", [0.0, 0.25, 1.0])
def test_steps_do_not_overshoot_where_gradients_lie_along_what_is_curved_most(alignment: float) -> None:
    """4 steps along 7 directions, each as long as it is: together as curved as the alignment makes them."""
    state = after(0.1, *[Combination.single(k, 1.0) for k in range(4)])
    curved = 4.0 * (1 + 4 * 7 * alignment)
    looked = state.after_look(Losses((1e6, 0.0), curvature=curved), 1.0, 0.1, 7)
    assert looked.alignment == pytest.approx(alignment)
    assert looked.most(7) == pytest.approx(min(MOST, 1 / (1 + 8 * alignment)))
    assert looked.share == pytest.approx(min(0.2, looked.most(7)))
    again = dataclasses.replace(looked, displacement=state.displacement, steps=4)
    assert again.after_look(Losses((1.0, 1.0), curvature=4.0), 1.0, 0.1, 7).alignment == pytest.approx(0.9 * alignment)


def test_many_directions_begin_with_the_step_that_is_safe_for_any_loss() -> None:
    def share(directions: int, **more: Any) -> float:
        planner: Any = MeZOPlanner(MeZO(lr="auto", directions=directions, **more), LONG)
        losses = Losses((1.0,) * 2 * directions, curvature=1.0)
        return planner.update(planner.init(), 0, [losses]).metrics["rate/share"]

    assert share(7) == pytest.approx(0.8 / 1000**0.5)
    assert share(200) == pytest.approx(1 / 202)
    assert share(200, eta=0.1) == 0.1


def looks(settings: MeZO, problem: Problem, steps: int = 40) -> list[int]:
    """At which steps a run looks back."""
    planner, at, random_ = MeZOPlanner(settings, problem), [], random.Random(0)
    state = planner.init()
    for step in range(steps):
        rounds, request = [], planner.plan(state, step)
        while isinstance(request, Evaluation):
            mean = tuple(1 + 0.01 * random_.random() for _ in request.variants)
            rounds.append(Losses(mean, curvature=1.0 if request.pairs else None))
            answer = planner.update(state, step, rounds)
            if isinstance(answer, Update):
                state = answer.state
                break
            request = answer
        if len(rounds) > 1:
            at.append(step)
    return at


def test_when_a_run_looks_back() -> None:
    auto = MeZO(lr="auto", directions=7)
    assert looks(auto, LONG) == [4, 8, 16, 24, 32]
    assert looks(auto, dataclasses.replace(LONG, num_steps=25), 25) == [
        4,
        8,
        16,
    ]  # the last steps have nothing after them
    assert looks(MeZO(lr="auto"), LONG, 40) == [8, 16, 32]  # one direction in a step tells less
    assert looks(dataclasses.replace(auto, eta=0.1), LONG) == []
    assert looks(MeZO(lr=0.1, directions=7), LONG) == []
    assert looks(auto, Problem(num_steps=1000, batch_size=4, num_train=40)) == [4, 8]  # later no sample is new
    assert looks(auto, Problem(num_steps=1000, batch_size=64, num_train=256)) == [4, 8, 16, 24, 32]  # of many
    assert looks(auto, Problem()) == [4, 8, 16, 24, 32]  # neither epochs nor an end are known


def run(share: float | None, curvatures: Any, noise: float, steps: int = 200) -> tuple[float, float]:
    """MeZO on a sum of parabolas whose minima differ between samples: the loss at the end, and the last share.

    Args:
        share: a fixed one; None: what looking back finds.
        curvatures: of the loss along each coordinate.
        noise: how far the minima of samples lie apart.
        steps: of the run.
    """
    dimension, batch, rng = len(curvatures), 4, random.Random(1)
    weights = [1.0] * dimension
    problem = Problem(num_steps=steps, batch_size=batch, num_train=batch * steps)
    planner = MeZOPlanner(
        MeZO(lr="auto", eta=share, eps=0.01, directions=4, one_sided=True, schedule=Schedule("linear")), problem
    )

    def direction(seed: int) -> list[float]:
        one = random.Random(seed)
        return [one.gauss(0, 1) for _ in range(dimension)]

    def moved(terms: Any) -> list[float]:
        total = list(weights)
        for seed, c in terms:
            total = [t + c * z for t, z in zip(total, direction(seed), strict=True)]
        return total

    def loss(point: list[float], minima: list[list[float]]) -> float:
        rows = (sum(h * (x - m) ** 2 for h, x, m in zip(curvatures, point, row, strict=True)) / 2 for row in minima)
        return sum(rows) / len(minima)

    state, found = planner.init(), 0.0
    for step in range(steps):
        minima = [[rng.gauss(0, noise) for _ in range(dimension)] for _ in range(batch)]
        rounds: list[Losses] = []
        answer: Any = planner.plan(state, step)
        while isinstance(answer, Evaluation):
            points = [moved(variant.shift.terms) for variant in answer.variants]
            bends = []
            for pair in answer.pairs:
                ahead, behind = points[pair.ahead], points[pair.behind]
                bends.append(
                    sum(h * ((a - b) / pair.distance) ** 2 for h, a, b in zip(curvatures, ahead, behind, strict=True))
                )
            rounds.append(Losses(tuple(loss(p, minima) for p in points), curvature=sum(bends) / len(bends)))
            answer = planner.update(state, step, rounds)
        state, found = answer.state, answer.metrics["rate/share"]
        weights[:] = moved(answer.combination.terms)
    return loss(weights, [[0.0] * dimension]), found


def test_a_start_that_is_far_off_is_made_good() -> None:
    """A share of 0.8 / sqrt(200) is too careful where samples agree."""
    curvatures = [1.0] * 8 + [0.1] * 8
    adapted, share = run(None, curvatures, 0.0)
    assert share > 2 * 0.8 / 200**0.5
    assert adapted < 0.5 * run(0.8 / 200**0.5, curvatures, 0.0)[0]


def test_where_samples_differ_it_stays_near_the_best_of_fixed_shares() -> None:
    fixed = [run(share, [1.0] * 8, 6.0)[0] for share in (0.02, 0.1)]
    assert run(None, [1.0] * 8, 6.0)[0] < 1.5 * min(fixed)
