"""From a task file to rows: load the data set, leave out what does not count, cut the splits."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezo_dist.assets.registry import is_demo, resolve_data
from mezo_dist.config.task import ANSWER, Split, TaskSettings
from mezo_dist.config.values import Where, names_of
from mezo_dist.directions.seeds import shuffled
from mezo_dist.errors import UserError
from mezo_dist.tasks.fields import Row, listed, lookup
from mezo_dist.tasks.files import TYPES, Table, local_files, read_file
from mezo_dist.tasks.hub import SAVED, read_hub, read_saved
from mezo_dist.tasks.templates import names_in

log = logging.getLogger(__name__)
SPLITS = ("train", "validation", "test")
"""In the order in which they are cut."""
Tell = Callable[[int, str], None]
"""What is said of the rows: a level of logging, and a text."""
AT_ONCE = 10_000
"""Rows that are looked at together to see which of them count."""


@dataclass(frozen=True)
class Rows:
    """The rows of the three splits; they never share a row."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]


def _to_log(level: int, text: str) -> None:
    log.log(level, "%s", text)


def load_rows(task: TaskSettings, tell: Tell = _to_log) -> Rows:
    """Load the task's data and cut its splits.

    Splits of the same source are consecutive pieces of one permutation of the rows in it that ``task.where`` leaves, a
    function of ``task.splits.seed`` alone, in the order train, validation, test.

    Args:
        task: the settings.
        tell: is told which rows do not count, and which fields are null.

    Raises:
        UserError: data not found, unknown split, empty split, or too few rows; says which and what there is.
    """
    _check_texts(task)
    data = load_tables(task.data, task.subset, task.revision)
    orders: dict[str, Sequence[int]] = {}
    has_nulls: dict[str, bool] = {}
    taken: dict[str, int] = {}
    rows: dict[str, list[Row]] = {}
    for name in SPLITS:
        split: Split = getattr(task.splits, name)
        if split.source not in data:
            raise UserError(
                f"task.splits.{name}.source: {task.data} has no split {split.source!r}, only {listed(sorted(data))}"
            )
        if split.source not in orders:
            kept = _kept(task, split.source, data[split.source], tell)
            places = shuffled(len(kept), task.splits.seed, "split", split.source)
            has_nulls[split.source] = data[split.source].has_nulls()  # in their order in memory, which is faster
            orders[split.source] = places if isinstance(kept, range) else [kept[i] for i in places]
        order = orders[split.source]
        start = taken.get(split.source, 0)
        left = len(order) - start
        size = left if split.size is None else split.size
        if left == 0 or size > left:
            leaves = " that task.where leaves" if len(order) < len(data[split.source]) else ""
            remedy = f", as in --task.splits.{name}.size={left}" if left else ""
            taken_before = f", of which {start} are taken by the splits before" if start else ""
            raise UserError(
                f"task.splits.{name}.size: {size or 'some'} samples wanted, but {task.data} split {split.source!r} has "
                f"{len(order)}{leaves}{taken_before}; make a split smaller{remedy}"
            )
        taken[split.source] = start + size
        rows[name] = data[split.source].take(order[start : start + size])
        if has_nulls[split.source]:
            _tell_nulls(task, name, rows[name], tell)
    return Rows(**rows)


def _check_texts(task: TaskSettings) -> None:
    """Raise UserError if a text is the same for all rows, as where the braces around a field were forgotten."""
    plain, prompt = getattr(task, "plain", ()), getattr(task, "prompt", "")
    if plain and not any("{" in template for template in plain):
        name, text = "plain", plain[0]
    elif task.kind == "classification" and names_in(prompt) == {ANSWER}:
        name, text = "prompt", prompt
    else:
        return
    raise UserError(
        f"task.{name}: {text!r} names no field of the data, so all samples would be one text; write fields in double "
        "braces, as in {{ text }}"
    )


def uses_cache(task: TaskSettings) -> bool:
    """The data are kept in the cache of ``datasets``, which ranks may share."""
    path = Path(task.data).expanduser()
    if is_demo(task.data) or not path.exists():
        return not is_demo(task.data) and path.suffix not in TYPES
    return not is_saved(path) and any(file.suffix in (".parquet", ".arrow") for file in local_files(path).values())


def is_saved(path: Path) -> bool:
    """The path is a folder written by ``save_to_disk`` of ``datasets``."""
    return any((path / name).exists() for name in SAVED)


def load_tables(data: str, subset: str | None = None, revision: str | None = None) -> Mapping[str, Table]:
    """All splits of a data set, as they are.

    Args:
        data: as ``task.data``.
        subset: as ``task.subset``.
        revision: as ``task.revision``.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if is_demo(data):
        return {split: read_file(path) for split, path in resolve_data(data).items()}
    path = Path(data).expanduser()
    if is_saved(path):
        return read_saved(path)
    if path.suffix in TYPES or path.exists():
        # One by one: splits may differ in their fields, and may be called "all".
        return {split: read_file(file) for split, file in local_files(path).items()}
    return read_hub(data, subset, revision)


# Which rows count


def _kept(task: TaskSettings, source: str, table: Table, tell: Tell) -> Sequence[int]:
    """Indices of the rows that ``task.where`` leaves.

    Args:
        task: has the conditions.
        source: name of the split.
        table: its rows.
        tell: is told how many those are, and what the others had.
    """
    where = task.where
    if not (where.keep or where.drop):
        return range(len(table))
    kept: list[int] = []
    counts: Counter[str] = Counter()
    for start in range(0, len(table), AT_ONCE):
        indices = range(start, min(start + AT_ONCE, len(table)))
        for index, row in zip(indices, table.take(indices), strict=True):
            reason = _left_out(row, where)
            if reason is None:
                kept.append(index)
            else:
                counts[reason] += 1
    reasons = "; ".join(f"{count} with {reason}" for reason, count in counts.most_common(10)) or "none"
    counted = f"{len(kept)} of the {len(table)} rows of split {source!r} of {task.data}"
    tell(logging.INFO, f"task.where leaves {counted}; left out: {reasons}")
    if not kept:
        raise UserError(f"task.where: it leaves no row of split {source!r} of {task.data}")
    return kept


def _left_out(row: Row, where: Where) -> str | None:
    """Why a row does not count; None if it does."""
    for setting, conditions, is_kept in (("keep", where.keep, True), ("drop", where.drop, False)):
        for field, values in conditions.items():
            names = names_of(lookup(row, field, f"task.where.{setting}"))
            if any(name in names_of(value) for value in values for name in names) is not is_kept:
                return f"{field}: {names[-1][:40]}"
    return None


def _tell_nulls(task: TaskSettings, split: str, rows: list[Row], tell: Tell) -> None:
    """Warn of fields that the task reads and that are null in some rows.

    Args:
        task: reads fields.
        split: its name.
        rows: of the split.
        tell: is told.
    """
    read = {name for template in task.templates for name in names_in(template)}
    read |= {*task.fields, *(task.truncate or ())}
    all_nulls: Counter[Any] = Counter(
        name for row in rows if None in row.values() for name, value in row.items() if value is None
    )
    nulls = Counter({name: count for name, count in all_nulls.items() if _is_read(name, read)})
    if nulls:
        counted = ", ".join(f"{name} in {count}" for name, count in nulls.most_common(10))
        tell(logging.WARNING, f"fields that are null, of the {len(rows)} rows of the {split} split: {counted}")


def _is_read(name: str, read: set[str]) -> bool:
    return name in read or any(path.startswith(f"{name}.") for path in read)
