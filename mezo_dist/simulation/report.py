"""What a simulation says, as people read it (tables), and as programs do (JSON)."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from mezo_dist.json_types import JsonObject
from mezo_dist.planning.report import Answer
from mezo_dist.simulation.assumptions import FACTORS, NUMBERS, RATES, SHARES, Assumptions
from mezo_dist.simulation.sensitivity import CARRIES, Effect
from mezo_dist.simulation.week import CAUSES, save_seconds, start_seconds

if TYPE_CHECKING:
    from mezo_dist.simulation.command import Row

SHOWN = 14
"""Rows of the table of sensitivities."""
NOT_SIMULATED = (
    "Not simulated: what a step is worth (more samples or directions in it are more work, not more progress), failures "
    "that come together, two networks, evaluation and export. gloo connects every rank with every other one: it was "
    "tried with few ranks here, not with thousands. torchrun.sh gives up after RESTARTS (5) losses; a higher limit "
    "is taken for granted where a run has more of them."
)


def answer(
    rows: Sequence[Row],
    main: Row,
    found: Sequence[Effect],
    gain: float | None,
    notes: Sequence[str],
    *,
    title: str,
) -> Answer:
    """Tables of throughput, of where the time goes, and of what the assumptions do.

    Args:
        rows: all jobs.
        main: the one whose sensitivities are shown.
        found: these.
        gain: change of its samples per second by a hierarchical all-reduce; None if that was not asked.
        notes: what people must know.
        title: what was simulated.
    """
    carrying = [effect.name for effect in found if effect.size >= CARRIES]
    tail = [f"The result for {main.case.job.name} on {main.case.hosts:,} host(s) rests on "
            f"{', '.join(carrying) or 'no single assumption'}."]  # fmt: skip
    if gain is not None and main.machine.ranks > 1:
        tail.append(f"With a hierarchical all-reduce of scalars (not built): {gain:+.1%} samples/s.")
    tail += [*_of_adamw(rows), _of_joining(main), *(f"Note: {note}." for note in notes), NOT_SIMULATED]
    data: JsonObject = {
        "title": title,
        "rows": [_row(row) for row in rows],
        "assumptions": dataclasses.asdict(main.case.assumptions),
        "machine": dict(vars(main.machine)),
        "sensitivity": {"hosts": main.case.hosts, "job": main.case.job.name, "hierarchical": gain,
                        "effects": [dataclasses.asdict(effect) for effect in found]},
        "carrying": carrying,
        "notes": tail,
    }  # fmt: skip
    return Answer(data, [title], [_speeds(rows), _causes(rows), _sensitivities(main, found)], tail)


def _row(row: Row) -> JsonObject:
    costs = row.case.job.at(row.case.hosts)
    back = row.until_back
    return {
        "hosts": row.case.hosts,
        "job": row.case.job.name,
        "undisturbed_step_s": costs.step(),
        "costs": dataclasses.asdict(costs),
        "goodput": row.goodput,
        "samples_per_s": row.samples_per_s,
        "steps": statistics.fmean(o.steps for o in row.outcomes),
        "losses": statistics.fmean(o.losses for o in row.outcomes),
        "starts": statistics.fmean(o.starts for o in row.outcomes),
        "snapshot_every": row.outcomes[0].snapshot_every,
        "until_back_s": {"mean": statistics.fmean(back), "most": max(back)} if back else None,
        "shares": {cause: row.share(cause) for cause in CAUSES},
    }


def _plain_table(title: str) -> Table:
    return Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
                 title_style="bold", padding=(0, 1, 0, 0))  # fmt: skip


def _speeds(rows: Sequence[Row]) -> Table:
    table = _plain_table("what gets done")
    table.add_column("hosts", justify="right", no_wrap=True)
    table.add_column("job", no_wrap=True)
    for name in ("step s", "samples/s", "goodput", "lost", "starts", "snapshot", "back s", "most s"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        data = _row(row)
        back = data["until_back_s"]
        table.add_row(
            f"{data['hosts']:,}",
            str(data["job"]),
            _figure(data["undisturbed_step_s"]),
            _figure(data["samples_per_s"]),
            f"{data['goodput']:.1%}",
            f"{data['losses']:.1f}",
            f"{data['starts']:.1f}",
            f"{data['snapshot_every']:,}" if data["snapshot_every"] else "-",
            *((f"{back['mean']:,.0f}", f"{back['most']:,.0f}") if back else ("-", "-")),
        )
    table.caption = (
        "step s: undisturbed; goodput: share of the time that the steps would take undisturbed on all hosts;\n"
        "lost: hosts; starts: of all ranks; snapshot: steps between two; back: from a loss until lost work is redone"
    )
    return table


def _causes(rows: Sequence[Row]) -> Table:
    table = _plain_table("where the time goes, in %")
    table.add_column("hosts", justify="right", no_wrap=True)
    table.add_column("job", no_wrap=True)
    for cause in CAUSES:
        table.add_column(cause, justify="right")
    for row in rows:
        shares = [row.share(cause) for cause in CAUSES]
        cells = ["-" if abs(share) < 5e-5 else f"{share:.2%}".removesuffix("%") for share in shares]
        table.add_row(f"{row.case.hosts:,}", row.case.job.name, *cells)
    return table


def _sensitivities(main: Row, found: Sequence[Effect]) -> Table:
    table = _plain_table(f"what changes samples/s of {main.case.job.name} on {main.case.hosts:,} host(s)")
    table.add_column("assumption", no_wrap=True)
    for name in ("is", "halved", "doubled"):
        table.add_column(name, justify="right", no_wrap=True)
    for effect in found[:SHOWN]:
        table.add_row(effect.name, _value(effect), f"{effect.halved:+.1%}", f"{effect.doubled:+.1%}")
    return table


def _value(effect: Effect) -> str:
    """The assumption's value, in its unit."""
    if effect.name in SHARES or effect.name in FACTORS or effect.name in NUMBERS:
        return f"{effect.value:g}"
    if effect.name in RATES or effect.name in ("link", "host_link", "bandwidth"):
        return f"{effect.value / 1e9:g} GB/s"
    if effect.name == "flops":
        return f"{effect.value / 1e12:g} TFLOPS"
    if hasattr(Assumptions, effect.name) and effect.value >= 7200:
        return f"{effect.value / 3600:,.0f} h"
    return f"{effect.value:g} s"


def _of_adamw(rows: Sequence[Row]) -> list[str]:
    """The link that back-propagation needs."""
    last = [row for row in rows if row.case.job.repeats_steps and row.case.hosts > 1]
    if not last:
        return []
    costs, link = last[-1].case.job.at(last[-1].case.hosts), last[-1].machine.link
    needed = link * costs.linking / costs.computing * 8 / 1e9
    return [
        f"{last[-1].case.job.name}, {last[-1].case.hosts:,} hosts: its traffic hides behind its arithmetic from "
        f"{needed:,.0f} Gbit/s on between hosts; here are {link * 8 / 1e9:,.0f}."
    ]


def _of_joining(main: Row) -> str:
    """What a host that joins needs."""
    case, every = main.case, main.outcomes[0].snapshot_every
    costs = case.job.at(case.hosts)
    read = (costs.base + (costs.loaded if every else 0)) / 1e9
    begins = start_seconds(case, costs, case.hosts, has_snapshot=bool(every))
    replayed = (every or main.outcomes[0].steps) * costs.replay
    return (
        f"A host that joins reads {read:,.1f} GB, starts in {begins:,.0f} s "
        f"and replays for {replayed:,.0f} s at most, with all others, who start again for it; a snapshot takes "
        f"{save_seconds(case, costs, case.hosts):,.1f} s."
    )


def _figure(number: float) -> str:
    """Three digits."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
