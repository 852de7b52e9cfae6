"""Weight decay: decoupled, towards zero; now and then by a factor that fp32 can hold.

Vectors, biases and the weights of norms do not decay unless a setting says so, as in MeZO's code and in the optimisers
of Hugging Face's Trainer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from mezo_dist.directions.combination import to_fp32
from mezo_dist.errors import UserError

LEAST = 2.0**-12
"""The least decay that is applied at once. A factor nearer to 1 is a coarse fp32 number (or 1 itself: lr 1e-6 and decay
0.01 give 1 - 1e-8), and weights that are multiplied by it hardly change their last bits, or not at all."""


@dataclass(frozen=True)
class Decay:
    """State of weight decay: what the weights should have been multiplied by and have not been yet."""

    owed: float = 1.0

    def after(self, rate: float) -> tuple[float, Decay]:
        """The factor to multiply the weights by in a step that takes off ``rate`` (learning rate times weight decay) of
        them, and the state after it. Over many steps the product of the factors is that of all 1 - rate, up to
        `LEAST`."""
        owed = self.owed * (1 - rate)
        if 1 - owed < LEAST:
            return 1.0, Decay(owed)
        factor = to_fp32(owed)
        return factor, Decay(owed / factor)


_EXEMPT = re.compile(r"bias|layernorm|layer_norm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""The patterns that Hugging Face's Trainer exempts by name."""


def decays(name: str, dimensions: int) -> bool:
    """Whether weight decay falls on a weight where vectors are exempt: on matrices (LoRA's among them), and not on
    biases and norms.

    Args:
        name: canonical name of the weight.
        dimensions: number of its dimensions.
    """
    return dimensions >= 2 and _EXEMPT.search(name.lower()) is None


def check_decay(weight_decay: float, *rates: float) -> None:
    """Raises ValueError if a step at one of the learning ``rates`` would take off all of the weights, or the setting is
    negative."""
    if not 0 <= weight_decay < math.inf or max(rates) * weight_decay >= 1:
        raise ValueError(
            f"algorithm.weight_decay: must be at least 0, and below 1 / algorithm.lr, not {weight_decay!r}"
        )


def check_something_decays(settings: object, weights: Iterable[tuple[str, int]]) -> None:
    """Check that weight decay, if it is on, falls on anything.

    Args:
        settings: an algorithm's.
        weights: name and number of dimensions of every trainable weight.

    Raises:
        UserError: all of them are exempt.
    """
    is_on = getattr(settings, "weight_decay", 0.0) and not getattr(settings, "weight_decay_all", False)
    if is_on and not any(decays(name, dimensions) for name, dimensions in weights):
        raise UserError(
            "algorithm.weight_decay: all trainable weights are vectors, biases or norms, which are exempt; set "
            "algorithm.weight_decay_all to true, or leave it out"
        )
