"""``lr: auto``: a learning rate that is found from the curvature of the loss along the directions of each step.

A step along the mean of p_k z_k over K directions, at the rate lr, changes the loss by about

    - lr |g|^2  +  lr^2 / (2 K)  |g|^2 tr(H) (1 + r / B)

with gradient g, Hessian H, and r the variance of single samples' gradients over |g|^2, in batches of B. tr(H) is the
mean curvature h = z' H z along directions, so without the noise of samples the best rate is K / h. What is taken is

    lr = eta K / H,     H = max(mean of h over recent steps, RELEASE * H of the step before)

where eta is the share of that step which is left once the noise of samples counts. Noise averages out over a run, the
better the smaller its steps are, and against that stands that a run must get far enough: so the best share falls with
the square root of the number of steps, and is `SHARE` / sqrt(steps) if none is set. The curvature needs no forward pass
beyond those of the step: it is read off what the passes at both ends of a direction say of each sample
(`mezo_dist.objectives.curvature`, `mezo_dist.engines.loss_table`), and stands in the trajectory beside the losses.

With a direction per sample, K is the number of all of them, and samples' noise counts in full: a factor 1 + r in place
of 1 + r / B, of which `SPREAD` stands for r until looking back tells more (`mezo_dist.algorithms.look_back`).

**Objectives that take few values**, metrics and rewards, have no curvature: they are smooth because they are probed at
a distance, and in the mean over samples. What stands for it is the size of a typical slope over eps
(`of_few_values`), so that a typical estimate moves each of a step's directions by eta times eps. That share stays: on a
minibatch, what some steps have changed in such an objective is mostly noise.

**Squared errors** have the mean square of slopes over twice the loss (`mezo_dist.runs.evaluation`): e^2 has the slope
2 e e' along a direction and the curvature 2 e'^2.

The first `WARM_UP` steps are shorter where no schedule warms up: a few directions may miss what is curved most, and
adapters that begin at zero are flat there and nowhere else. H is bounded below by a decayed maximum, for as a model
grows sure of its answers, the curvature of its losses goes to zero, and the rate with it to infinity, much faster than
the weights get away from where they are curved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mezo_dist.algorithms.schedules import Schedule

RECENT = 0.9
"""Weight of the mean of past curvatures against that of a step."""
RELEASE = 0.99
"""What the curvature that counts may fall to within a step, as a part of what it was."""
WARM_UP = 8
"""Steps over which the rate rises to what was found, along a line, unless a schedule has steps for that."""
SHARE = 0.8
"""Times the square root of a run's number of steps, the default share of the best step. Chosen on validation data:
examples/studies/README.md."""
MOST = 0.1
"""The largest default share, that of 64 steps; also where the number of steps is not known."""

SPREAD = 7.0
"""With a direction per sample: the variance of single samples' gradients over the square of their mean that is reckoned
with at the start. No pass tells it; looking back makes good what it is wrong by. Chosen on validation data, among 0, 3,
7 and 15."""

IN_CONFIGS = "in configs"
"""Key of a field's metadata: its value in a config that gives none, where that is not the class's default. Several such
fields of a class go along with each other: beside one that is given the others are the same."""
AUTO_IN_CONFIGS = {IN_CONFIGS: "auto"}
"""Metadata of a learning rate that is ``auto`` unless a config gives a number."""


@dataclass(frozen=True)
class AutoRate:
    """State of ``lr: auto``."""

    mean: float = 0.0
    """Decaying sum of the curvatures of steps."""
    weight: float = 0.0
    """Sum of their weights: ``mean / weight`` is their mean, from the first step on."""
    curvature: float = 0.0
    """The H above."""
    steps: int = 0
    """Steps so far, up to `WARM_UP`."""

    def after(self, curvature: float | None, directions: float = 1.0) -> AutoRate:
        """The state after a step with this mean ``curvature`` along its directions.

        Args:
            curvature: of the step. A large part of it counts at once, so that a loss that becomes steep within few
                steps is not met with the rate of before; a part that the mean over so many directions hardly ever
                reaches by chance.
            directions: their number.

        Raises:
            ValueError: there is none.
        """
        if curvature is None:
            raise ValueError("lr: auto: losses without a curvature")
        mean = RECENT * self.mean + (1 - RECENT) * curvature
        weight = RECENT * self.weight + (1 - RECENT)
        at_once = curvature / (2 + 6 / max(directions, 1.0))
        counts = max(mean / weight, RELEASE * self.curvature, at_once)
        return AutoRate(mean, weight, counts, min(self.steps + 1, WARM_UP))

    @property
    def recent(self) -> float:
        """The mean curvature along a direction, over recent steps."""
        return self.mean / self.weight if self.weight else 0.0

    def rate(self, eta: float, directions: float) -> float:
        """The learning rate; 0 while no loss has changed along any direction.

        Args:
            eta: share of the best step that is taken.
            directions: number of directions that the estimate is the mean of.
        """
        return eta * directions / self.curvature if self.curvature > 0 else 0.0

    def warm_up(self, schedule: Schedule) -> float:
        """The factor on the rate in the first steps; 1 if the rate is not found here, or ``schedule`` warms up."""
        return self.steps / WARM_UP if self.steps and not schedule.warmup_steps else 1.0

    def metrics(self, rate: float, share: float) -> dict[str, float]:
        """What to draw curves of; nothing, if the rate is not found here.

        Args:
            rate: the learning rate, before schedules.
            share: the share of the best step that it takes.
        """
        return {"rate/lr": rate, "rate/curvature": self.curvature, "rate/share": share} if self.steps else {}


def share(eta: float | None, num_steps: int) -> float:
    """The share of the best step that is taken: the setting ``eta``, or that for a run of ``num_steps`` (1: not known).

    >>> share(None, 256), share(None, 1), share(0.2, 256)
    (0.05, 0.1, 0.2)
    """
    if eta is not None:
        return eta
    return min(MOST, SHARE / math.sqrt(num_steps)) if num_steps > 1 else MOST


def equal_directions(directions: int, samples: int) -> float:
    """The number of directions that all samples share, an estimate along which wants the same rate.

    Args:
        directions: per step; with ``samples``, of each of them.
        samples: those that have directions of their own; 0: all share them.
    """
    return directions * samples / (1 + SPREAD) if samples else float(directions)


def of_few_values(projected: Sequence[float], eps: float, directions: int) -> tuple[float, float]:
    """For an objective that takes few values, what stands for the curvature and for the number of directions: the size
    of its differences, and that number in units of eps^2. So a step moves each direction by a share of eps, whatever
    eps was before.

    Args:
        projected: projected gradients.
        eps: size of the perturbation.
        directions: number of all of a step.
    """
    return math.sqrt(math.fsum(p * p for p in projected) / len(projected)) * eps, directions * eps**2


def settle(
    lr: float | Literal["auto"], state: AutoRate, curvature: float | None, eta: float, directions: float
) -> tuple[float, AutoRate]:
    """The learning rate of a step, before schedules, and the state after it.

    Args:
        lr: the setting; a number stays what it is.
        state: before the step.
        curvature: the mean along the directions of the step.
        eta: see `AutoRate.rate`.
        directions: see `AutoRate.rate`.
    """
    if lr != "auto":
        return lr, state
    after = state.after(curvature, directions)
    return after.rate(eta, directions), after


def check_auto_rate(settings: object, *rates: str) -> None:
    """Check ``lr: auto`` against the other settings of an algorithm.

    Args:
        settings: the algorithm's.
        rates: names of its learning rates.

    Raises:
        ValueError: they contradict each other; the message names what to write instead.
    """
    values = [getattr(settings, name) for name in rates]
    if "auto" not in values:
        if settings.eta is not None:  # type: ignore[attr-defined]
            raise ValueError(
                f"algorithm.eta: is a setting of algorithm.{rates[0]}: auto; leave eta out, or write "
                f"{' and '.join(f'{name}: auto' for name in rates)}"
            )
        return
    if any(value != "auto" for value in values):
        found, given = sorted(rates, key=lambda name: getattr(settings, name) != "auto")
        raise ValueError(
            f"algorithm.{found}: auto, but algorithm.{given} is {getattr(settings, given):g}; write both as auto, or "
            "give both a number"
        )
    fix = f"give {'a number' if len(rates) == 1 else 'numbers'} (a config that gives none means auto)"
    for name, (allowed, reason) in _CONFLICTS.items():
        if getattr(settings, name, allowed) != allowed:
            raise ValueError(f"algorithm.{rates[0]}: auto does not go together with algorithm.{name}, {reason}; {fix}")


_CONFLICTS: dict[str, tuple[object, str]] = {
    "scaling": ("plain", "where the learning rate is the length of a step, whatever the curvature"),
    "weight_decay": (0.0, "which takes off a share of the weights that is known with the learning rate alone"),
    "pull": (0.0, "which takes off a share of the way from the base that is known with the learning rate alone"),
}
"""Setting -> its only value with ``lr: auto``, and why."""
