"""The plot of a study: seconds with quartiles, efficiency, memory and bytes, over one column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mezo_dist.errors import UserError

PANELS = ("seconds per step", "efficiency", "peak GiB", "weight bytes")
SETTINGS = ("model", "dtype", "hosts", "ranks", "layout", "algorithm", "link", "batch", "micro_batch", "width",
            "tokens", "directions")  # fmt: skip


def draw(rows: Sequence[Mapping[str, Any]], x: str, path: Path) -> None:
    """Draw all rows, a line for each combination of the other settings.

    Args:
        rows: of `mezo_dist.studies.results.rows_of`.
        x: column of the horizontal axis.
        path: of the file; its ending says the format.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need matplotlib (pip install 'mezo_dist[report]')") from error
    panels = [name for name in PANELS if any(row[name] for row in rows)]
    figure = Figure(figsize=(4 * len(panels), 3.6), layout="constrained")
    others = [name for name in SETTINGS if name != x and len({str(row[name]) for row in rows}) > 1]
    # What follows the horizontal axis step by step (the batch, in weak scaling) does not tell lines apart.
    others = [name for name in others if not _follows(rows, x, name)]
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for series in dict.fromkeys(_line(row, others) for row in rows):
            same = [row for row in rows if _line(row, others) == series]
            some = [row for row in same if row[name] is not None]
            places = [row[x] if isinstance(row[x], (int, float)) else str(row[x]) for row in some]
            label = ", ".join(series) or None
            if name == "seconds per step":
                spread = [[row[name] - row["q1"] for row in some], [row["q3"] - row[name] for row in some]]
                axes.errorbar(places, [row[name] for row in some], yerr=spread, fmt="o-", capsize=3, label=label)
            else:
                axes.plot(places, [row[name] for row in some], "o-", label=label)
        axes.set(xlabel=x, title=name, ylim=(0, None))
    if others:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="x-small")
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error})") from error


def _line(row: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    """What a line is named after; a number says what it is of."""
    named = {name: f"{name} {value}" if isinstance(value := row[name], int) else str(value) for name in names}
    return tuple(row["line"].get(name, named[name]) for name in names)


def _follows(rows: Sequence[Mapping[str, Any]], x: str, name: str) -> bool:
    return len({(str(row[x]), str(row[name])) for row in rows}) == len({str(row[x]) for row in rows}) > 1
