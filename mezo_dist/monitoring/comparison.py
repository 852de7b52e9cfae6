"""``mezo-dist report`` about several runs: their curves over each other, final figures, and settings that differ."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence

from mezo_dist.errors import printable
from mezo_dist.json_types import JsonObject
from mezo_dist.monitoring.outcome import duration, figures, in_words, passes_until, processes, seconds, setting, shown
from mezo_dist.monitoring.page import LONGEST_VALUE, fill
from mezo_dist.monitoring.plots import Panel, draw, shortened
from mezo_dist.monitoring.run_data import RunData, Series, as_number
from mezo_dist.monitoring.scalars import train_loss_tag

TEMPLATE = "comparison.html.jinja"
MOST_METRICS = 6
"""Validation figures that are drawn, and figures of a split in the table."""
MOST_SETTINGS = 200
NO_SETTINGS = ("origin", "output.dir", "output.if_exists")
"""Settings that always differ, and tell nothing."""
ABSENT = "-"


def render_comparison(runs: Sequence[RunData]) -> str:
    """The page about several runs."""
    names = run_names(runs)
    passes = [passes_until(data) for data in runs]
    plots = _panels(runs, names, passes)
    differing, num_more = _differences(runs)
    problems = [f"{name}: {problem}" for name, data in zip(names, runs, strict=True) for problem in data.problems]
    return fill(
        TEMPLATE,
        title=f"{len(runs)} runs",
        names=names,
        sentences=[(name, in_words(data)) for name, data in zip(names, runs, strict=True)],
        problems=problems,
        figures=_figures(runs, passes),
        plots=[draw(panel) for panel in plots],
        uncounted=", ".join(name for name, series in zip(names, passes, strict=True) if not series),
        calibrated=any(_is_calibrated(data) for data in runs),
        differing=differing,
        num_more=num_more,
    )


def run_names(runs: Sequence[RunData]) -> list[str]:
    """What runs are called: the shortest ends of their paths that tell them apart."""
    parts = [os.path.realpath(data.folder).split(os.sep)[1:] or ["/"] for data in runs]
    depth = 1
    while len({tuple(some[-depth:]) for some in parts}) < len({tuple(some) for some in parts}):
        depth += 1
    names = [shortened(printable("/".join(some[-depth:])), LONGEST_VALUE) for some in parts]
    return [name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names, start=1)]


def _is_calibrated(data: RunData) -> bool:
    return setting(data.log.header, "train", "calibrate") is True


def _panels(runs: Sequence[RunData], names: Sequence[str], passes: Sequence[Series]) -> list[Panel]:
    """Training losses and validation figures, each against steps and against forward passes."""
    panels = []
    for is_calibrated, title in ((False, "Training loss"), (True, "Calibrated training loss")):
        tag = train_loss_tag(calibrated=is_calibrated)
        losses = {
            name: data.scalars.get(tag, {})
            for name, data in zip(names, runs, strict=True)
            if _is_calibrated(data) == is_calibrated
        }
        unit = "calibrated loss (biased low)" if is_calibrated else "mean loss of the batch"
        panels += _both(title, unit, losses, dict(zip(names, passes, strict=True)), smooth=True)
    prefix = "eval/validation/"
    tags = dict.fromkeys(tag for data in runs for tag in sorted(data.scalars) if tag.startswith(prefix))
    for tag in list(tags)[:MOST_METRICS]:
        series = {name: data.scalars.get(tag, {}) for name, data in zip(names, runs, strict=True)}
        metric = tag.removeprefix(prefix)
        panels += _both(f"Validation: {metric}", metric, series, dict(zip(names, passes, strict=True)))
    return panels


def _both(
    title: str, unit: str, series: Mapping[str, Series], passes: Mapping[str, Series], *, smooth: bool = False
) -> list[Panel]:
    """One plot against steps, and one against forward passes for the runs that counted them.

    Args:
        title: of both.
        unit: of the vertical axis.
        series: by run.
        passes: steps done -> forward passes, by run.
        smooth: see `Panel`.
    """
    by_step = {name: values for name, values in series.items() if values}
    by_pass = {
        name: {round(passes[name][step]): value for step, value in values.items() if step in passes[name]}
        for name, values in by_step.items()
    }
    by_pass = {name: values for name, values in by_pass.items() if values}
    panels = [Panel(title, unit, by_step, smooth)] if by_step else []
    return panels + ([Panel(title, unit, by_pass, smooth, "forward passes of one sample")] if by_pass else [])


def _figures(runs: Sequence[RunData], passes: Sequence[Series]) -> list[tuple[str, list[str]]]:
    """Rows of the table of final figures: name, and a value for each run."""
    times, ranks = [seconds(data) for data in runs], [processes(data) for data in runs]
    rows = [
        ("steps", [f"{len(data.log.steps):,}" for data in runs]),
        ("forward passes", [f"{round(some[max(some)]):,}" if some else ABSENT for some in passes]),
        ("time of the steps", [ABSENT if time is None else duration(time) for time in times]),
        ("processes", [ABSENT if number is None else f"{number:,}" for number in ranks]),
        ("trajectory, bytes", [f"{data.log.size:,}" for data in runs]),
    ]
    for what, key in (("test, before", "before"), ("test, after", "after"), ("validation, after", "validation")):
        names = dict.fromkeys(name for data in runs for name in figures(data, key))
        for name in list(names)[:MOST_METRICS]:
            rows.append((shortened(f"{what}: {name}"), [_figure(figures(data, key), name) for data in runs]))
    return rows


def _figure(values: JsonObject, name: str) -> str:
    number = as_number(values.get(name))
    if number is None:
        return "not finite" if name in values else ABSENT
    return shown(name, number)


def _differences(runs: Sequence[RunData]) -> tuple[list[tuple[str, list[str]]], int]:
    """Rows of the table of settings in which runs differ, and how many are left out for want of room."""
    settings = [_facts(data) for data in runs]
    names = sorted({name for some in settings for name in some})
    differing = [name for name in names if len({some.get(name, ABSENT) for some in settings}) > 1]
    rows = [
        (shortened(name), [shortened(some.get(name, ABSENT), LONGEST_VALUE) for some in settings])
        for name in differing[:MOST_SETTINGS]
    ]
    return rows, max(0, len(differing) - MOST_SETTINGS)


def _facts(data: RunData) -> dict[str, str]:
    """Setting -> value as JSON, and what else makes runs differ."""
    header = data.log.header
    facts = {
        "(base model's fingerprint)": header.base_fingerprint,
        "(directions)": header.law_version,
        "(version of mezo_dist)": header.version,
        **{f"(data of the {split} split)": digest for split, digest in header.data.items()},
    }
    _flatten(header.config, "", facts)
    return {name: value for name, value in facts.items() if not name.startswith(NO_SETTINGS)}


def _flatten(settings: JsonObject, prefix: str, into: dict[str, str]) -> None:
    for name, value in settings.items():
        if isinstance(value, dict) and value and prefix.count(".") < 8:
            _flatten(value, f"{prefix}{name}.", into)
        else:
            into[prefix + name] = value if isinstance(value, str) else json.dumps(value)[: LONGEST_VALUE + 1]
