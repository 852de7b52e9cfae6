"""The two-point estimate that all algorithms share (SPSA, Spall 1992), along one direction per batch or per sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mezo_dist.algorithms.base import Batch, Evaluation, Losses, Variant
from mezo_dist.directions.combination import ZERO, Combination


@dataclass(frozen=True)
class Probe:
    """Two-point estimates of one batch along ``seeds``: at the current weights, and at further ``bases`` if given.

    Args:
        seeds: one direction after another for the whole batch; or, with ``per_sample``, one for each sample.
        eps: size of the perturbation.
        batch: which batch.
        per_sample: every sample has a direction of its own, at no more forward passes than one direction.
        bases: points to probe at, as shifts of the current weights.
    """

    seeds: tuple[int, ...]
    eps: float
    batch: Batch = "minibatch"
    per_sample: bool = False
    bases: tuple[Combination, ...] = (ZERO,)

    def evaluation(self) -> Evaluation:
        """The round of forward passes: for every base and direction the variants + and -."""
        return Evaluation(
            tuple(v for base in self.bases for v in self._variants(base)), self.batch, each_sample=self.per_sample
        )

    def _variants(self, base: Combination) -> list[Variant]:
        steps = (self.eps, -self.eps)
        if self.per_sample:
            return [Variant(base, tuple(Combination.single(seed, step) for seed in self.seeds)) for step in steps]
        return [Variant(base + Combination.single(seed, step)) for seed in self.seeds for step in steps]

    def projected(self, losses: Losses) -> list[list[float]]:
        """The projected gradients (L_plus - L_minus) / (2 eps): for each base, one per direction."""
        if self.per_sample:
            flat = [self._slope(plus, minus) for pair in _pairs(losses.each) for plus, minus in zip(*pair, strict=True)]
        else:
            flat = [self._slope(plus, minus) for plus, minus in _pairs(losses.mean)]
        return [flat[i : i + len(self.seeds)] for i in range(0, len(flat), len(self.seeds))]

    def _slope(self, plus: float, minus: float) -> float:
        return (plus - minus) / (2 * self.eps)

    def gradient(self, projected: Sequence[float]) -> Combination:
        """The estimate mean_k p_k z_k."""
        return Combination.of((seed, p / len(self.seeds)) for seed, p in zip(self.seeds, projected, strict=True))

    def loss(self, losses: Losses) -> float:
        """The mean loss around the first base: what the training loss is, up to eps^2."""
        around = losses.mean[: len(losses.mean) // len(self.bases)]
        return sum(around) / len(around)


def _pairs(values: Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(zip(values[0::2], values[1::2], strict=True))


def typical(values: Sequence[float]) -> float:
    """What is shown as "the" projected gradient: the value if there is one, the root mean square of several."""
    return values[0] if len(values) == 1 else float((sum(v * v for v in values) / len(values)) ** 0.5)


def check_positive(config: Any, *names: str) -> None:
    """Raises ValueError naming the first of the settings that is not above zero, or not finite."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"algorithm.{name}: must be above 0, not {getattr(config, name)!r}")
