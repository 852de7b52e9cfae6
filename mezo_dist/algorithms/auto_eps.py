"""``eps: auto``: the size of the perturbation, chosen by what the first step's minibatch says of each rung of a ladder.

Two things make a projected gradient p(eps) wrong. Losses are rounded, which shifts p by N / eps; and the loss bends,
which shifts it by B eps^2 (its third derivative; for one-sided estimates by B eps, its second one). Along the same
directions p(eps) would be the same for every eps but for these, so neighbouring rungs a < b differ by D, with

    D^2 = N^2 (1 / a^2 + 1 / b^2) + B^2 (b^m - a^m)^2,      m = 2, or 1 if one-sided, as a mean over directions

N and B are those that fit the D of all pairs best, each to its own scale. They are looked for among what single pairs
say if they were all noise, or all bend: some pair mostly is. The rung of the smallest N^2 / eps^2 + B^2 eps^2m is
chosen. A loss that takes few values (accuracy, rewards) is rounded very coarsely, and gets a large eps by the same
rule; a rung counts only if most of its differences are not zero.

The passes are further rounds of the first step, which takes the smallest rung itself. They are as large as rounds of
any step, their losses stand in the trajectory, and the choice follows from them: resumed and replayed runs, and all
ranks, come to the same one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from mezo_dist.algorithms.base import Evaluation, Losses, Problem
from mezo_dist.algorithms.spsa import Probe, zero_share
from mezo_dist.directions.seeds import derive_seed

LADDER = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)
"""What ``eps: auto`` chooses from."""
DIRECTIONS = 4
"""Projected gradients that a rung is judged by, at least."""
TOO_BENT = 0.3
"""Rungs are climbed until neighbours differ by more than this part of p, and by far more than those before."""
LEAST = 1e-9
"""A part of p that no pair of rungs agrees better than."""
TOO_WRONG = 0.5
"""A relative error of p that people are warned of."""


@dataclass(frozen=True)
class Choice:
    """What came out, and why."""

    eps: float
    noise: float
    """What rounding of losses makes of p, relative to p."""
    bend: float
    """What the bend of the loss does to it."""
    is_flat: bool = False
    """Most differences of losses are zero at every rung."""

    @property
    def note(self) -> str:
        """For the log."""
        if self.is_flat:
            return (
                f"algorithm.eps: auto: {self.eps:g}, but at every eps that was tried most differences of losses are "
                "zero; give a larger number for algorithm.eps, or take a larger train.batch_size"
            )
        why = (
            f"rounding of losses makes projected gradients wrong by {self.noise:.2g} of their size, the bend of the "
            f"loss by {self.bend:.2g}"
        )
        if math.hypot(self.noise, self.bend) > TOO_WRONG:
            why += "; no eps has both in hand: take a larger train.batch_size, or model.compute: float32 if it is not"
        return f"algorithm.eps: auto: {self.eps:g} from now on, where {why}"


@dataclass(frozen=True)
class Ladder:
    """The rungs, and the probes of each.

    Args:
        probes: one round after another along other directions; their eps does not count.
        sizes: the rungs, smallest first.
    """

    probes: tuple[Probe, ...]
    sizes: tuple[float, ...]

    @staticmethod
    def of(problem: Problem, smallest: float, directions: int, *, per_sample: bool, one_sided: bool) -> Ladder:
        """The rungs of a run that rounding of weights leaves.

        Args:
            problem: the run's seed, and its batch size.
            smallest: the first rung.
            directions: of a step (with ``per_sample``, per sample).
            per_sample: see `Probe`.
            one_sided: see `Probe`.
        """
        samples = problem.batch_size if per_sample else 0
        number = directions * max(samples, 1)
        seeds = [
            tuple(derive_seed(problem.seed, "eps", round_, k) for k in range(number))
            for round_ in range(math.ceil(DIRECTIONS / number))
        ]
        probes = tuple(Probe(some, smallest, per_sample=samples, one_sided=one_sided) for some in seeds)
        return Ladder(probes, (smallest, *(size for size in LADDER if size > smallest)))

    def next(self, rounds: Sequence[Losses]) -> Evaluation | None:
        """The round after these; None if they are enough."""
        rung, place = divmod(len(rounds), len(self.probes))
        if place == 0 and (rung == len(self.sizes) or is_too_bent(self._rows(rounds))):
            return None
        return replace(self.probes[place], eps=self.sizes[rung]).evaluation()

    def choice(self, rounds: Sequence[Losses]) -> Choice:
        """What follows from all rounds."""
        rows = self._rows(rounds)
        return choose_eps(self.sizes[: len(rows)], rows, one_sided=self.probes[0].one_sided)

    def _rows(self, rounds: Sequence[Losses]) -> list[list[float]]:
        """The projected gradients of each rung."""
        rows: list[list[float]] = []
        for number, losses in enumerate(rounds):
            rung, place = divmod(number, len(self.probes))
            (projected,) = replace(self.probes[place], eps=self.sizes[rung]).projected(losses)
            rows[rung:] = [[*(rows[rung] if place else ()), *projected]]
        return rows


class Settings(Protocol):
    """Of an algorithm, what matters here."""

    @property
    def eps(self) -> float | Literal["auto"]: ...
    @property
    def directions(self) -> int: ...
    @property
    def per_sample(self) -> bool: ...
    @property
    def one_sided(self) -> bool: ...


def chosen_eps(
    settings: Settings, problem: Problem, before: float, rounds: Sequence[Losses]
) -> Evaluation | Choice | None:
    """The choice, in the first step; or the round that it still needs. None: there is nothing to choose.

    Args:
        settings: of the algorithm.
        problem: what is known of the run.
        before: what was chosen in a step before; 0: nothing.
        rounds: losses of the step so far, of its own evaluation first.
    """
    if settings.eps != "auto" or before:
        return None
    smallest = problem.perturbation(settings.eps)
    ladder = Ladder.of(
        problem, smallest, settings.directions, per_sample=settings.per_sample, one_sided=settings.one_sided
    )
    if len(ladder.sizes) == 1:
        return None
    more = ladder.next(rounds[1:])
    return ladder.choice(rounds[1:]) if more is None else more


def choose_eps(sizes: Sequence[float], rows: Sequence[Sequence[float]], *, one_sided: bool) -> Choice:
    """The rung at which the projected gradients are least wrong.

    Args:
        sizes: values of eps, smallest first.
        rows: for each, the projected gradients along the same directions.
        one_sided: they are one-sided.
    """
    zeros = [zero_share(row) for row in rows]
    kept = [(size, row) for size, row, share in zip(sizes, rows, zeros, strict=True) if share <= 0.5]
    if not kept:
        largest = max(size for size, share in zip(sizes, zeros, strict=True) if share == min(zeros))
        return Choice(largest, math.inf, math.inf, is_flat=True)
    if len(kept) == 1:  # it was the last one
        return Choice(kept[0][0], math.inf, 0.0)
    noise, bend = _fitted(kept, one_sided=one_sided)
    parts = [(noise / size**2, bend * (size if one_sided else size * size) ** 2) for size, _ in kept]
    place = min(range(len(kept)), key=lambda k: sum(parts[k]))
    (best, row), (by_noise, by_bend) = kept[place], parts[place]
    length = math.sqrt(_mean_square(row)) or math.inf
    return Choice(best, math.sqrt(by_noise) / length, math.sqrt(by_bend) / length)


def _fitted(kept: Sequence[tuple[float, Sequence[float]]], *, one_sided: bool) -> tuple[float, float]:
    """N^2 and B^2. No logarithm decides, whose last bits are other ones on other machines.

    Args:
        kept: eps and projected gradients of each rung.
        one_sided: see `choose_eps`.
    """
    pairs = []  # D^2, and what N^2 and B^2 are multiplied by in it
    for (a, lower), (b, upper) in itertools.pairwise(kept):
        difference = _mean_square([q - p for p, q in zip(lower, upper, strict=True)])
        least = LEAST**2 * _mean_square(upper)
        pairs.append((max(difference, least), 1 / a**2 + 1 / b**2, ((b - a) if one_sided else (b * b - a * a)) ** 2))
    noises, bends = [0.0, *(d / x for d, x, _ in pairs)], [0.0, *(d / y for d, _, y in pairs)]

    def misfit(both: tuple[float, float]) -> float:
        expected = [both[0] * x + both[1] * y for _, x, y in pairs]
        return sum(d / e + e / d for (d, _, _), e in zip(pairs, expected, strict=True))

    return min(list(itertools.product(noises, bends))[1:], key=misfit)


def is_too_bent(rows: Sequence[Sequence[float]]) -> bool:
    """Whether larger rungs are not worth a look, by the projected gradients of the rungs so far."""
    if len(rows) < 3:
        return False
    before, now = (
        _mean_square([q - p for p, q in zip(lower, upper, strict=True)])
        for lower, upper in ((rows[-3], rows[-2]), (rows[-2], rows[-1]))
    )
    return now > 2 * before and now > TOO_BENT**2 * _mean_square(rows[-1]) and zero_share(rows[-3]) <= 0.5


def _mean_square(values: Sequence[float]) -> float:
    return sum(value * value for value in values) / len(values)
