"""``mezo-dist report``: one HTML page about a run, from the files in its folder. It needs nothing but a browser."""

from __future__ import annotations

import html
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezo_dist.errors import UserError
from mezo_dist.storage import trajectory
from mezo_dist.storage.files import replace_file
from mezo_dist.storage.run_folder import CONFIG, EVENTS, read_results

log = logging.getLogger(__name__)
Series = dict[int, float]
"""Steps done -> value."""
SMOOTHING = 0.1
"""Weight of the newest value in the smoothed curve of the training loss."""


@dataclass(frozen=True)
class Panel:
    """One plot: its title, what the vertical axis counts, and the series in it."""

    title: str
    unit: str
    series: Mapping[str, Series]
    smooth: bool = False
    """Draw the values thinly and a smoothed curve over them."""


def write(folder: Path, path: Path) -> None:
    """Write the report of the run in ``folder`` to ``path``.

    Raises:
        UserError: no run there, or damaged; matplotlib is missing; ``path`` cannot be written.
    """
    found = trajectory.read(folder / trajectory.FILE)
    try:
        replace_file(path, _page(folder, found).encode())
    except OSError as error:
        raise UserError(f"--to {path}: cannot be written ({error.strerror})") from error


def _page(folder: Path, found: trajectory.Log) -> str:
    scalars, events = _scalars(folder / "metrics.jsonl"), list(_objects(folder / EVENTS))
    plots = "".join(
        f"<figure>{_draw(panel)}</figure>" for panel in _panels(scalars, found) if any(panel.series.values())
    )
    results = read_results(folder) if (folder / "results.json").exists() else {}
    config = (folder / CONFIG).read_text(encoding="utf-8") if (folder / CONFIG).exists() else ""
    model, task = found.header.base_model, _setting(found.header, "task", "name")
    return _TEMPLATE.format(
        title=html.escape(f"{model} on {task}"),
        style=_STYLE,
        facts=_table(_facts(folder, found, results, events)),
        outcome=_outcome(results),
        plots=plots,
        events=_table([(str(e.get("time", "")), _event(e)) for e in events]) or "<p>None were noted.</p>",
        config=html.escape(config),
        folder=html.escape(str(folder)),
    )


def _facts(
    folder: Path, found: trajectory.Log, results: Mapping[str, Any], events: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    header, done = found.header, len(found.steps)
    wanted = _setting(header, "train", "steps")
    skipped = sum(bool(step.skipped) for step in found.steps)
    happened = [event.get("event") for event in events]
    last = max(found.marks, default=None)
    size = found.size / max(1, done)
    return [
        ("Run folder", str(folder)),
        ("Base model", f"{header.base_model} (fingerprint {header.base_fingerprint}; {header.weights})"),
        ("Algorithm", f"{_setting(header, 'algorithm', 'name')}, directions {header.law_version}"),
        ("Steps", f"{done} of {wanted}"),
        ("Skipped", f"{skipped} steps without a finite loss"),
        ("Trajectory", f"{found.size:,} bytes, {size:.0f} per step: with the base model, it is the fine-tuned one"),
        ("Weights", "no fingerprint yet" if last is None else f"{found.marks[last]} after step {last}"),
        (
            "Interruptions",
            f"{happened.count('resumed')} restarts, {happened.count('stopped')} times told to stop, "
            f"{happened.count('snapshot failed')} snapshots failed",
        ),
        ("Made with", f"mezo_dist {header.version}"),
    ]


def _setting(header: trajectory.Header, section: str, name: str) -> Any:
    settings = header.config.get(section)
    return settings.get(name, "?") if isinstance(settings, dict) else "?"


def _outcome(results: Mapping[str, Any]) -> str:
    rows = [
        (name, results[key]) for name, key in _SPLITS.items() if isinstance(results.get(key), dict) and results[key]
    ]
    if not rows:
        return "<p>No evaluation is finished.</p>"
    names = list(rows[0][1])
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ["", *names])
    body = "".join(
        f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{_number(values.get(n))}</td>' for n in names)}</tr>"
        for name, values in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


_SPLITS = {"Test, before": "before", "Test, after": "after", "Validation, after": "validation"}


def _panels(scalars: Mapping[str, Series], found: trajectory.Log) -> Iterator[Panel]:
    logged = {s.step + 1: s.rounds[0].mean for s in found.steps if s.rounds}
    loss = scalars.get("loss/train") or {step: sum(mean[:2]) / 2 for step, mean in logged.items() if len(mean) > 1}
    yield Panel("Training loss", "mean loss of the batch", {"loss": loss}, smooth=True)
    evaluations: dict[str, dict[str, Series]] = {}
    for tag, series in scalars.items():
        kind, _, rest = tag.partition("/")
        if kind == "eval":
            split, _, name = rest.partition("/")
            evaluations.setdefault(name, {})[split] = series
    for name, by_split in sorted(evaluations.items()):
        yield Panel(f"Evaluation: {name}", name, by_split)
    for tag, title, unit in (
        ("projected_gradient", "Projected gradient", "loss per unit of eps"),
        ("throughput/samples_per_s", "Throughput", "forward passes of a sample per second"),
        ("memory/peak_rss_GiB", "Peak memory of rank 0", "GiB"),
        ("communicator/payload_bytes_per_step", "Sent by each rank", "bytes per step"),
        ("trajectory/bytes", "Trajectory", "bytes"),
    ):
        yield Panel(title, unit, {title: scalars.get(tag, {})})
    parts = {name: scalars.get(f"time/{name}_s", {}) for name in ("evaluate", "update")}
    yield Panel("Time of a step", "seconds", {name: series for name, series in parts.items() if series})


def _draw(panel: Panel) -> str:
    """The panel as SVG."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"reports need matplotlib: pip install 'mezo_dist[report]' ({error})") from error
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "mezo_dist", "font.family": "sans-serif"}):
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        axes = figure.add_subplot()
        for name, series in panel.series.items():
            steps, values = list(series), list(series.values())
            mark = "o" if len(steps) < 20 and not panel.smooth else None
            (line,) = axes.plot(
                steps, values, marker=mark, markersize=4, label=name, linewidth=1.2, alpha=0.35 if panel.smooth else 1
            )
            if panel.smooth:
                axes.plot(steps, list(_smoothed(values)), color=line.get_color(), linewidth=1.8)
        axes.set(title=panel.title, xlabel="steps done", ylabel=panel.unit)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(panel.series) > 1:
            axes.legend(frameon=False)
        picture = io.StringIO()
        figure.savefig(picture, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return picture.getvalue()[picture.getvalue().index("<svg") :]


def _smoothed(values: Sequence[float]) -> Iterator[float]:
    mean = values[0] if values else 0.0
    for value in values:
        mean += SMOOTHING * (value - mean)
        yield mean


def _scalars(path: Path) -> dict[str, Series]:
    """Tag -> series, from ``metrics.jsonl``. Of two values for a step (an evaluation done again) the last counts."""
    found: dict[str, Series] = {}
    for line in _objects(path):
        step, scalars = line.get("step"), line.get("scalars")
        if not isinstance(step, int) or not isinstance(scalars, dict):
            continue
        for tag, value in scalars.items():
            if isinstance(value, (int, float)):
                found.setdefault(tag, {})[step] = float(value)
    return found


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects in a file of lines; a line that is none is passed over: only a picture depends on it."""
    content = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            log.warning("%s, line %d: not JSON; left out", path, number)
            continue
        if isinstance(found, dict):
            yield found


def _event(event: Mapping[str, Any]) -> str:
    more = ", ".join(f"{name} {value}" for name, value in event.items() if name not in ("time", "event", "step"))
    return f"{event.get('event')} after step {event.get('step')}{f' ({more})' if more else ''}"


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) else "not finite"


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>" if rows else ""


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .15rem 1rem .15rem 0; vertical-align: top; }
th { font-weight: 600; white-space: nowrap; } td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(25rem, 1fr)); gap: .5rem; }
figure { margin: 0; } svg { width: 100%; height: auto; } pre, code { background: #f5f5f5; padding: .2rem .4rem; }
pre { overflow-x: auto; }
"""
_TEMPLATE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{style}</style></head><body>
<h1>{title}</h1>
{facts}
<h2>Outcome</h2>
{outcome}
<h2>Curves</h2>
<div class="plots">{plots}</div>
<h2>What happened</h2>
{events}
<h2>Settings</h2>
<details><summary>config.yaml</summary><pre>{config}</pre></details>
<p>To verify all of this, and to get the model: <code>mezo-dist replay {folder}</code></p>
</body></html>
"""
