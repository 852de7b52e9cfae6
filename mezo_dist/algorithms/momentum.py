"""Momentum over directions: a decaying window of past estimates, which stays a combination.

It is a normalised mean over a window of estimates, not the sum over all of them that SGD with momentum steps along:

    step along  sum_j decay^j g_(t-j) / sum_j decay^j,   j = 0 .. window - 1

A learning rate therefore means the same with and without momentum, where SGD's steps are 1 / (1 - decay) as long.
"""

from __future__ import annotations

from dataclasses import dataclass

from mezo_dist.algorithms.ranges import check_ranges, check_types
from mezo_dist.directions.combination import Combination


@dataclass(frozen=True)
class Momentum:
    """Step along a weighted mean of the last estimates. It takes a few scalars of memory for each, and no copy of the
    weights.

    The mean is normalised: learning rates need no change when momentum is switched on.
    """

    decay: float = 0.0
    """Weight of an estimate relative to that of the step after it (0..1); 0 switches momentum off."""
    window: int = 10
    """Estimates that count. An update makes the directions of all of them, so it takes that many times as long."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay: must be at least 0 and below 1, not {self.decay}")
        check_ranges(self, window=(1, 10_000))


@dataclass(frozen=True)
class Past:
    """State of `Momentum`: the last estimates, newest first."""

    estimates: tuple[Combination, ...] = ()

    def with_now(self, estimate: Combination, rule: Momentum) -> tuple[Combination, Past]:
        """What to step along, given this step's ``estimate``, and the state after it."""
        if not rule.decay:
            return estimate, self
        estimates = (estimate, *self.estimates)[: rule.window]
        weights = [rule.decay**age for age in range(len(estimates))]
        terms = (
            (seed, weight / sum(weights) * c)
            for weight, one in zip(weights, estimates, strict=True)
            for seed, c in one.terms
        )
        return Combination.of(terms), Past(estimates)
