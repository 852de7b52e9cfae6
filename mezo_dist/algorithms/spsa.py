"""The two-point estimate that all algorithms share (SPSA, Spall 1992)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mezo_dist.algorithms.base import Variant
from mezo_dist.directions.combination import ZERO, Combination


def pair(seed: int, eps: float, base: Combination = ZERO) -> tuple[Variant, Variant]:
    """The variants base + eps z and base - eps z."""
    return Variant(base + Combination.single(seed, eps)), Variant(base + Combination.single(seed, -eps))


def projected_gradients(losses: Sequence[float], eps: float) -> list[float]:
    """(L_plus - L_minus) / (2 eps) for each pair of a flat list of losses (+, -, +, -, ...)."""
    return [(plus - minus) / (2 * eps) for plus, minus in zip(losses[0::2], losses[1::2], strict=True)]


def gradient(seeds: Sequence[int], projected: Sequence[float]) -> Combination:
    """The gradient estimate mean_k p_k z_k as a combination."""
    return Combination.of((seed, p / len(seeds)) for seed, p in zip(seeds, projected, strict=True))


def check_positive(config: Any, *names: str) -> None:
    """Raises ValueError naming the first of the settings that is not above zero."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be above 0, not {getattr(config, name)!r}")
