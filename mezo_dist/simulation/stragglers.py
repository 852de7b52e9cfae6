"""How long a step takes when all wait for the slowest of many ranks."""

from __future__ import annotations

import json
import math
import statistics
from functools import lru_cache
from pathlib import Path
from typing import final

from mezo_dist.errors import UserError

POINTS = 2000
"""Places at which the distribution of the slowest rank is evaluated."""
FEWEST = 20
"""Steps that a log must have to tell a distribution."""
TAG = "time/evaluate_s"


@final
class Stragglers:
    """The distribution of a rank's time for a step, in units of its median, independent from step to step and rank to
    rank (hosts that are slow for long are another thing, see `Assumptions.slow_hosts`).

    The slowest of n ranks is slower than a share u of all steps where one rank is slower than the share ``u ** (1/n)``
    (the largest order statistic). Weeks have so many steps that their mean is what counts.

    Args:
        sigma: lognormal times with this standard deviation of the logarithm.
        times: measured times in place of that; no rank is then ever slower than the slowest of them.
    """

    def __init__(self, sigma: float, times: tuple[float, ...] = ()) -> None:
        self._sigma, self._times = sigma, tuple(sorted(times))
        self.slowest = lru_cache(maxsize=None)(self._slowest)
        """Mean time of the slowest of so many ranks, over the mean time of one."""

    @property
    def name(self) -> str:
        """For people."""
        if self._times:
            return f"{len(self._times)} measured steps"
        return f"lognormal, sigma {self._sigma:g}"

    @property
    def is_assumed(self) -> bool:
        """The distribution is not measured."""
        return not self._times

    def with_sigma(self, sigma: float) -> Stragglers:
        """Another assumed one."""
        return Stragglers(sigma)

    def _slowest(self, ranks: int) -> float:
        return self._mean_of_largest(ranks) / self._mean_of_largest(1)

    def _mean_of_largest(self, ranks: int) -> float:
        logs = (math.log((i + 0.5) / POINTS) / ranks for i in range(POINTS))
        return statistics.fmean(self._at(-math.expm1(log)) for log in logs)

    def _at(self, above: float) -> float:
        """The time that a share ``above`` of a rank's steps exceeds."""
        if self._times:
            return self._times[min(len(self._times) - 1, int((1 - above) * len(self._times)))]
        return math.exp(-self._sigma * statistics.NormalDist().inv_cdf(above))


def measured(run: str) -> tuple[float, ...]:
    """Times of the steps of a run, in units of their median: of what rank 0 took to evaluate each, in the order of the
    log, without the first tenth, in which things warm up.

    Times of a run of one process are those of a rank. Where there were more, rank 0 has waited for the slowest.

    Args:
        run: its folder, or its metrics.jsonl.

    Raises:
        UserError: it has no such log, or too few steps in it.
    """
    path = Path(run)
    path = path / "metrics.jsonl" if path.is_dir() else path
    times = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            value = entry.get("scalars", {}).get(TAG) if isinstance(entry, dict) else None
            if isinstance(value, (int, float)) and value > 0:
                times.append(float(value))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--stragglers: {path} is no log of a run's steps ({error})") from error
    times = times[len(times) // 10 :]
    if len(times) < FEWEST:
        raise UserError(f"--stragglers: {path} has {len(times)} steps with {TAG}; at least {FEWEST} are needed")
    middle = statistics.median(times)
    return tuple(time / middle for time in times)
