"""The plot of a simulation: throughput over hosts, and where the time goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mezo_dist.errors import UserError
from mezo_dist.simulation.week import CAUSES

if TYPE_CHECKING:
    from mezo_dist.simulation.command import Row


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw samples per second of all jobs, and the time of the first one.

    Args:
        rows: all jobs.
        path: of the file; its ending says the format.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--plot: needs matplotlib (pip install 'mezo_dist[report]')") from error
    figure = Figure(figsize=(11, 4), layout="constrained")
    speed, time = figure.subplots(1, 2)
    names = list(dict.fromkeys(_series(row) for row in rows))
    for name in names:
        some = [row for row in rows if _series(row) == name]
        speed.plot([row.case.hosts for row in some], [row.samples_per_s for row in some], "o-", label=name)
    speed.set(xscale="log", yscale="log", xlabel="hosts", ylabel="samples per second")
    speed.legend(fontsize="small")
    some = [row for row in rows if _series(row) == names[0]]
    bottom = [0.0] * len(some)
    for cause in CAUSES:
        shares = [100 * max(0.0, row.share(cause)) for row in some]
        if max(shares) >= 0.05:
            time.bar([f"{row.case.hosts:,}" for row in some], shares, bottom=bottom, label=cause)
        bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
    time.set(xlabel="hosts", ylabel="% of the time", title=names[0])
    time.legend(fontsize="small")
    try:
        figure.savefig(path)
    except OSError as error:
        raise UserError(f"--plot: {path} cannot be written ({error})") from error


def _series(row: Row) -> str:
    """Jobs of one line: the same algorithm, whatever its layout on so many hosts."""
    layout, _, algorithm = row.case.job.name.partition(", ")
    return layout if row.case.job.repeats_steps else f"{layout.split()[0]}, {algorithm}"
