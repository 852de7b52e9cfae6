"""Losses as fixed-point integers: their sum is exact, so it does not depend on who added what first."""

from __future__ import annotations

import torch
from torch import Tensor

FRACTION_BITS = 32
ONE = 1 << FRACTION_BITS
"""The number 1."""
MAX_SUM = 1 << 62
"""Sums must stay below it."""


def to_fixed(losses: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 or fp64 losses [n] as int64 [n] multiples of 2**-32, and a bool [n] that is False where that failed.

    It fails where the loss is not finite or so large that it has diverged (2**30 or more); the value is 0 there.
    """
    wide = losses.detach().to("cpu", torch.float64)
    sound = torch.isfinite(wide) & (wide.abs() < 2.0**30)
    return torch.where(sound, wide * ONE, 0.0).round().to(torch.int64), sound


def mean(total: int, weight: int) -> float:
    """The mean loss from a fixed-point sum and a sum of weights: exact integers, one rounding."""
    return total / (weight * ONE)
