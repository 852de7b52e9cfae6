"""What came out of a run, from the files in its folder: final figures, and one sentence in plain words."""

from __future__ import annotations

from dataclasses import dataclass

from mezo_dist.json_types import JsonObject
from mezo_dist.monitoring.run_data import RunData, Series, as_number
from mezo_dist.monitoring.scalars import figure
from mezo_dist.storage import trajectory

PASSES = "forward_passes_per_step"
SHARES = ("accuracy", "token-accuracy", "exact-match", "f1", "macro-f1", "rouge-l")
"""Figures that are shown as percentages."""


@dataclass(frozen=True)
class Change:
    """A figure of a split, before and after."""

    name: str
    split: str
    before: float | None
    after: float
    num_samples: int | None


def setting(header: trajectory.Header, section: str, name: str) -> object:
    """A setting of the run; ``?`` if its config has none of that name.

    Args:
        header: of the trajectory.
        section: of the config.
        name: of the setting in it.
    """
    settings = header.config.get(section)
    return settings.get(name, "?") if isinstance(settings, dict) else "?"


def change(data: RunData) -> Change | None:
    """How the task's metric changed: on the test split, or else on the validation split; None if neither is known.

    Without the metric, the loss stands in.
    """
    metric = setting(data.log.header, "task", "metric")
    for name in (metric if isinstance(metric, str) else "", "loss"):
        for split, before, after in (("test", "before", "after"), ("validation", "", "validation")):
            figures = data.results.get(after)
            last = as_number(figures.get(name)) if isinstance(figures, dict) else None
            series = data.scalars.get(f"eval/{split}/{name}", {})
            if last is None and len(series) > 1:
                last = series[max(series)]
            if last is None:
                continue
            older = data.results.get(before)
            first = as_number(older.get(name)) if isinstance(older, dict) else series.get(0)
            return Change(name, split, first, last, num_samples(data, split))
    return None


def num_samples(data: RunData, split: str) -> int | None:
    """Samples of a split, as results.json has them."""
    sizes = data.results.get("samples")
    size = sizes.get(split) if isinstance(sizes, dict) else None
    return size if type(size) is int and 0 < size < 10**12 else None


def passes_until(data: RunData) -> Series:
    """Steps done -> forward passes of one sample until then. Empty where they were not recorded.

    A step whose line is missing, because the run was killed before it was written, counts as much as the mean.
    """
    counted = {step: value for step, value in data.scalars.get(PASSES, {}).items() if value >= 0}
    if not counted:
        return {}
    mean, total, series = sum(counted.values()) / len(counted), 0.0, {0: 0.0}
    for step in range(1, len(data.log.steps) + 1):
        total += counted.get(step, mean)
        series[step] = total
    return series


def seconds(data: RunData) -> float | None:
    """Time of all steps; None if it is not known."""
    parts = [data.scalars.get(tag, {}) for tag in ("time/evaluate_s", "time/update_s")]
    if any(parts):
        return sum(sum(part.values()) for part in parts)
    return as_number(data.results.get("training_s"))


def processes(data: RunData) -> int | None:
    """Processes that took the last steps; None if it is not known."""
    ranks = [event.get("ranks") for event in data.events if event.get("event") in ("started", "resumed")]
    known = [number for number in ranks if type(number) is int and 0 < number < 10**6]
    return known[-1] if known else None


def figures(data: RunData, key: str) -> JsonObject:
    """The figures in results.json under ``before``, ``after`` or ``validation``; empty if there are none."""
    values = data.results.get(key)
    return values if isinstance(values, dict) else {}


def in_words(data: RunData) -> str:
    """One sentence for somebody who reads no more, and another if the run is not at its end."""
    done, wanted = len(data.log.steps), setting(data.log.header, "train", "steps")
    sentence = f"{_changed(change(data))} in {_counted(done, 'step')}{_effort(data)}."
    if type(wanted) is int and done < wanted < 10**12:
        sentence += f" The run is not finished: it is to have {wanted:,} steps."
    return sentence


def shown(name: str, value: float) -> str:
    """A figure for people: 81.7 %, or 0.4051."""
    if name in SHARES and 0 <= value <= 1:
        return f"{100 * value:.1f} %"
    return figure(value)


def duration(number: float) -> str:
    """Seconds in at most two units: ``4.2 s``, ``3 min 21 s``, ``2 h 5 min``."""
    if number < 10:
        return f"{number:.1f} s"
    minutes, whole = divmod(round(number), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {whole} s" if minutes else f"{whole} s"


def _changed(change: Change | None) -> str:
    if change is None:
        return "No trained weights have been evaluated yet"
    size = f"{change.num_samples:,} " if change.num_samples else "the "
    name = "The loss" if change.name == "loss" else change.name[:1].upper() + change.name[1:]
    where, after = f"{name} on {size}{change.split} samples", shown(change.name, change.after)
    if change.before is None:
        return f"{where} is {after}"
    before = shown(change.name, change.before)
    if before == after:
        return f"{where} stayed at {after}"
    verb = "rose" if change.after > change.before else "fell"
    return f"{where} {verb} from {before} to {after}"


def _effort(data: RunData) -> str:
    passes, time, ranks = passes_until(data), seconds(data), processes(data)
    parts = []
    if passes:
        parts.append(f"{round(passes[max(passes)]):,} forward passes")
    if time is not None and time >= 0:
        parts.append(duration(time) + (f" on {_counted(ranks, 'process')}" if ranks else ""))
    return f" ({', '.join(parts)})" if parts else ""


def _counted(number: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"
