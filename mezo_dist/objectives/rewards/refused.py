"""Why there is no reward for a text."""

from __future__ import annotations

import math
from typing import final


@final
class NoReward(Exception):
    """There is no number for a text; the message names the setting and the reason."""


def checked_number(value: object, setting: str) -> float:
    """``value`` as a reward.

    Raises:
        NoReward: it is not a finite number.
    """
    if isinstance(value, (bool, int, float)) and math.isfinite(value):
        return float(value)
    raise NoReward(f"{setting}: it answered {str(value)[:80]!r}, which is not a number")
