"""``mezo-dist report``: one HTML page about a run, from the files in its folder. It needs nothing but a browser."""

from __future__ import annotations

import logging
import shlex
from importlib import resources
from pathlib import Path

import jinja2

from mezo_dist.errors import UserError, printable
from mezo_dist.json_types import JsonObject
from mezo_dist.monitoring.plots import draw, panels, shortened
from mezo_dist.monitoring.run_data import RunData, as_number, read_run
from mezo_dist.storage import trajectory
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
MOST_NAMES = 10
"""Tags named among those that are not drawn."""
LONGEST_VALUE = 200


def write(folder: Path, path: Path) -> None:
    """Write the report of the run in ``folder`` to ``path``. What cannot be read is named on the page and logged.

    Raises:
        UserError: no run there, or its trajectory is damaged; matplotlib is missing; ``path`` cannot be written.
    """
    data = read_run(folder)
    for problem in data.problems:
        log.warning("%s", problem)
    try:
        replace_file(path, render(data).encode())
    except OSError as error:
        raise UserError(f"--to {path}: cannot be written ({error.strerror})") from error


def render(data: RunData) -> str:
    """The page: one file, which loads nothing from elsewhere."""
    template = resources.files("mezo_dist.monitoring").joinpath(TEMPLATE).read_text(encoding="utf-8")
    # Every text is escaped but the plots (`safe` in the template): matplotlib writes those, and escapes names in them.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    calibrated = _setting(data.log.header, "train", "calibrate") is True
    drawn, left_out = panels(data, calibrated=calibrated)
    metrics, outcome = _outcome(data.results)
    return environment.from_string(template).render(
        title=f"{_words(data.log.header.base_model)} on {_words(_setting(data.log.header, 'task', 'name'))}",
        facts=_facts(data),
        problems=data.problems,
        metrics=metrics,
        outcome=outcome,
        calibrated=calibrated,
        plots=[draw(panel) for panel in drawn],
        left_out=_some_of(left_out),
        events=[(_words(event.get("time")), _event(event)) for event in data.events[-MOST_EVENTS:]],
        num_earlier_events=max(0, len(data.events) - MOST_EVENTS),
        config=data.config,
        folder=shlex.quote(printable(str(data.folder))),
    )


def _facts(data: RunData) -> list[tuple[str, str]]:
    recorded, header, done = data.log, data.log.header, len(data.log.steps)
    skipped = sum(bool(step.skipped) for step in recorded.steps)
    kinds = [event.get("event") for event in data.events]
    last = max(recorded.marks, default=None)
    return [
        ("Run folder", printable(str(data.folder))),
        (
            "Base model",
            f"{_words(header.base_model)} (fingerprint {_words(header.base_fingerprint)}; {_words(header.weights)})",
        ),
        ("Algorithm", f"{_words(_setting(header, 'algorithm', 'name'))}, directions {_words(header.law_version)}"),
        ("Steps", f"{done} of {_words(_setting(header, 'train', 'steps'))}"),
        ("Skipped", f"{skipped} steps without a finite loss"),
        (
            "Trajectory",
            f"{recorded.size:,} bytes, {recorded.size / max(1, done):.0f} per step: with the base model, it is the "
            "fine-tuned one",
        ),
        (
            "Weights",
            "no fingerprint yet" if last is None else f"{_words(recorded.marks[last].weights)} after step {last}",
        ),
        (
            "Interruptions",
            f"{kinds.count('resumed')} restarts, {kinds.count('stopped')} times told to stop, "
            f"{kinds.count('snapshot failed')} snapshots failed",
        ),
        ("Version", f"mezo_dist {_words(header.version)}"),
    ]


def _setting(header: trajectory.Header, section: str, name: str) -> object:
    """A setting of the run; ``?`` if its config has none of that name.

    Args:
        header: of the trajectory.
        section: of the config.
        name: of the setting in it.
    """
    settings = header.config.get(section)
    return settings.get(name, "?") if isinstance(settings, dict) else "?"


def _outcome(results: JsonObject) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Names of the metrics, and for each split that was evaluated its name and values."""
    splits = {name: values for name, key in SPLITS.items() if isinstance(values := results.get(key), dict) and values}
    names = list(dict.fromkeys(name for values in splits.values() for name in values))[:MOST_METRICS]
    rows = [(split, [_value(values[n]) if n in values else "" for n in names]) for split, values in splits.items()]
    return [shortened(name) for name in names], rows


def _value(value: object) -> str:
    number = as_number(value)
    if number is None:
        return "not finite" if value is None else "not a number that fits"
    return f"{number:.4f}" if abs(number) < 1e6 else f"{number:.4g}"


def _event(event: JsonObject) -> str:
    details = [(name, value) for name, value in event.items() if name not in ("time", "event", "step")]
    more = ", ".join(f"{shortened(name)} {_words(value)}" for name, value in details[:MOST_DETAILS])
    return f"{_words(event.get('event'))} after step {_words(event.get('step'))}{f' ({more})' if more else ''}"


def _some_of(tags: list[str]) -> str:
    named = ", ".join(shortened(tag) for tag in tags[:MOST_NAMES])
    return f"{named} and {len(tags) - MOST_NAMES:,} more" if len(tags) > MOST_NAMES else named


def _words(value: object) -> str:
    """A JSON value in a few words, however deep, long or large it is."""
    if isinstance(value, str):
        return shortened(value, LONGEST_VALUE)
    if isinstance(value, (list, dict)):
        return f"{len(value):,} {'values' if isinstance(value, list) else 'settings'}"
    if type(value) is int and abs(value) >= 10**18:
        return "a number of more than 18 digits"
    return "?" if value is None else str(value)
