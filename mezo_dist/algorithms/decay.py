"""Weight decay: decoupled, towards zero; now and then by a factor that fp32 can hold."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mezo_dist.directions.combination import to_fp32

LEAST = 2.0**-12
"""Decay that is applied at once. A factor nearer to 1 is a coarse fp32 number (or 1 itself: lr 1e-6 and decay 0.01 give
1 - 1e-8), and weights that are multiplied by it hardly change their last bits, or not at all."""


@dataclass(frozen=True)
class Decay:
    """State of weight decay: what the weights should have been multiplied by and have not been yet."""

    owed: float = 1.0

    def after(self, rate: float) -> tuple[float, Decay]:
        """What to multiply the weights by in a step that takes off ``rate`` (learning rate times weight decay) of them,
        and the state after it. Over many steps the factors' product is that of all 1 - rate, up to `LEAST`."""
        owed = self.owed * (1 - rate)
        if 1 - owed < LEAST:
            return 1.0, Decay(owed)
        factor = to_fp32(owed)
        return factor, Decay(owed / factor)


def check_decay(weight_decay: float, *rates: float) -> None:
    """Raises ValueError if a step would take off all of the weights, or the setting is negative."""
    if not 0 <= weight_decay < math.inf or max(rates) * weight_decay >= 1:
        raise ValueError(
            f"algorithm.weight_decay: must be at least 0, and below 1 / algorithm.lr, not {weight_decay!r}"
        )
