"""Why there is no reward for a text."""

from __future__ import annotations

import contextlib
import math
from typing import final


class NoReward(Exception):
    """There is no number for a text; the message names the setting and the reason."""


@final
class TooSlow(NoReward):
    """What judges took too long; so it may for the next text."""


def checked_number(value: object, setting: str) -> float:
    """``value`` as a reward.

    Raises:
        NoReward: it is not a finite number.
    """
    with contextlib.suppress(OverflowError):  # of a whole number that is too large
        if isinstance(value, (bool, int, float)) and math.isfinite(value):
            return float(value)
    raise NoReward(f"{setting}: it answered {str(value)[:80]!r}, which is not a number")
