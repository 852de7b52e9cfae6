"""The estimates that all algorithms share (SPSA, Spall 1992), along one direction per batch or per sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mezo_dist.algorithms.base import Batch, Evaluation, Losses, Pair, Variant
from mezo_dist.directions.combination import Combination


@dataclass(frozen=True)
class Probe:
    """Estimates of the slope of one batch's loss along ``seeds``: at the current weights, and at other ``bases``.

    Args:
        seeds: one direction after another for the whole batch; or, with ``per_sample``, one for each sample, then
            perhaps a second one for each sample, and so on.
        eps: size of the perturbation.
        batch: which batch.
        per_sample: if not 0, each of so many samples has directions of its own; for all of them together that takes no
            more forward passes than for one.
        one_sided: n directions take n + 1 forward passes, (L(w + eps z) - L(w)) / eps, instead of 2 n.
        bases: points to probe at.
        curvature: the mean curvature along the directions is wanted, at the first of the bases.
    """

    seeds: tuple[int, ...]
    eps: float
    batch: Batch = "minibatch"
    per_sample: int = 0
    one_sided: bool = False
    bases: tuple[Variant, ...] = (Variant(),)
    curvature: bool = False

    def evaluation(self) -> Evaluation:
        """The round of forward passes: for every base and direction the variants + and -; one-sided, all + and then
        the base itself."""
        return Evaluation(
            tuple(v for base in self.bases for v in self._variants(base)),
            self.batch,
            each_sample=self.per_sample > 0,
            pairs=self._pairs() if self.curvature else (),
        )

    def _pairs(self) -> tuple[Pair, ...]:
        """The ends of every direction at the first base, by their places among the variants."""
        number = len(self.seeds) // max(self.per_sample, 1)
        if self.one_sided:
            return tuple(Pair(k, number, self.eps) for k in range(number))
        return tuple(Pair(2 * k, 2 * k + 1, 2 * self.eps) for k in range(number))

    def _variants(self, base: Variant) -> list[Variant]:
        steps = (self.eps,) if self.one_sided else (self.eps, -self.eps)
        if self.per_sample:
            rows = [self.seeds[i : i + self.per_sample] for i in range(0, len(self.seeds), self.per_sample)]
            shifts = [tuple(Combination.single(seed, step) for seed in row) for row in rows for step in steps]
            moved = [replace(base, per_sample=of_samples) for of_samples in shifts]
        else:
            moved = [base.moved(Combination.single(seed, step)) for seed in self.seeds for step in steps]
        return [*moved, base] if self.one_sided else moved

    def projected(self, losses: Losses) -> list[list[float]]:
        """The projected gradients: for each base, one per direction."""
        rows = losses.each if self.per_sample else tuple((mean,) for mean in losses.mean)
        per_base = len(rows) // len(self.bases)
        return [self._slopes(rows[i : i + per_base]) for i in range(0, len(rows), per_base)]

    def _slopes(self, rows: Sequence[Sequence[float]]) -> list[float]:
        """The projected gradients at one base, from its losses: a row per variant, and in it one loss per sample, or
        one for all of them."""
        if self.one_sided:
            *moved, here = rows
            pairs, distance = [(row, here) for row in moved], self.eps
        else:
            pairs, distance = list(zip(rows[0::2], rows[1::2], strict=True)), 2 * self.eps
        return [(plus - minus) / distance for ahead, behind in pairs for plus, minus in zip(ahead, behind, strict=True)]

    def gradient(self, projected: Sequence[float]) -> Combination:
        """The estimate mean_k p_k z_k."""
        return Combination.of((seed, p / len(self.seeds)) for seed, p in zip(self.seeds, projected, strict=True))

    def loss(self, losses: Losses) -> float:
        """The loss at the first base (two-sided: the mean around it, which is that up to eps^2)."""
        around = losses.mean[: len(losses.mean) // len(self.bases)]
        return around[-1] if self.one_sided else sum(around) / len(around)


def clipped(projected: Sequence[float], limit: float | None) -> list[float]:
    """Each cut to -limit..limit; as they are if None."""
    return list(projected) if limit is None else [max(-limit, min(limit, p)) for p in projected]


def typical(values: Sequence[float]) -> float:
    """The scalar that is logged as the projected gradient: the root mean square, if there are several."""
    return values[0] if len(values) == 1 else float((sum(v * v for v in values) / len(values)) ** 0.5)


def zero_share(projected: Sequence[float]) -> float:
    """The share of differences of losses that are exactly zero: a loss that takes few values often does not change."""
    return sum(value == 0.0 for value in projected) / len(projected)


def check_positive(config: object, *names: str) -> None:
    """Raises ValueError naming the first of the settings that is not above zero, or not finite; null and ``auto``
    pass."""
    for name in names:
        value = getattr(config, name)
        if value not in (None, "auto") and not 0 < value < math.inf:
            raise ValueError(f"algorithm.{name}: must be above 0, not {value!r}")
