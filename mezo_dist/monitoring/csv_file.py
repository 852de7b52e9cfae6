"""``metrics.csv`` in a run folder: one row for each step, for spreadsheets (``monitor: [csv]``)."""

from __future__ import annotations

import csv
import io
import logging
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import final

from mezo_dist.json_types import JsonObject
from mezo_dist.monitoring.run_data import METRICS, read_scalars
from mezo_dist.storage.files import open_in_place, open_log, replace_file

log = logging.getLogger(__name__)
FILE = "metrics.csv"
Row = dict[str, str]
"""Column -> what stands there."""


@final
class CsvFile:
    """A `CurveWriter` (see `mezo_dist.monitoring.curve_writers`).

    A row holds all that is known after so many steps, so it is written when the next step begins, or at the end. A tag
    that was not seen before is a new column, for which the file is written anew. The file of a run that goes on is made
    again of metrics.jsonl (of as much as `read_scalars` reads), up to where it goes on: no step stands there twice.

    Args:
        folder: of the run.
        first_step: steps done before; None: the run begins anew.
    """

    def __init__(self, folder: Path, first_step: int | None) -> None:
        self._path = folder / FILE
        rows = _recorded(folder / METRICS, first_step) if first_step is not None else []
        self._columns = ["step", *dict.fromkeys(name for row in rows for name in row if name != "step")]
        # What comes after first_step steps, such as a last evaluation, belongs to their row.
        self._row: Row = rows.pop() if rows and rows[-1]["step"] == str(first_step) else {}
        self._write_anew(rows)

    def settings(self, settings: JsonObject) -> None:
        """See `CurveWriter`. A table has no place for them; config.yaml has."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `CurveWriter`. What is not finite is left empty."""
        if self._row.get("step") != str(step):
            self._finish_row()
        self._row |= {"step": str(step), **_cells(scalars)}

    def close(self, *, finished: bool) -> None:
        """See `CurveWriter`."""
        self._finish_row()

    def _finish_row(self) -> None:
        row, self._row = self._row, {}
        if not row:
            return
        new = [name for name in row if name not in self._columns]
        if new:
            with os.fdopen(open_in_place(self._path), encoding="utf-8", newline="") as file:
                older = list(csv.DictReader(file))
            self._columns += new
            self._write_anew([*older, row])
        else:
            with open_log(self._path) as file:
                file.write(self._text([row]))

    def _write_anew(self, rows: Iterable[Row]) -> None:
        header = dict(zip(self._columns, self._columns, strict=True))
        replace_file(self._path, self._text([header, *rows]).encode())

    def _text(self, rows: Iterable[Row]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self._columns, restval="", lineterminator="\n").writerows(rows)
        return text.getvalue()


def _cells(scalars: Mapping[str, float]) -> Row:
    return {tag: repr(float(value)) if math.isfinite(value) else "" for tag, value in scalars.items()}


def _recorded(path: Path, last_step: int) -> list[Row]:
    """The rows of a metrics.jsonl, up to that after ``last_step`` steps."""
    problems: list[str] = []
    rows: dict[int, Row] = {}
    for tag, series in read_scalars(path, problems).items():
        for step, value in series.items():
            if step <= last_step:
                rows.setdefault(step, {"step": str(step)}).update(_cells({tag: value}))
    for problem in problems:
        log.warning("%s", problem)
    return [rows[step] for step in sorted(rows)]
