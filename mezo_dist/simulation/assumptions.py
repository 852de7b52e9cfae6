"""What a simulation takes for granted of machines, and of how a job starts again: every number, with its source."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

from mezo_dist.errors import UserError
from mezo_dist.planning.machine import parse_rate

SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "y": 365 * 86400}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(s|min|h|d|y)")


@dataclass(frozen=True)
class Assumptions:
    """Times in seconds, rates in bytes per second. ``--assume NAME=VALUE`` changes one."""

    mtbf: float = 264 * 86400.0
    """Between two failures of one host. Llama 3 (arXiv 2407.21783, section 3.3.4): 419 unexpected interruptions in 54
    days of 2,048 hosts with 8 GPUs each."""
    silent: float = 0.1
    """Share of failures that close no connection (power, cable), so that the others notice by ``timeout`` alone. In
    that report 8.4 % were switches and cables."""
    repair: float = 4 * 3600.0
    """Until a failed host, or one in its place, is there again. Invented."""
    timeout: float = 600.0
    """``distributed.timeout_s``: after so long a silent rank counts as lost. The default of runs."""
    notice: float = 2.0
    """From the lost connection, or from the end of ``timeout``, until all ranks begin again: the roll call, and the
    launcher that looks after them. Measured by ``examples/scaling_study/simulate_check.py``: 1.9 s (0.6 after a
    time-out)."""
    last_call: float = 30.0
    """That torchrun waits for further hosts when fewer than the most have come (``last_call_timeout``). Its default."""
    requeue: float = 120.0
    """Until a job that ended is started anew by its scheduler: what SLURM holds back a requeued job."""
    start: float = 45.0
    """Of a rank until its weights are wanted, and from there to the first step: imports, data, kernels, the probe.
    Invented; ``simulate_check.py`` measures that of a tiny job."""
    connect: float = 1e-3
    """For each rank of the job: every rank connects to every other one (gloo). Invented."""
    read: float = 2e9
    """At which one host reads weights: the base model from a disk of its own, where a host that is new has put it
    before it counts as there (launcher/README.md), snapshots from the shared folder. Invented."""
    save: float = 1e9
    """At which one host writes them. Invented."""
    storage: float = 2e11
    """At which all hosts together read from or write to the shared folder. Invented."""
    sigma: float = 0.03
    """Spread of the time of a rank's step: standard deviation of its logarithm, if no run is given to take it from.
    Invented."""
    slow_hosts: float = 0.005
    """Share of hosts that are slow until they are replaced. Invented."""
    slow_factor: float = 1.1
    """How many times as long their steps take. Invented."""
    slow_links: float = 0.0
    """Share of hosts whose link is slow until they are replaced. None by default, for a single one slows every step
    that sends weights or gradients."""
    slow_link_factor: float = 4.0
    """How many times as long it takes what crosses such a link. Invented."""
    cut_every: float = 365 * 86400.0
    """Between two cuts of one host's link that mend by themselves. Invented."""
    cut: float = 20.0
    """How long they last. All wait, and go on, if it is shorter than ``timeout``. Invented."""
    join_every: float = 0.0
    """Hosts that are back are let in at multiples of this; 0: at once, as torchrun does, which starts all ranks again
    for it."""


SHARES = ("silent", "slow_hosts", "slow_links")
FACTORS = ("slow_factor", "slow_link_factor")
RATES = ("read", "save", "storage")
NUMBERS = ("sigma",)
MAY_BE_ZERO = ("join_every", "last_call", "requeue", "connect", "sigma", "start", "notice", *SHARES)


def parse_seconds(text: str, option: str) -> float:
    """Seconds of ``90s``, ``10min``, ``6h``, ``30d`` or ``1y``; a plain number is in seconds.

    Args:
        text: the duration.
        option: that it was given to, for messages.

    Raises:
        UserError: it is no duration.
    """
    match = _DURATION.fullmatch(text.strip())
    if match:
        return float(match[1]) * SECONDS[match[2]]
    return _number(text, option, "a duration such as 90s, 10min, 6h or 30d")


def assumed(changes: Sequence[str]) -> Assumptions:
    """The assumptions, some of them changed.

    Args:
        changes: ``NAME=VALUE`` each.

    Raises:
        UserError: a name or value that is none.
    """
    values: dict[str, float] = {}
    names = [field.name for field in dataclasses.fields(Assumptions)]
    for change in changes:
        name, _, text = change.partition("=")
        if name not in names:
            raise UserError(f"--assume: {name!r} is no assumption; there are {', '.join(names)}")
        values[name] = _value(name, text)
    return Assumptions(**values)


def _value(name: str, text: str) -> float:
    option = f"--assume {name}"
    if name in RATES:
        return parse_rate(text, option)
    if name in SHARES or name in FACTORS or name in NUMBERS:
        value = _number(text, option, "a number")
    else:
        value = parse_seconds(text, option)
    if name in SHARES and not 0 <= value <= 1:
        raise UserError(f"{option}: is a share, from 0 to 1, not {text}")
    if name in FACTORS and value < 1:
        raise UserError(f"{option}: is a factor of at least 1, not {text}")
    if value < 0 or (value == 0 and name not in MAY_BE_ZERO):
        raise UserError(f"{option}: must be above 0, not {text}")
    if name == "sigma" and value > 1:
        raise UserError(f"{option}: must be at most 1, not {text}")
    return value


def _number(text: str, option: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value < float("inf"):
        raise UserError(f"{option}: {text!r} is not {what}")
    return value


def scaled(assumptions: Assumptions, name: str, factor: float) -> Assumptions:
    """The same with one number halved or doubled: a share is at most 1, and of a factor what is above 1 counts.

    Args:
        assumptions: all of them.
        name: of the one to change.
        factor: that it is multiplied by.
    """
    value: float = getattr(assumptions, name)
    changed = 1 + (value - 1) * factor if name in FACTORS else value * factor
    return dataclasses.replace(assumptions, **{name: min(1.0, changed) if name in SHARES else changed})
