"""What the metrics of steps say about a run that does not learn, in words for people, once each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import final

from mezo_dist.algorithms.look_back import LEAST

STILL = 10
"""Steps in a row without any difference of losses, after which people are told."""
CAUTIOUS = 64
"""Steps in a row with the smallest share that ``lr: auto`` takes, after which people are told."""
STANDS_STILL = (
    f"in {STILL} steps no loss has differed along any direction, so nothing is learnt; a larger algorithm.eps or "
    "train.batch_size may change that, or an objective that tells answers apart"
)


@final
class Advice:
    """Watches the steps that this process takes.

    Args:
        is_calibrated: losses are.
    """

    def __init__(self, *, is_calibrated: bool) -> None:
        self._calibrate = "" if is_calibrated else "train.calibrate (for classes), "
        self._still = self._cautious = 0
        self._first_share = 0.0

    def after(self, metrics: Mapping[str, float]) -> Iterator[str]:
        """What to say after a step, given its metrics (none where it was skipped)."""
        self._still = self._still + 1 if metrics.get("zero_differences") == 1.0 else 0
        if self._still == STILL:
            yield STANDS_STILL
        share = metrics.get("rate/share", 0.0)
        self._first_share = self._first_share or share
        is_least = 0 < share <= LEAST * self._first_share * (1 + 1e-9)
        self._cautious = self._cautious + 1 if is_least else 0
        if self._cautious == CAUTIOUS:
            yield (
                f"for {CAUTIOUS} steps lr: auto has looked back at progress that is lost in noise, and taken its "
                f"smallest share. {self._calibrate}more algorithm.directions or a larger train.batch_size let it see "
                f"more; algorithm.eta: {self._first_share:.2g} keeps the share of the start"
            )
