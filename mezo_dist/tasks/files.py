"""Data sets in local files: what the file says, character by character, and no row less.

CSV, TSV and JSON are read here, since readers that guess at types change what they read: ``007`` becomes 7, ``NA`` a
gap, ``2020-01-01`` a date. What is not as it should be is refused with its line.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import itertools
import json
import logging
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mezo_dist.config.values import ClassIndex
from mezo_dist.errors import UserError, needs
from mezo_dist.tasks.fields import Row, listed

log = logging.getLogger(__name__)
TYPES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
"""Endings of files that can be read."""
LONGEST_CELL = 1 << 30
"""Characters; the csv module wants a limit."""
AT_ONCE = 10_000
"""Rows of a table that are digested together."""
LINES_AT_ONCE = 1_000
"""Lines of JSON that are read together."""
MOST_CELLS, SPARSEST = 1_000_000, 50
"""Cells of JSON rows, fields that a row lacks included: so many, and so many times those that are there."""


class Table(Protocol):
    """The rows of one source of a data set."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def take(self, indices: Sequence[int]) -> list[Row]:
        """The rows at ``indices``, in that order."""
        ...

    def has_nulls(self) -> bool:
        """A field of some row may be null."""
        ...

    def digest(self) -> str:
        """Hexadecimal digits over all rows."""
        ...


@dataclass(frozen=True, eq=False)
class Records:
    """Rows in memory."""

    rows: list[Row]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Sequence[int]) -> list[Row]:
        """See `Table`."""
        return list(map(self.rows.__getitem__, indices))

    def has_nulls(self) -> bool:
        """See `Table`."""
        return any(None in row.values() for row in self.rows)

    def digest(self) -> str:
        """See `Table`."""
        return hashlib.blake2b(repr(self.rows).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


@dataclass(frozen=True, eq=False)
class Arrow:
    """A ``datasets.Dataset``."""

    name: str
    """What to call it in messages."""
    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def take(self, indices: Sequence[int]) -> list[Row]:
        """See `Table`."""
        import datasets

        try:
            rows: list[dict[str, Any]] = self.dataset.with_format("arrow")[
                list(indices)
            ].to_pylist()  # pictures stay undecoded
        except UnicodeDecodeError as error:  # pyarrow does not look into short strings when it reads a file
            raise UserError(f"task.data: {self.name} is not UTF-8 ({error}): convert it") from error
        classes = {
            n: f.names for n, f in self.dataset.features.items() if isinstance(f, datasets.ClassLabel) and f.names
        }
        for row in rows:
            for field, names in classes.items():
                if row[field] is not None and 0 <= row[field] < len(names):  # -1 stands for no class
                    row[field] = ClassIndex(row[field], names[row[field]])
        return list[Row](rows)

    def has_nulls(self) -> bool:
        """See `Table`."""
        return True  # rows that are taken show it as fast

    def digest(self) -> str:
        """See `Table`."""
        import pyarrow as pa

        digest = hashlib.blake2b(repr(self.dataset.features).encode(), digest_size=16)
        for table in self.dataset.with_format("arrow").iter(AT_ONCE):
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table.combine_chunks())
            digest.update(sink.getvalue())
        return digest.hexdigest()


def local_files(path: Path) -> dict[str, Path]:
    """Split -> file, for a file (which is ``train``) or a folder of files named after their splits.

    Raises:
        UserError: there is none that can be read.
    """
    if not path.exists():
        where = "" if path.is_absolute() else f" (relative paths start at {Path.cwd()})"
        raise UserError(f"task.data: file {path} does not exist{where}")
    candidates = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in candidates if file.suffix in TYPES]
    if not files:
        what = f"folder {path} has no file" if path.is_dir() else f"{path} is no file"
        raise UserError(f"task.data: {what} ending in {', '.join(TYPES)}")
    for file in files:
        if not file.is_file():  # a pipe or a device may never end
            raise UserError(f"task.data: {file} is not a regular file")
    if len({file.suffix for file in files}) > 1:
        raise UserError(f"task.data: folder {path} mixes file types {sorted({f.suffix for f in files})}; keep one")
    return {file.stem if path.is_dir() else "train": file for file in files}


def read_file(path: Path) -> Table:
    """The rows of one file.

    Raises:
        UserError: it has none, or cannot be read.
    """
    if path.stat().st_size == 0:
        raise UserError(f"task.data: {path} is empty")
    kind = "json" if path.suffix == ".jsonl" else path.suffix[1:]
    if kind in ("parquet", "arrow"):
        return _read_arrow(path, kind)
    try:
        text = _decoded(path)
        rows = _json_rows(text) if kind == "json" else _csv_rows(path, text)
    except (ValueError, csv.Error, OSError, RecursionError) as error:
        raise UserError(f"task.data: cannot read {path} as {kind}: {error}") from error
    if not rows:
        raise UserError(f"task.data: cannot read {path} as {kind}: it has no rows")
    return Records(rows)


def _decoded(path: Path) -> str:
    """The text of the file, without a byte order mark."""
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("it is UTF-16, not UTF-8: convert it, for instance with `iconv -f utf-16 -t utf-8`")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"line {line} is not UTF-8 (byte {data[error.start]:#04x}): convert it, for instance with "
            "`iconv -f latin1 -t utf-8`"
        ) from error


# JSON


def _json_rows(text: str) -> list[Row]:
    """Rows of JSON lines, of a list of objects, or of an object of columns."""
    if text.lstrip()[:1] == "[":
        rows = _loaded(text, "")
    else:
        lines = text.split("\n")
        try:
            rows = _all_loaded(lines)
        except ValueError:
            if not _is_incomplete(next(filter(str.strip, lines), "")):
                raise
            rows = _columns(_loaded(text, ""))
    if set(map(type, rows)) - {dict}:
        number, row = next((number, row) for number, row in enumerate(rows, 1) if not isinstance(row, dict))
        raise ValueError(f"row {number} is no object with fields but {str(row)[:40]!r}")
    names = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    if len(names) * len(rows) > MOST_CELLS + SPARSEST * sum(map(len, rows)):  # every row gets every field
        raise ValueError(f"its {len(rows)} rows have {len(names)} different fields, most of which most rows lack")
    return [row if len(row) == len(names) else {name: row.get(name) for name in names} for row in rows]


def _all_loaded(lines: Sequence[str]) -> list[Any]:
    """The values in lines of JSON, without empty ones. Raises ValueError for the first line that is not one value."""
    values: list[Any] = []
    for start in range(0, len(lines), LINES_AT_ONCE):
        some = lines[start : start + LINES_AT_ONCE]
        together = _loaded_together(some if all(map(str.strip, some)) else list(filter(str.strip, some)))
        if together is None:
            numbered = [(number, line) for number, line in enumerate(some, start + 1) if line.strip()]
            together = [_loaded(line, f"line {number}: ") for number, line in numbered]
        values += together
    return values


def _loaded_together(lines: Sequence[str]) -> list[Any] | None:
    """The values in lines of JSON, read as one list, which takes a third of the time; None where they have to be read
    one by one: a line is not one value, or has escapes that need a closer look.

    Between the lines of the list stands a text that no line has. Where all of these texts come out as every other value
    of the list, there is one value on either side of each.
    """
    between = secrets.token_hex(16)
    text = f',"{between}",'.join(lines)
    if "\\ud" in text.lower():
        return None
    try:
        values = json.loads(f"[{text}]")
    except (ValueError, RecursionError):
        return None
    return values[::2] if values[1::2] == [between] * (len(lines) - 1) else None


def _loaded(text: str, where: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}{error}") from error
    if "\\ud" in text.lower():  # half a character is no text; halves that belong together were joined
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}a text holds half a character ({error})") from error
    return value


def _is_incomplete(line: str) -> bool:
    """A JSON text that goes on in the next line begins so."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line.rstrip())
    return False


def _columns(value: Any) -> list[Any]:
    if not isinstance(value, dict) or not all(isinstance(column, list) for column in value.values()):
        return [value]
    if len({len(column) for column in value.values()}) != 1:
        raise ValueError("its columns differ in length")
    return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]


# CSV and TSV


def _csv_rows(path: Path, text: str) -> list[Row]:
    """Rows of texts, by the names in the first line."""
    csv.field_size_limit(LONGEST_CELL)
    if path.suffix == ".csv":
        records = list(_records(csv.reader(io.StringIO(text, newline=""), strict=True)))
    else:
        records = _tsv_records(path, text)
    names = records[0][1] if records else []
    if len(set(names)) < len(names):
        twice = [name for name, times in Counter(names).items() if times > 1]
        raise ValueError(f"two columns have the same name: {listed(twice)}")
    rows: list[Row] = []
    for line, cells in records[1:]:
        if len(cells) != len(names):
            raise ValueError(f"line {line} has {len(cells)} cells, but the first line names {len(names)} columns")
        rows.append(dict(zip(names, cells, strict=True)))
    broken = sum("\n" in cell or "\r" in cell for row in rows for cell in row.values())
    log.info("%s: %d rows%s", path, len(rows), f"; {broken} cells hold line breaks" if broken else "")
    return rows


def _records(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """The line that a record starts in, and its cells; empty lines are none."""
    line = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"the record that starts in line {line}: {error}") from error
        if cells is None:
            return
        if cells:
            yield line, cells
        line = reader.line_num + 1


def _tsv_records(path: Path, text: str) -> list[tuple[int, list[str]]]:
    """The records of a TSV, each on a line of its own: what starts with a quote never swallows the next line.

    Most such files know no quoting, so quotes are characters. They quote, as in CSV, if that explains them better: each
    cell that starts with a quote ends with one, all lines have as many cells as the first, and either the names in the
    first line are quoted or some cell needs its quotes (a tab or doubled quotes are in it).
    """
    lines = [(number, line.rstrip("\n")) for number, line in enumerate(io.StringIO(text, newline=None), 1)]
    plain = [(number, line.split("\t")) for number, line in lines if line]
    if '"' not in text:
        return plain
    try:
        quoted = [(number, next(csv.reader([line], delimiter="\t", strict=True))) for number, line in lines if line]
    except csv.Error:
        quoted = []
    if quoted and len({len(cells) for _, cells in quoted}) == 1:
        cells = [cell for _, row in quoted for cell in row]
        raw = [cell for _, row in plain for cell in row]
        is_needed = len(cells) < len(raw) or any(_is_doubled(cell) for cell in raw)
        if is_needed or plain[0][1][0].startswith('"'):
            log.info("%s: quotes around cells are read as in CSV", path)
            return quoted
    log.info("%s: quotes are characters of its texts", path)
    return plain


def _is_doubled(cell: str) -> bool:
    return cell[:1] == cell[-1:] == '"' and '""' in cell[1:-1]


# Arrow


def _read_arrow(path: Path, kind: str) -> Table:
    with needs("datasets", f"task.data: datasets, which reads {path.name}"):
        import datasets

    datasets.disable_progress_bars()
    try:
        data = datasets.load_dataset(
            kind,
            data_files=[glob.escape(str(path))],
            split="train",
            # Its cache knows a file by size and time of change, which a file with other rows may share.
            cache_dir=str(Path(datasets.config.HF_DATASETS_CACHE) / "mezo_dist" / content_digest(path)),
        )
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        cause = str(error.__cause__ or error)
        reason = "it has no rows" if "corresponds to no data" in cause else cause
        raise UserError(f"task.data: cannot read {path} as {kind}: {reason}") from error
    return Arrow(str(path), data)


def content_digest(path: Path) -> str:
    """32 hexadecimal digits over the bytes of a file."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
