"""From a task file to rows: load the data set, cut the splits."""

from __future__ import annotations

import glob
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezo_dist.assets.registry import is_demo, resolve_data
from mezo_dist.config.task import Split, Task
from mezo_dist.directions.seeds import derive_seed
from mezo_dist.errors import UserError

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
Row = Mapping[str, Any]
"""Field -> value, whatever the data set has there."""


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
                f"task.splits.{name}.size: {size or 'some'} samples wanted, but {task.data} split {split.source!r} has "
                f"{len(source)}, of which {start} are taken by the splits before; make a split smaller"
            )
        taken[split.source] = start + size
        rows[name] = _read_rows(task.data, source, order[start : start + size])
    return Rows(**rows)


def _read_rows(name: str, source: datasets.Dataset, indices: list[int]) -> list[Row]:
    """Some rows of a split.

    Args:
        name: of the data set, for messages.
        source: the split.
        indices: numbers of the rows.
    """
    try:
        rows: list[Row] = source.with_format("arrow")[indices].to_pylist()  # images and sounds stay undecoded
        return rows
    except UnicodeDecodeError as error:  # pyarrow does not look into short strings when it reads a file
        raise UserError(f"task.data: {name} is not UTF-8 ({error}): convert it") from error


def _permutation(size: int, seed: int, source: str) -> list[int]:
    """By hashing, not by a library's generator, whose streams may change between versions.

    Args:
        size: number of rows.
        seed: ``task.splits.seed``.
        source: name of the split.
    """
    return sorted(range(size), key=lambda i: derive_seed(seed, "split", source, i))


def _load(task: Task) -> Mapping[str, datasets.Dataset]:
    if is_demo(task.data):
        return {split: _load_file(path) for split, path in resolve_data(task.data).items()}
    path = Path(task.data).expanduser()
    if any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        return _load_saved(path)
    if path.suffix in BUILDERS or path.exists():
        # One by one: splits may differ in their fields, and may be called "all".
        return {split: _load_file(file) for split, file in _local_files(path).items()}
    return _load_hub(task)


def _local_files(path: Path) -> dict[str, Path]:
    """Split -> file."""
    if not path.exists():
        raise UserError(f"task.data: file {path} does not exist (relative paths start at {Path.cwd()})")
    candidates = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in candidates if file.suffix in BUILDERS]
    if not files:
        what = f"folder {path} has no file" if path.is_dir() else f"{path} is no file"
        raise UserError(f"task.data: {what} ending in {', '.join(BUILDERS)}")
    for file in files:
        if not file.is_file():  # a pipe or a device may never end
            raise UserError(f"task.data: {file} is not a regular file")
    if len({file.suffix for file in files}) > 1:
        raise UserError(f"task.data: folder {path} mixes file types {sorted({f.suffix for f in files})}; keep one")
    return {file.stem if path.is_dir() else "train": file for file in files}


def _load_file(path: Path) -> datasets.Dataset:
    import datasets

    datasets.disable_progress_bars()
    builder = BUILDERS[path.suffix]
    # Left alone, the reader of CSV takes a text such as "NA" or "null" for a missing one.
    options: dict[str, object] = {"keep_default_na": False} if builder == "csv" else {}
    if path.suffix == ".tsv":
        options["sep"] = "\t"
    if path.stat().st_size == 0:
        raise UserError(f"task.data: {path} is empty")
    try:
        return datasets.load_dataset(
            builder,
            data_files=[glob.escape(str(path))],
            split="train",
            # Its cache knows a file by size and time of change, which a file with other rows may share.
            cache_dir=str(Path(datasets.config.HF_DATASETS_CACHE) / "mezo_dist" / _content_digest(path)),
            **options,
        )
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        cause = str(error.__cause__ or error)
        reason = "it has no rows" if "corresponds to no data" in cause else cause
        raise UserError(f"task.data: cannot read {path} as {builder}: {reason}") from error


def _content_digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _load_saved(folder: Path) -> Mapping[str, datasets.Dataset]:
    """A folder written by ``save_to_disk`` of `datasets`."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (ValueError, OSError) as error:
        raise UserError(f"task.data: cannot read the data set saved in {folder}: {error}") from error
    return loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}


def _load_hub(task: Task) -> Mapping[str, datasets.Dataset]:
    import datasets

    try:
        loaded: Mapping[str, datasets.Dataset] = datasets.load_dataset(task.data, task.subset)
    except (datasets.exceptions.DatasetNotFoundError, ValueError, OSError) as error:
        raise UserError(
            f"task.data: {task.data!r} is no local file, no demo data set, and the hub did not give it: {error}"
        ) from error
    return loaded
