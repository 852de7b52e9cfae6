"""Which assumptions carry a result: each of them halved and doubled, on the same draws."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from mezo_dist.planning.machine import Machine
from mezo_dist.simulation.assumptions import Assumptions, scaled
from mezo_dist.simulation.jobs import Job
from mezo_dist.simulation.week import Case, Outcome, simulate

MACHINE = ("flops", "bandwidth", "link", "host_link", "latency", "generate", "write", "call")
"""Rates of the machine that are assumptions, too."""
CARRIES = 0.02
"""Change of the samples per second from which on an assumption is said to carry the result."""


@dataclass(frozen=True)
class Effect:
    """What one assumption does."""

    name: str
    value: float
    halved: float
    """Change of the samples per second, as a share."""
    doubled: float

    @property
    def size(self) -> float:
        """The larger change."""
        return max(abs(self.halved), abs(self.doubled))


def throughput(case: Case, outcomes: list[Outcome]) -> float:
    """Samples per second of wall-clock time, over all weeks that were drawn.

    Args:
        case: what was simulated.
        outcomes: one for each.
    """
    return statistics.fmean(outcome.steps for outcome in outcomes) * case.job.samples / case.seconds


def effects(
    case: Case, job_on: Callable[[Machine], Job | None], machine: Machine, seeds: range
) -> tuple[list[Effect], float | None]:
    """The effect of every assumption, the largest first, and that of a hierarchical all-reduce.

    Args:
        case: what is simulated.
        job_on: the same job on another machine; None if it does not fit there.
        machine: of the case.
        seeds: of the weeks that are drawn.
    """

    def speed(changed: Case | None) -> float:
        return 0.0 if changed is None else throughput(changed, [simulate(changed, seed) for seed in seeds])

    base = speed(case)
    found = [Effect(name, value, speed(half) / base - 1, speed(double) / base - 1)
             for name, value, half, double in _changed(case, job_on, machine)]  # fmt: skip
    other = job_on(replace(machine, reduce="hierarchical"))
    gain = None if machine.reduce != "ring" or other is None else speed(replace(case, job=other)) / base - 1
    return sorted(found, key=lambda effect: -effect.size), gain


def _changed(
    case: Case, job_on: Callable[[Machine], Job | None], machine: Machine
) -> Iterator[tuple[str, float, Case | None, Case | None]]:
    """Name, value, and the case with it halved and doubled."""
    for field in dataclasses.fields(Assumptions):
        value = getattr(case.assumptions, field.name)
        is_measured = field.name == "sigma" and not case.stragglers.is_assumed
        if not value or is_measured:
            continue
        halved, doubled = (replace(case, assumptions=scaled(case.assumptions, field.name, f)) for f in (0.5, 2.0))
        if field.name == "sigma":
            halved, doubled = (
                replace(one, stragglers=case.stragglers.with_sigma(one.assumptions.sigma)) for one in (halved, doubled)
            )
        yield field.name, value, halved, doubled
    for name in MACHINE:
        value = getattr(machine, name)
        jobs = [job_on(replace(machine, **{name: value * factor})) for factor in (0.5, 2.0)]
        half, double = (None if job is None else replace(case, job=job) for job in jobs)
        yield name, value, half, double
