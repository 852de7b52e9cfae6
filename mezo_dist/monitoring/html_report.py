"""``mezo-dist report``: one HTML page about a run, or several, from the files in their folders. It needs nothing but a
browser."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

from mezo_dist.errors import UserError, printable
from mezo_dist.json_types import JsonObject
from mezo_dist.monitoring.comparison import render_comparison
from mezo_dist.monitoring.outcome import in_words, setting
from mezo_dist.monitoring.page import fill, in_short
from mezo_dist.monitoring.plots import MOST_SERIES, draw, panels, shortened
from mezo_dist.monitoring.run_data import RunData, as_number, read_run
from mezo_dist.monitoring.scalars import figure
from mezo_dist.storage.files import replace_file

log = logging.getLogger(__name__)
TEMPLATE = "report.html.jinja"
SPLITS = {"Test, before": "before", "Test, after": "after", "Validation, after": "validation"}
"""Row of the table of outcomes -> its key in results.json."""
MOST_METRICS = 12
MOST_EVENTS = 200
"""Events shown, the last ones."""
MOST_DETAILS = 10
"""Facts shown beside one event."""
SAMPLE = ("prompt", "right", "before", "after")
"""Columns of the table of samples, in answers.json."""
MOST_SAMPLES, LONGEST_TEXT = 100, 600
"""Samples shown, and characters of a text of theirs."""
MOST_NAMES = 10
"""Tags named among those that are not drawn."""


def write(folders: Sequence[Path], path: Path) -> None:
    """Write the report of the run in a folder, or of several, to ``path``. What cannot be read is named on the page and
    logged.

    Raises:
        UserError: no run there, or its trajectory is damaged; too many runs; matplotlib is missing; ``path`` cannot be
            written.
    """
    if len(folders) > MOST_SERIES:
        raise UserError(f"report: {len(folders)} runs in one plot cannot be told apart; name {MOST_SERIES} at most")
    runs = [read_run(folder) for folder in folders]
    for data in runs:
        for problem in data.problems:
            log.warning("%s: %s", data.folder, problem)
    text = render(runs[0]) if len(runs) == 1 else render_comparison(runs)
    try:
        replace_file(path, text.encode())
    except OSError as error:
        raise UserError(f"--to {path}: cannot be written ({error.strerror})") from error


def render(data: RunData) -> str:
    """The page about one run."""
    calibrated = setting(data.log.header, "train", "calibrate") is True
    drawn, left_out = panels(data, calibrated=calibrated)
    metrics, outcome = _outcome(data.results)
    samples, samples_split = _samples(data.answers)
    return fill(
        TEMPLATE,
        title=f"{in_short(data.log.header.base_model)} on {in_short(setting(data.log.header, 'task', 'name'))}",
        sentence=in_words(data),
        facts=_facts(data),
        problems=data.problems,
        metrics=metrics,
        outcome=outcome,
        confusion=_confusion(data.answers),
        samples=samples,
        samples_split=samples_split,
        calibrated=calibrated,
        plots=[draw(panel) for panel in drawn],
        left_out=_some_of(left_out),
        events=[(in_short(event.get("time")), _event(event)) for event in data.events[-MOST_EVENTS:]],
        num_earlier_events=max(0, len(data.events) - MOST_EVENTS),
        config=data.config,
        folder=shlex.quote(printable(str(data.folder))),
    )


def _facts(data: RunData) -> list[tuple[str, str]]:
    recorded, header, done = data.log, data.log.header, len(data.log.steps)
    skipped = sum(bool(step.skipped) for step in recorded.steps)
    kinds = [event.get("event") for event in data.events]
    last = max(recorded.marks, default=None)
    has_gradients = header.weights.endswith("from snapshots alone")  # a first-order baseline's
    directions = "exact gradients" if has_gradients else f"directions {in_short(header.law_version)}"
    content = (
        "losses alone, weights are in snapshots" if has_gradients else "with the base model, it is the fine-tuned one"
    )
    return [
        ("Run folder", printable(str(data.folder))),
        (
            "Base model",
            f"{in_short(header.base_model)} (fingerprint {in_short(header.base_fingerprint)}; "
            f"{in_short(header.weights)})",
        ),
        ("Algorithm", f"{in_short(setting(header, 'algorithm', 'name'))}, {directions}"),
        ("Steps", f"{done} of {in_short(setting(header, 'train', 'steps'))}"),
        ("Skipped", f"{skipped} steps without a finite loss"),
        (
            "Trajectory",
            f"{recorded.size:,} bytes, {recorded.size / max(1, done):.0f} per step: {content}",
        ),
        (
            "Weights",
            "no fingerprint yet" if last is None else f"{in_short(recorded.marks[last].weights)} after step {last}",
        ),
        (
            "Interruptions",
            f"{kinds.count('resumed')} restarts, {kinds.count('stopped')} times told to stop, "
            f"{kinds.count('snapshot failed')} snapshots failed",
        ),
        ("Version", f"mezo_dist {in_short(header.version)}"),
    ]


def _outcome(results: JsonObject) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Names of the metrics, and for each split that was evaluated its name and values."""
    splits = {name: values for name, key in SPLITS.items() if isinstance(values := results.get(key), dict) and values}
    names = list(dict.fromkeys(name for values in splits.values() for name in values))[:MOST_METRICS]
    rows = [(split, [_value(values[n]) if n in values else "" for n in names]) for split, values in splits.items()]
    return [shortened(name) for name in names], rows


def _confusion(answers: JsonObject) -> dict[str, object] | None:
    """Classes, rows of (count, share of the row), and the number of samples; None where the file has no such table."""
    table = answers.get("confusion")
    if not isinstance(table, dict):
        return None
    classes, counts = table.get("classes"), table.get("counts")
    if not isinstance(classes, list) or not isinstance(counts, list) or not 0 < len(classes) == len(counts) <= 100:
        return None
    is_sound = all(isinstance(row, list) and len(row) == len(classes) and all(map(_is_count, row)) for row in counts)
    if not is_sound:
        return None
    names = [shortened(in_short(name)) for name in classes]
    rows = [
        (name, [(f"{count:,}", f"{0.6 * count / max(1, sum(row)):.2f}") for count in row])
        for name, row in zip(names, counts, strict=True)
    ]
    total = f"{sum(map(sum, counts)):,}"
    return {"classes": names, "rows": rows, "total": total, "split": in_short(table.get("split"))}


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 10**12


def _samples(answers: JsonObject) -> tuple[list[list[str]], str]:
    """Text, right answer, and answers before and after, of each sample; and the split that they are of."""
    kept = answers.get("samples")
    asked = kept.get("asked") if isinstance(kept, dict) else None
    if not isinstance(kept, dict) or not isinstance(asked, list):
        return [], ""
    rows = [[_text(item.get(name)) for name in SAMPLE] for item in asked[:MOST_SAMPLES] if isinstance(item, dict)]
    return rows, in_short(kept.get("split"))


def _text(value: object) -> str:
    """A text of some lines; a dash where there is none."""
    if not isinstance(value, str):
        return "-"
    return printable(value if len(value) <= LONGEST_TEXT else f"{value[: LONGEST_TEXT - 1]}…", keep="\n")


def _value(value: object) -> str:
    number = as_number(value)
    if number is None:
        return "not finite" if value is None else "not a number that fits"
    return figure(number)


def _event(event: JsonObject) -> str:
    details = [(name, value) for name, value in event.items() if name not in ("time", "event", "step")]
    more = ", ".join(f"{shortened(name)} {in_short(value)}" for name, value in details[:MOST_DETAILS])
    return f"{in_short(event.get('event'))} after step {in_short(event.get('step'))}{f' ({more})' if more else ''}"


def _some_of(tags: list[str]) -> str:
    named = ", ".join(shortened(tag) for tag in tags[:MOST_NAMES])
    return f"{named} and {len(tags) - MOST_NAMES:,} more" if len(tags) > MOST_NAMES else named
