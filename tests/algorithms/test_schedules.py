"""The plateau rule: when it divides learning rates, when it leaves them alone, and what it says."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from mezo_dist.algorithms.base import Algorithm, Evaluation, Losses, Problem, Update
from mezo_dist.algorithms.mezo import MeZO, MeZOPlanner
from mezo_dist.algorithms.schedules import Annealing, Plateau, Schedule
from mezo_dist.algorithms.step import run_step
from mezo_dist.algorithms.svrg import MeZOSVRG, SVRGPlanner
from mezo_dist.algorithms.svrg_released import MeZOSVRGReleased, SVRGReleasedPlanner

BATCH_SIZE, NUM_TRAIN, NUM_STEPS = 16, 256, 500
PROBLEM = Problem(1, NUM_STEPS, BATCH_SIZE, NUM_TRAIN, num_train=NUM_TRAIN)


def plateau_after(losses: list[float], rule: Annealing, window: int = 4) -> Plateau:
    plateau = Plateau()
    for loss in losses:
        plateau = plateau.after(loss, rule, window)
    return plateau


def windows(*means: float) -> list[float]:
    """Four losses around each mean."""
    return [mean + noise for mean in means for noise in (0.25, -0.25, 0.5, -0.5)]


def test_it_compares_a_window_with_the_one_two_before_it_from_the_fifth_on() -> None:
    rule = Annealing(threshold=1.05)
    rising = windows(1.0, 1.0, 2.0, 2.0)
    assert plateau_after(rising, rule).factor == 1.0, "no window decides before the fifth"
    assert plateau_after([*rising, *windows(2.09)], rule).factor == 1.0
    assert plateau_after([*rising, *windows(2.11)], rule).factor == pytest.approx(0.2)
    assert plateau_after([*rising, *windows(2.11)[:-1]], rule).factor == 1.0, "the window is not over"


def test_rates_never_fall_below_the_floor_nor_rise_to_it() -> None:
    losses = [1.1**step for step in range(200)]
    assert plateau_after(losses, Annealing()).factor == 0.01
    assert plateau_after(losses, Annealing(floor=1.0)).factor == 1.0
    assert plateau_after(losses, Annealing(floor=0.0)).factor < 1e-9
    assert Plateau(0.005).after(1.0, Annealing(), 9).factor == 0.005


def test_negative_losses_that_fall_are_no_plateau() -> None:
    """Rewards with their sign turned: -10.2 is less than -10, and not more than 1.05 of it."""
    assert plateau_after([-10 - 0.1 * (step // 4) for step in range(40)], Annealing()).factor == 1.0
    assert plateau_after([-10 + 0.5 * (step // 4) for step in range(40)], Annealing()).factor < 1.0


def test_nothing_is_remembered_where_it_is_off() -> None:
    assert plateau_after([1.0] * 40, Annealing(divisor=1)) == Plateau()


@pytest.mark.parametrize(
    ("window", "every", "expected"), [(None, 1, 16), (None, 2, 8), (None, 5, 4), (None, 40, 1), (9, 1, 9), (9, 2, 5)]
)
def test_a_window_is_an_epoch_of_minibatches_by_default(window: int | None, every: int, expected: int) -> None:
    assert Annealing(window=window).losses_per_window(PROBLEM.epoch, every) == expected


def test_the_length_of_an_epoch() -> None:
    assert Problem(batch_size=16, full_size=64, num_train=1000).epoch == 63, "of all samples, not of a full batch"
    assert Problem().epoch == 8, "where nobody knows it"


@pytest.mark.parametrize("settings", [{"floor": 1.1}, {"floor": -0.1}, {"window": 0}, {"divisor": 0.5}])
def test_what_cannot_be_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}: must be at (least|most) "):
        Annealing(**settings)


class Run:
    """Losses of ``NUM_TRAIN`` samples that differ among one another and follow ``trend``; the weights wander, so that
    even the loss of the full batch is ``noise`` off at any one step."""

    def __init__(self, trend: Callable[[int], float], noise: float, seed: int) -> None:
        self.trend, self.noise, self.draw = trend, noise, random.Random(seed)
        self.samples = [self.draw.lognormvariate(0, 0.8) for _ in range(NUM_TRAIN)]
        self.notes: list[tuple[int, str]] = []
        self.factors = [1.0]

    def losses(self, step: int, batch: str) -> float:
        start = step * BATCH_SIZE % NUM_TRAIN
        if start == 0:
            self.draw.shuffle(self.samples)
        some = self.samples if batch == "full" else self.samples[start : start + BATCH_SIZE]
        return self.trend(step) * math.exp(self.noise * self.draw.gauss(0, 1)) * sum(some) / len(some)

    def factor(self, planner: Algorithm[Any]) -> float:
        """The factor on the learning rates at the end."""
        state = planner.init()
        for step in range(NUM_STEPS):

            def evaluate(request: Evaluation, _: int, step: int = step) -> Losses:
                loss = self.losses(step, request.batch)
                return Losses((loss,) * len(request.variants))

            update = run_step(planner, state, step, evaluate).update
            assert update is not None
            state = update.state
            self.notes += [(step, text) for text in update.notes]
            self.factors.append(update.metrics["annealing/factor"])
        return self.factors[-1]


def falling(step: int) -> float:
    return math.exp(-1.2 * step / NUM_STEPS)


PLANNERS: dict[str, Algorithm[Any]] = {
    "mezo-svrg": SVRGPlanner(MeZOSVRG(), PROBLEM),
    "mezo": MeZOPlanner(MeZO(annealing=Annealing()), PROBLEM),
}


@pytest.mark.parametrize("name", PLANNERS)
def test_a_noisy_loss_that_falls_keeps_its_learning_rate(name: str) -> None:
    assert min(Run(falling, 0.05, seed).factor(PLANNERS[name]) for seed in range(10)) >= 0.2


def test_short_windows_of_minibatches_took_that_noise_for_a_plateau() -> None:
    """So the run above is noisy enough to tell one rule from the other."""
    planner = MeZOPlanner(MeZO(annealing=Annealing(window=8, floor=0.0)), PROBLEM)
    factors = sorted(Run(falling, 0.05, seed).factor(planner) for seed in range(10))
    assert factors[5] < 0.2


@pytest.mark.parametrize("name", PLANNERS)
def test_a_loss_that_has_stopped_falling_divides_it_and_says_so(name: str) -> None:
    run = Run(lambda step: falling(min(step, 150)) * (1 + max(0, step - 150) / 250), 0.05, 0)
    assert 0.01 <= run.factor(PLANNERS[name]) < 1.0
    divisions = [step for step, (a, b) in enumerate(zip(run.factors, run.factors[1:], strict=False)) if a != b]
    assert divisions
    assert [step for step, _ in run.notes] == divisions
    assert min(divisions) > 150
    assert run.notes[0][1].startswith("the training loss has stopped falling: learning rates are 0.2 of what they were")


def after_steps(planner: Algorithm[Any], losses: Sequence[float]) -> list[Update[Any]]:
    """The updates of steps that have these losses, whatever they evaluate."""
    state, updates = planner.init(), []
    for step, loss in enumerate(losses):

        def evaluate(request: Evaluation, _: int, loss: float = loss) -> Losses:
            return Losses((loss,) * len(request.variants))

        update = run_step(planner, state, step, evaluate).update
        assert update is not None
        updates.append(update)
        state = update.state
    return updates


def test_svrg_counts_full_batches_alone() -> None:
    """Minibatch losses that rise mean nothing beside full-batch losses that fall."""
    losses = [float(step) if step % 2 else 1 / (1 + step) for step in range(200)]
    assert after_steps(PLANNERS["mezo-svrg"], losses)[-1].metrics["annealing/factor"] == 1.0
    assert after_steps(PLANNERS["mezo-svrg"], [*losses[1:], 0.0])[-1].metrics["annealing/factor"] < 1.0


def test_the_released_rule_has_the_released_window_and_says_what_it_does() -> None:
    planner = SVRGReleasedPlanner(MeZOSVRGReleased(lr=0.5, anchor_lr=0.1), PROBLEM)
    updates = after_steps(planner, [1.1**step for step in range(100)])
    notes = {step: text for step, update in enumerate(updates) for text in update.notes}
    assert list(notes) == [80, 96], "before the first step of the sixth epoch of 16 steps, and of the seventh"
    assert notes[80] == "the training loss has stopped falling: lr is 0.1 from now on, anchor_lr 0.02"


@pytest.mark.parametrize(
    ("schedule", "smallest"),
    [(Schedule(), 1.0), (Schedule(warmup_steps=4), 0.25), (Schedule("cosine", final=0.1), 0.1)],
)
def test_the_smallest_factor_of_a_schedule(schedule: Schedule, smallest: float) -> None:
    assert schedule.smallest() == smallest == min(schedule.factor(step, 50) for step in range(50))
