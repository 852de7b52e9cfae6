"""Sums up what `learning_curves.py` has found: plots, and tables in Markdown.

A calibrated model needs offsets for its predictions, which take a forward pass of every training sample, once. These
passes count: every point of a calibrated run has them on top of those of training, from its start on.

All runs of a contender do the same work per forward pass in one setting, on any data set, as the frozen blocks are
computed once: the seconds shown are at the pace of the fastest of them, for machines are shared. Seconds are those of
training alone.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from curve_contenders import PRESETS

Curves = dict[str, list[list[list[float]]]]
"""Label -> points of each seed that was not tuned on."""
PASSES, SECONDS, _, VALIDATION, _, TEST = range(6)
FITTING = 512
"""Passes that the offsets take, where a record is too old to say: the training samples of all presets that were run."""


def report(folder: Path, preset: str) -> str:
    """Write plots and tables of everything that is there; the tables."""
    curves_of: dict[str, dict[str, Curves]] = {}
    rates: dict[tuple[str, str, str], float] = {}
    for setting in PRESETS[preset].settings:
        pace = _pace(folder, f"learning_curves-{preset}-{setting}-*.jsonl")
        for task in PRESETS[preset].tasks:
            path = folder / f"learning_curves-{preset}-{setting}-{task}.jsonl"
            for record in _runs(path):
                if record["seed"]:
                    curves = curves_of.setdefault(setting, {}).setdefault(task, {})
                    curves.setdefault(record["label"], []).append(_timed(record, pace))
                    rates[setting, task, record["label"]] = record["lr"]
    for setting, tasks in curves_of.items():
        plot(tasks, setting, folder / f"learning_curves-{preset}-{setting}.png")
    lines = [line for setting, tasks in curves_of.items() for line in tables(preset, setting, tasks, rates)]
    text = "\n".join(lines) + "\n"
    (folder / f"learning_curves-{preset}.md").write_text(text)
    return text


def _runs(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [record for record in map(json.loads, lines) if record["kind"] == "run"]


def _pace(folder: Path, files: str) -> dict[str, float]:
    """Seconds per forward pass of every contender, at best."""
    pace: dict[str, float] = {}
    for record in (record for path in folder.glob(files) for record in _runs(path)):
        end = record["points"][-1]
        pace[record["label"]] = min(end[SECONDS] / end[PASSES], pace.get(record["label"], math.inf))
    return pace


def _timed(record: dict[str, Any], pace: dict[str, float]) -> list[list[float]]:
    """The points of a run, at that pace; their passes are all that it took to get there."""
    fitting = record.get("fitting", FITTING if _is_calibrated(record["label"]) else 0)
    return [[p[PASSES] + fitting, p[PASSES] * pace[record["label"]], *p[2:]] for p in record["points"]]


def tables(preset: str, setting: str, tasks: dict[str, Curves], rates: dict[tuple[str, str, str], float]) -> list[str]:
    """Test accuracy at a quarter of the passes and at the end; passes to two goals; rates and seconds.

    Args:
        preset: name of the preset.
        setting: name of the setting.
        tasks: curves by data set.
        rates: the rate of every contender, by setting, data set and label.
    """
    about = PRESETS[preset]
    budgets = {task: about.budget * about.shares.get((setting, task), 1.0) for task in tasks}
    labels = list(dict.fromkeys(label for curves in tasks.values() for label in curves))
    seeds = sorted({len(points) for curves in tasks.values() for points in curves.values()})
    lines = [f"### {setting}", "", f"Test accuracy in % after a quarter of the passes and after all; {seeds} seeds", ""]
    lines += _row("", *(cell for task in tasks for cell in (f"{task}: a quarter", "all")))
    lines += _row(*["---"] * (1 + 2 * len(tasks)))
    for name, calibrated in {"before": False, "before, calibrated": True}.items():
        firsts = [_firsts(curves, calibrated=calibrated) for curves in tasks.values()]
        lines += _row(name, *(cell for values in firsts for cell in ("", _spread(values) if values else "-")))
    for label in labels:
        accuracies = [_accuracies(curves, label, budgets[task]) for task, curves in tasks.items()]
        lines += _row(label, *(cell for cells in accuracies for cell in cells))
    lines += ["", "Passes until validation accuracy is MeZO's best, and AdamW's best less a point", ""]
    if any(map(_is_calibrated, labels)):
        lines += ["Calibrated runs: with those that fit the offsets for predictions.", ""]
    goals = [(task, wanted) for task, curves in tasks.items() for wanted in _goals(curves)]
    lines += _row("", *(f"{task}: {100 * wanted:.1f}" for task, wanted in goals))
    lines += _row(*["---"] * (1 + len(goals)))
    for label in labels:
        lines += _row(label, *(_needs(tasks[task].get(label), wanted) for task, wanted in goals))
    lines += ["", "Learning rate, and seconds of training", ""]
    lines += [
        *_row("", *(cell for task in tasks for cell in (f"{task}: lr", "s"))),
        *_row(*["---"] * (1 + 2 * len(tasks))),
    ]
    for label in labels:
        pairs = [(f"{rates.get((setting, task, label), '-')}", _seconds(tasks[task].get(label))) for task in tasks]
        lines += _row(label, *(cell for pair in pairs for cell in pair))
    return [*lines, ""]


def _row(*cells: str) -> list[str]:
    return [f"| {' | '.join(cells)} |"]


def _firsts(curves: Curves, *, calibrated: bool) -> list[float]:
    chosen = [seeds for label, seeds in curves.items() if _is_calibrated(label) == calibrated]
    return [points[0][TEST] for seeds in chosen for points in seeds]


def _is_calibrated(label: str) -> bool:
    return "calibrated" in label


def _accuracies(curves: Curves, label: str, budget: float) -> tuple[str, str]:
    """At a quarter of the budget and at the end, "-" where there is nothing."""
    if label not in curves:
        return "-", "-"
    early = [point[TEST] for points in curves[label] if (point := _at(points, budget / 4))]
    return _spread(early) if early else "-", _spread([points[-1][TEST] for points in curves[label]])


def _seconds(seeds: list[list[list[float]]] | None) -> str:
    return f"{statistics.mean(points[-1][SECONDS] for points in seeds):.1f}" if seeds else "-"


def _goals(curves: Curves) -> list[float]:
    """MeZO's best validation accuracy; and AdamW's less a point, if it was there."""
    adamw = [goal(curves, "AdamW") - 0.01] if "AdamW" in curves else []
    return [goal(curves, "MeZO, batch"), *adamw]


def goal(curves: Curves, labels: str) -> float:
    """Best validation accuracy, averaged over the seeds, on the curves with plain losses whose labels begin so."""
    chosen = [points for label, points in curves.items() if label.startswith(labels) and not _is_calibrated(label)]
    means = [row[VALIDATION] for points in chosen for row in mean(points)]
    return max(means, default=1.0)


def mean(seeds: list[list[list[float]]]) -> list[list[float]]:
    """Over seeds, point by point; runs that diverged have fewer points."""
    return [[statistics.mean(column) for column in zip(*rows, strict=True)] for rows in zip(*seeds, strict=False)]


def _needs(seeds: list[list[list[float]]] | None, wanted: float) -> str:
    """Passes until the mean curve reaches this validation accuracy."""
    for row in mean(seeds or []):
        if row[VALIDATION] >= wanted:
            return f"{row[PASSES]:,.0f}"
    return "-"


def _at(points: list[list[float]], passes: float) -> list[float] | None:
    """The last point that took no more passes, but for an eighth of them: the last step may end a little later."""
    return next((point for point in reversed(points) if point[PASSES] <= 1.125 * passes), None)


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * deviation:.1f}"


def plot(tasks: dict[str, Curves], setting: str, path: Path) -> None:
    """Test accuracy over forward passes, and over seconds: means over seeds, with a band from the worst to the best."""
    from matplotlib.figure import Figure
    from PIL import Image

    labels = list(dict.fromkeys(label for curves in tasks.values() for label in curves))
    figure = Figure(figsize=(4.2 * len(tasks), 7.5), layout="constrained")
    panels = figure.subplots(2, len(tasks), squeeze=False)
    for (task, curves), column in zip(tasks.items(), panels.T, strict=True):
        for axes, over in zip(column, (PASSES, SECONDS), strict=True):
            for label, seeds in curves.items():
                rows = list(zip(*seeds, strict=False))[1:]
                x = [statistics.mean(row[over] for row in points) for points in rows]
                y = [[row[TEST] for row in points] for points in rows]
                number = labels.index(label)
                style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}
                axes.plot(x, [statistics.mean(values) for values in y], label=label, linewidth=1.2, **style)
                axes.fill_between(x, list(map(min, y)), list(map(max, y)), alpha=0.1, linewidth=0, color=style["color"])
            axes.set_xscale("log")
            axes.set_xlabel("forward passes of one sample" if over == PASSES else "seconds of training")
        column[0].set_title(task)
    for axes in panels[:, 0]:
        axes.set_ylabel("test accuracy")
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize="small")
    figure.suptitle(f"{setting}: mean over seeds, from the worst to the best")
    figure.savefig(path, dpi=80)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)  # a third of the size
