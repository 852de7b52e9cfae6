"""``mezo-dist simulate``: options to cases, and these to an answer."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mezo_dist.algorithms import Settings
from mezo_dist.algorithms.mezo import MeZO
from mezo_dist.algorithms.svrg import MeZOSVRG
from mezo_dist.errors import UserError
from mezo_dist.planning.choice import Plan, by_algorithm, plan, reason, recommended
from mezo_dist.planning.command import Question, question_of
from mezo_dist.planning.machine import Machine
from mezo_dist.planning.report import text
from mezo_dist.simulation import report
from mezo_dist.simulation.assumptions import Assumptions, assumed, parse_seconds
from mezo_dist.simulation.jobs import Job, adamw_job, forward_job
from mezo_dist.simulation.sensitivity import effects, throughput
from mezo_dist.simulation.stragglers import Stragglers, measured
from mezo_dist.simulation.week import Case, Outcome, simulate

MOST_HOSTS = 100_000
MOST_SECONDS = 10 * 365 * 86400


@dataclass(frozen=True)
class Row:
    """One job on so many hosts."""

    case: Case
    machine: Machine
    outcomes: list[Outcome]
    job_on: Callable[[Machine], Job | None]
    """The same job on another machine."""

    @property
    def samples_per_s(self) -> float:
        """Of wall-clock time."""
        return throughput(self.case, self.outcomes)

    @property
    def goodput(self) -> float:
        """Mean over what was drawn."""
        return statistics.fmean(outcome.goodput for outcome in self.outcomes)

    def share(self, cause: str) -> float:
        """Share of the time that goes into a cause."""
        return statistics.fmean(outcome.seconds[cause] for outcome in self.outcomes) / self.case.seconds

    @property
    def until_back(self) -> list[float]:
        """After each loss, over all that was drawn."""
        return [seconds for outcome in self.outcomes for seconds in outcome.until_back]


def run(arguments: argparse.Namespace) -> None:
    """Answer on standard output.

    Raises:
        UserError: an option or file that is wrong, or contradicts another.
    """
    _check(arguments)
    assumptions = assumed(arguments.assume)
    notes: list[str] = []
    rows = [row for hosts in sorted(set(arguments.hosts)) for row in _rows(arguments, hosts, assumptions, notes)]
    if not rows:
        raise UserError(f"simulate: {notes[0] if notes else 'nothing fits'}")
    main = _main_row(rows)
    seeds = range(arguments.seed, arguments.seed + min(2, arguments.weeks))
    found, gain = effects(main.case, main.job_on, main.machine, seeds)
    answer = report.answer(rows, main, found, gain, list(dict.fromkeys(notes)), title=_title(arguments, main))
    if arguments.plot:
        from mezo_dist.simulation.plot import draw

        draw(rows, Path(arguments.plot))
    print(json.dumps(answer.data) if arguments.json else text(answer))


def _check(arguments: argparse.Namespace) -> None:
    if arguments.model is None:
        raise UserError("MODEL: name a model, a config, or a named shape; see `mezo-dist plan --help`")
    if arguments.calibrate:
        raise UserError("--calibrate: measure with `mezo-dist plan --calibrate`; what it remembers is used here")
    for hosts in arguments.hosts:
        if not 1 <= hosts <= MOST_HOSTS:
            raise UserError(f"--hosts: from 1 to {MOST_HOSTS:,}, not {hosts}")
    if arguments.weeks < 1 or arguments.weeks > 1000:
        raise UserError(f"--weeks: from 1 to 1,000, not {arguments.weeks}")
    if not 0 <= arguments.spares <= MOST_HOSTS:
        raise UserError(f"--spares: from 0 to {MOST_HOSTS:,}, not {arguments.spares}")
    if arguments.plot and Path(arguments.plot).suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot: {arguments.plot} does not end in .png, .svg or .pdf")


def _snapshots(arguments: argparse.Namespace) -> int | None:
    words = {"auto": None, "none": 0}
    if arguments.snapshots in words:
        return words[arguments.snapshots]
    if not arguments.snapshots.isdigit() or int(arguments.snapshots) < 1:
        raise UserError(f"--snapshots: auto, none or a number of steps, not {arguments.snapshots!r}")
    return int(arguments.snapshots)


def _rows(arguments: argparse.Namespace, hosts: int, assumptions: Assumptions, notes: list[str]) -> list[Row]:
    """All jobs on so many hosts.

    Args:
        arguments: the options.
        hosts: number of hosts.
        assumptions: all of them.
        notes: gets what people must know.
    """
    question = _question(arguments, hosts)
    notes += [note for note in question.notes if hosts == max(arguments.hosts)]
    shape, machine = question.shape, replace(question.machine, reduce=arguments.reduce)
    assert shape is not None
    seconds = parse_seconds(arguments.time, "--time")
    if not 0 < seconds <= MOST_SECONDS:
        raise UserError(f"--time: above 0 and at most ten years, not {arguments.time}")
    stragglers = Stragglers(assumptions.sigma, measured(arguments.stragglers) if arguments.stragglers else ())
    jobs: list[tuple[Job, Callable[[Machine], Job | None]]] = []
    for some in by_algorithm([plan(shape, setting, machine) for setting in question.settings]):
        chosen = _chosen(some, every_layout=arguments.every_layout)
        if not chosen:
            notes.append(f"{hosts} host(s): {reason(some)}")
        jobs += [
            (forward_job(shape, best), lambda m, s=best.setting: forward_job(shape, plan(shape, s, m)))  # type: ignore[misc]
            for best in chosen
        ]
    setting = question.settings[0]
    first = adamw_job(shape, setting, machine)
    if first is None:
        notes.append(f"{hosts} host(s): AdamW does not fit, however it is cut")
    else:
        jobs.append((first, lambda m: adamw_job(shape, setting, m)))
    rows = []
    for job, job_on in jobs:
        every = None if job.repeats_steps else _snapshots(arguments)
        case = Case(job, hosts, machine.ranks_per_host, assumptions, stragglers, seconds, arguments.launcher,
                    arguments.spares, every)  # fmt: skip
        outcomes = [simulate(case, arguments.seed + number) for number in range(arguments.weeks)]
        rows.append(Row(case, machine, outcomes, job_on))
    return rows


def _chosen(plans: Sequence[Plan], *, every_layout: bool) -> list[Plan]:
    """The recommended plan of one algorithm, or of each of its layouts."""
    if not every_layout:
        best = recommended(plans)
        return [] if best is None else [best]
    names = dict.fromkeys(one.setting.layout for one in plans)
    each = (recommended([one for one in plans if one.setting.layout == name]) for name in names)
    return [best for best in each if best is not None]


def _question(arguments: argparse.Namespace, hosts: int) -> Question:
    """What `mezo-dist plan` would be asked for so many hosts."""
    changed = argparse.Namespace(**{**vars(arguments), "hosts": hosts, "find": None})
    if hosts == 1:
        changed.link = None
    question = question_of(changed)
    ranks = question.machine.ranks
    if arguments.grow == "none" or ranks == 1:
        return question
    settings = []
    for setting in question.settings:
        if arguments.grow == "batch":
            batch = setting.batch_size * ranks
            settings.append(replace(setting, batch_size=batch, full_size=max(setting.full_size, batch)))
        else:
            settings.append(replace(setting, algorithm=_with_directions(setting.algorithm, ranks)))
    return replace(question, settings=settings, notes=[n for n in question.notes if "only gather and wait" not in n])


def _with_directions(settings: Settings, times: int) -> Settings:
    """An algorithm with so many times as many directions in a step."""
    if isinstance(settings, (MeZO, MeZOSVRG)):
        return replace(settings, directions=settings.directions * times)
    raise UserError(f"--grow: {settings.name} has no number of directions")


def _main_row(rows: Sequence[Row]) -> Row:
    """The one whose sensitivities are shown: forward passes only, the first on the most hosts."""
    most = max(row.case.hosts for row in rows)
    here = [row for row in rows if row.case.hosts == most]
    return next((row for row in here if not row.case.job.repeats_steps), here[0])


def _title(arguments: argparse.Namespace, main: Row) -> str:
    grows = {"batch": "the batch", "directions": "the directions of a step", "none": "nothing"}[arguments.grow]
    return (
        f"{arguments.model}: {arguments.time} on up to {main.case.hosts:,} host(s) of {main.case.ranks_per_host} "
        f"rank(s), {grows} growing with them; {arguments.launcher}, {arguments.weeks} draw(s) from seed "
        f"{arguments.seed}; stragglers: {main.case.stragglers.name}; rates {main.machine.origin}"
    )
