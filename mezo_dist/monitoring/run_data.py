"""The contents of a run folder's files, read so that no content can stop the reader.

Only the trajectory must be sound. The other files are for people: what is missing is empty here, and what is damaged,
edited, too large or no regular file is left out, with a line in `RunData.problems`.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mezo_dist.errors import printable
from mezo_dist.json_types import JsonObject
from mezo_dist.storage import trajectory
from mezo_dist.storage.files import open_in_place, read_in_place
from mezo_dist.storage.run_files import ANSWERS, CONFIG, EVENTS, RESULTS

METRICS = "metrics.jsonl"
"""A JSON object."""
Series = dict[int, float]
"""Steps done -> value."""
MOST_LOG_BYTES = 64 << 20
"""The end of a log that is read: some hundred thousand steps."""
MOST_LINES = 500_000
MOST_LINE_BYTES = 2 << 20
MOST_FILE_BYTES = 1 << 20
"""Size up to which results.json, answers.json and config.yaml are read."""
MOST_TAGS = 1000
LARGEST = 1e100
"""Numbers beyond are not drawn: no measurement is so large, and the arithmetic of a plot overflows."""
LARGEST_STEP = 10**12


@dataclass(frozen=True)
class RunData:
    """One run, as its folder tells it."""

    folder: Path
    log: trajectory.Log
    scalars: dict[str, Series]
    """Tag -> series, from metrics.jsonl. Where a step has two values (it was done again) the last one counts."""
    events: list[JsonObject]
    results: JsonObject
    answers: JsonObject
    """What answers.json holds."""
    config: str
    """The text of config.yaml."""
    problems: list[str]
    """What could not be read, a line each."""


def read_run(folder: Path) -> RunData:
    """Read the run in ``folder``.

    Raises:
        UserError: there is no run, or its trajectory is damaged.
    """
    log = trajectory.read(folder / trajectory.FILE)
    problems: list[str] = []
    scalars = read_scalars(folder / METRICS, problems)
    events = list(_json_lines(folder / EVENTS, problems))
    results = _read_object(folder / RESULTS, problems)
    answers = _read_object(folder / ANSWERS, problems)
    config = printable(_read_text(folder / CONFIG, problems).replace("\r\n", "\n"), keep="\n\t")
    return RunData(folder, log, scalars, events, results, answers, config, problems)


def as_number(value: object) -> float | None:
    """A JSON value as a number, None if it is none, not finite, or larger than `LARGEST`."""
    if type(value) is not int and type(value) is not float:
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) <= LARGEST else None  # False for NaN


def read_scalars(path: Path, problems: list[str]) -> dict[str, Series]:
    """The series in a metrics.jsonl.

    Args:
        path: of the file.
        problems: gets a line for each kind of content that is left out.
    """
    series: dict[str, Series] = {}
    no_steps = no_numbers = no_room = 0
    for line in _json_lines(path, problems):
        step, scalars = line.get("step"), line.get("scalars")
        if type(step) is not int or not 0 <= step <= LARGEST_STEP or not isinstance(scalars, dict):
            no_steps += 1
            continue
        for tag, value in scalars.items():
            number = as_number(value)
            if number is None:
                no_numbers += value is not None  # null: a measurement that was not finite
            elif tag in series or len(series) < MOST_TAGS:
                series.setdefault(tag, {})[step] = number
            else:
                no_room += 1
    for count, what in (
        (no_steps, "lines without a step and its scalars are left out"),
        (no_numbers, "values that are no numbers, or too large for a plot, are left out"),
        (no_room, f"values of tags after the first {MOST_TAGS:,} are left out"),
    ):
        if count:
            problems.append(f"{path.name}: {count:,} {what}")
    return {tag: dict(sorted(values.items())) for tag, values in series.items()}


def _json_lines(path: Path, problems: list[str]) -> Iterator[JsonObject]:
    """The JSON objects in a log, from its last `MOST_LOG_BYTES`."""
    damaged, first = 0, 0
    for number, line in enumerate(_lines(path, problems), start=1):
        content = _parse(line) if len(line) <= MOST_LINE_BYTES else None
        if isinstance(content, dict):
            yield content
        else:
            damaged, first = damaged + 1, first or number
    if damaged:
        where = f"the first of them is line {first:,} of those read"
        problems.append(f"{path.name}: {damaged:,} lines that are no JSON objects are left out; {where}")


def _lines(path: Path, problems: list[str]) -> Iterator[bytes]:
    try:
        with os.fdopen(open_in_place(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - MOST_LOG_BYTES))
            content = io.BytesIO(file.read(MOST_LOG_BYTES))
    except FileNotFoundError:
        return
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror}")
        return
    if size > MOST_LOG_BYTES:
        problems.append(f"{path.name}: of {size:,} bytes the last {MOST_LOG_BYTES:,} are read")
        content.readline()  # the line that the cut goes through
    for number, line in enumerate(content):
        if number == MOST_LINES:
            problems.append(f"{path.name}: lines after the first {MOST_LINES:,} are left out")
            return
        yield line


def _parse(text: str | bytes) -> object:
    """The value of a JSON text, None if it is none (or null)."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # too deep, or an integer of more digits than Python reads
        return None


def _read_text(path: Path, problems: list[str]) -> str:
    try:
        return read_in_place(path, MOST_FILE_BYTES).decode()
    except FileNotFoundError:
        return ""
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror}")
    except UnicodeDecodeError:
        problems.append(f"{path.name} cannot be read: it is not UTF-8 text")
    return ""


def _read_object(path: Path, problems: list[str]) -> JsonObject:
    before = len(problems)
    text = _read_text(path, problems)
    content = _parse(text)
    if isinstance(content, dict):
        return content
    if len(problems) == before and os.path.lexists(path):
        problems.append(f"{path.name} cannot be read: it is no JSON object")
    return {}
