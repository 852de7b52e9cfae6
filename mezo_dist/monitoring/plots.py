"""The plots of a report: which series stand in which plot, and a plot as SVG."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mezo_dist.errors import UserError, printable
from mezo_dist.monitoring.run_data import RunData, Series, as_number
from mezo_dist.monitoring.scalars import train_loss_tag
from mezo_dist.storage import trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHING = 0.1
"""Weight of the newest value in the smoothed curve of the training loss."""
MOST_PLOTS = 20
FROM_ZERO = ("memory/", "communicator/", "trajectory/", "throughput/", "time/", "forward_passes")
"""Starts of tags whose axis begins at zero: there a small change would look large otherwise."""
MOST_SERIES = 10
"""Largest number of series in one plot; more could not be distinguished."""
LONGEST_WORDS = 48
"""Characters of a title, a unit or a series' name that are shown."""
SYSTEM = (
    ("lr", "Learning rate", "learning rate"),
    ("rate/lr", "Learning rate that was found, before schedules", "learning rate"),
    ("rate/curvature", "Curvature along directions", "loss per squared unit of eps"),
    ("projected_gradient", "Projected gradient", "loss per unit of eps"),
    ("gradient_norm", "Norm of the gradient", "loss per unit of the weights"),
    ("objective/zero_differences", "Differences that are exactly zero", "share of a step"),
    ("throughput/samples_per_s", "Throughput", "forward passes of a sample per second"),
    ("forward_passes_per_step", "Forward passes", "of one sample, per step"),
    ("memory/peak_rss_GiB", "Peak memory of rank 0", "GiB"),
    ("communicator/payload_bytes_per_step", "Sent by each rank", "bytes per step"),
    ("trajectory/bytes", "Trajectory", "bytes"),
)
"""Tags that have a plot each: tag, title, unit."""


@dataclass(frozen=True)
class Panel:
    """One plot: its title, what the vertical axis counts, and the series in it."""

    title: str
    unit: str
    series: Mapping[str, Series] = field(default_factory=dict)
    smooth: bool = False
    """Draw the values thinly and a smoothed curve over them."""
    counts: str = "steps done"
    """What the horizontal axis counts."""
    from_zero: bool = False
    """The vertical axis begins at zero."""


def panels(data: RunData, *, calibrated: bool) -> tuple[list[Panel], list[str]]:
    """Choose what is drawn.

    Args:
        data: the run.
        calibrated: whether the losses of its steps are calibrated.

    Returns:
        At most `MOST_PLOTS` panels, and the tags that are in none of them.
    """
    evaluations: dict[str, dict[str, Series]] = {}
    tags: dict[str, list[str]] = {}
    for tag, series in data.scalars.items():
        kind, _, rest = tag.partition("/")
        split, _, name = rest.partition("/")
        if kind == "eval" and len(evaluations.get(name, ())) < MOST_SERIES:
            evaluations.setdefault(name, {})[split] = series
            tags.setdefault(name, []).append(tag)
    system = [panel for panel in _system_panels(data.scalars) if panel.series]
    names = sorted(evaluations)[: MOST_PLOTS - 1 - len(system)]
    shown = [Panel(f"Evaluation: {name}", name, evaluations[name]) for name in names]
    drawn = {tag for name in names for tag in tags[name]} | _SYSTEM_TAGS | {train_loss_tag(calibrated=calibrated)}
    loss = _loss_panel(data, calibrated=calibrated)
    return [*([loss] if any(loss.series.values()) else []), *shown, *system], sorted(data.scalars.keys() - drawn)


def draw(panel: Panel) -> str:
    """The panel as SVG. Names in it are text and never markup, neither of SVG nor of matplotlib.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"reports need matplotlib: pip install 'mezo_dist[report]' ({error})") from error
    picture = io.StringIO()
    style = rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "mezo_dist",
            "font.family": "sans-serif",
            "text.parse_math": False,  # a dollar sign in a name is a dollar sign
            "text.usetex": False,
        }
    )
    with style, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the browser has fonts of its own
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        _plot(figure.add_subplot(), panel)
        figure.savefig(picture, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return picture.getvalue()[picture.getvalue().index("<svg") :]


def shortened(text: str, longest: int = LONGEST_WORDS) -> str:
    """A printable text of at most ``longest`` characters; an ellipsis stands for what is cut."""
    short = printable(text[: longest + 1])
    return short if len(short) <= longest else f"{short[: longest - 1]}…"


def _system_panels(scalars: Mapping[str, Series]) -> Iterator[Panel]:
    for tag, title, unit in SYSTEM:
        series = {title: scalars[tag]} if tag in scalars else {}
        yield Panel(title, unit, series, from_zero=tag.startswith(FROM_ZERO))
    times = {name: scalars[tag] for tag, name in _TIMES.items() if tag in scalars}
    yield Panel("Time of a step", "seconds", times, from_zero=True)


_TIMES = {"time/evaluate_s": "evaluate", "time/update_s": "update"}
_SYSTEM_TAGS = _TIMES.keys() | {tag for tag, _, _ in SYSTEM}


def _loss_panel(data: RunData, *, calibrated: bool) -> Panel:
    loss = data.scalars.get(train_loss_tag(calibrated=calibrated)) or _logged_losses(data.log)
    if calibrated:
        return Panel("Calibrated training loss", "calibrated loss (biased low)", {"loss": loss}, smooth=True)
    return Panel("Training loss", "mean loss of the batch", {"loss": loss}, smooth=True)


def _logged_losses(log: trajectory.Log) -> Series:
    """The losses at both sides of the weights, averaged, from the trajectory."""
    means = {step.step + 1: step.rounds[0].mean for step in log.steps if step.rounds}
    losses = {step: as_number(sum(mean[:2]) / 2) for step, mean in means.items() if len(mean) > 1}
    return {step: loss for step, loss in losses.items() if loss is not None}


def _plot(axes: Axes, panel: Panel) -> None:
    lines = []
    for series in panel.series.values():
        steps, values = list(series), list(series.values())
        mark = "o" if len(steps) < 20 and not panel.smooth else None
        alpha = (0.35 if len(panel.series) == 1 else 0.12) if panel.smooth else 1.0
        (line,) = axes.plot(steps, values, marker=mark, markersize=4, linewidth=1.2, alpha=alpha)
        if panel.smooth:
            (line,) = axes.plot(steps, list(_smoothed(values)), color=line.get_color(), linewidth=1.8)
        lines.append(line)
    axes.set(title=shortened(panel.title), xlabel=panel.counts, ylabel=shortened(panel.unit))
    if panel.from_zero:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]) if _goes_below_zero(panel) else 0.0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(panel.series) > 1:
        # A space before each name, for matplotlib leaves out those that begin with an underscore.
        axes.legend(lines, [f" {shortened(name)}" for name in panel.series], frameon=False, fontsize="small")


def _goes_below_zero(panel: Panel) -> bool:
    return any(value < 0 for series in panel.series.values() for value in series.values())


def _smoothed(values: Sequence[float]) -> Iterator[float]:
    mean = values[0] if values else 0.0
    for value in values:
        mean += SMOOTHING * (value - mean)
        yield mean
