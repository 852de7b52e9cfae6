"""From a task file to rows: load the data set, cut the splits."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezo_dist.assets import is_demo, resolve_data
from mezo_dist.directions.seeds import derive_seed
from mezo_dist.errors import UserError
from mezo_dist.tasks.task import Split, Task

log = logging.getLogger(__name__)
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Rows:
    """The rows of the three splits; they never share a row."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]


def load_rows(task: Task) -> Rows:
    """Load the task's data and cut its splits.

    Splits of the same source are consecutive pieces of one permutation of it, a function of ``task.splits.seed``
    alone, in the order train, validation, test.

    Raises:
        UserError: data not found, unknown split, empty split, or too few rows; says which and what there is.
    """
    data = _load(task)
    taken: dict[str, int] = {}
    rows: dict[str, list[Row]] = {}
    for name in ("train", "validation", "test"):
        split: Split = getattr(task.splits, name)
        if split.source not in data:
            raise UserError(
                f"task.splits.{name}.source: {task.data} has no split {split.source!r}, only {sorted(data)}"
            )
        source = data[split.source]
        order = _permutation(len(source), task.splits.seed, split.source)
        start = taken.get(split.source, 0)
        left = len(source) - start
        size = left if split.size is None else split.size
        if left == 0 or size > left:
            raise UserError(
                f"task.splits.{name}: {size or 'some'} samples wanted, but {task.data} split {split.source!r} has "
                f"{len(source)}, of which {start} are taken by other splits; make a split smaller"
            )
        taken[split.source] = start + size
        rows[name] = [source[i] for i in order[start : start + size]]
    return Rows(**rows)


def _permutation(size: int, seed: int, source: str) -> list[int]:
    """By hashing, not by a library's generator, whose streams may change between versions."""
    return sorted(range(size), key=lambda i: derive_seed(seed, "split", source, i))


def _load(task: Task) -> Mapping[str, Any]:
    if is_demo(task.data):
        files = {split: [str(path)] for split, path in resolve_data(task.data).items()}
        return _load_files(files, "json")
    path = Path(task.data).expanduser()
    if path.suffix in BUILDERS or path.exists():
        files = _local_files(path, task.data)
        suffixes = {Path(name).suffix for names in files.values() for name in names}
        if len(suffixes) > 1:
            raise UserError(f"task.data: {task.data} mixes file types {sorted(suffixes)}; keep one")
        suffix = suffixes.pop()
        return _load_files(files, BUILDERS[suffix], **({"sep": "\t"} if suffix == ".tsv" else {}))
    return _load_hub(task)


def _local_files(path: Path, given: str) -> dict[str, list[str]]:
    if path.is_file():
        return {"train": [str(path)]}
    if not path.is_dir():
        raise UserError(f"task.data: file {given} does not exist (relative paths start at {Path.cwd()})")
    files = {file.stem: [str(file)] for file in sorted(path.iterdir()) if file.suffix in BUILDERS}
    if not files:
        raise UserError(f"task.data: folder {given} has no file ending in {', '.join(BUILDERS)}")
    return files


def _load_files(files: dict[str, list[str]], builder: str, **options: Any) -> Mapping[str, Any]:
    import datasets

    datasets.disable_progress_bars()
    empty = [names[0] for names in files.values() if Path(names[0]).stat().st_size == 0]
    if empty:
        raise UserError(f"task.data: {empty[0]} is empty")
    loaded = {}
    for split, names in files.items():  # one by one: splits may differ in their fields, and may be called "all"
        try:
            loaded[split] = datasets.load_dataset(builder, data_files=names, split="train", **options)
        except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
            cause = error.__cause__ or error
            raise UserError(f"task.data: cannot read {names[0]} as {builder}: {cause}") from error
    return loaded


def _load_hub(task: Task) -> Mapping[str, Any]:
    import datasets

    try:
        loaded: Mapping[str, Any] = datasets.load_dataset(task.data, task.subset)
    except (datasets.exceptions.DatasetNotFoundError, ValueError, OSError) as error:
        raise UserError(
            f"task.data: {task.data!r} is no local file, no demo data set, and the hub did not give it: {error}"
        ) from error
    return loaded
