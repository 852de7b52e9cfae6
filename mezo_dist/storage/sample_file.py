"""Encoded samples in a file, read one by one: a million of them take no memory, and are encoded once.

A file has four parts: the samples, each as Python writes the tuple of its values; where each of them ends, as
unsigned 64-bit integers; what `SampleIndex` says of them; and a line of JSON that says what the file is. The digest in
that line is the one that a trajectory knows the data by, and it is that of the bytes of the first part, so that whoever
opens a file verifies at once that it is whole and that the samples are those. Nothing in it is evaluated or unpickled.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import os
import secrets
import sys
import time
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from mezo_dist.errors import UserError
from mezo_dist.storage.files import open_in_place
from mezo_dist.storage.sample_index import EncodedSample, SampleIndex

log = logging.getLogger(__name__)
FORMAT = "mezo_dist samples/v2"
SUFFIX, PART = ".samples", ".part"
LONGEST_LINE = 4096
"""Bytes of the last line, at most."""
BLOCK = 1 << 20
STALE_S = 86_400.0
"""Age of a half-written file that nobody will finish."""

SampleT = TypeVar("SampleT")


@dataclass(frozen=True)
class SampleBlock:
    """A few samples as they stand in a file."""

    content: bytes
    ends: array[int]
    """Where each of them ends in ``content``."""
    index: SampleIndex


def block_of(samples: Sequence[EncodedSample]) -> SampleBlock:
    """Some samples as they stand in a file."""
    pieces = [_written(sample) for sample in samples]
    ends = array("Q", itertools.accumulate(map(len, pieces)))
    return SampleBlock(b"".join(pieces), ends, SampleIndex.of(samples))


def digest_of(samples: Iterable[object]) -> str:
    """32 hexadecimal digits over encoded samples, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for sample in samples:
        digest.update(_written(sample))
    return digest.hexdigest()


def _written(sample: object) -> bytes:
    return repr(tuple(vars(sample).values())).encode()


@dataclass(frozen=True, eq=False)
class SampleFile(Sequence[SampleT], Generic[SampleT]):
    """The samples in a file, which is held open: it may be deleted meanwhile."""

    path: Path
    digest: str
    _handle: int
    _ends: array[int]
    _num_rows: int
    _make: Callable[..., SampleT]

    @property
    def table(self) -> SampleIndex:
        """What can be known of the samples without reading them."""
        start = (self._ends[-1] if self._ends else 0) + 8 * len(self._ends)
        parts = []
        for size in (len(self), len(self), self._num_rows):
            parts.append(_little_endian(array("I", self._read(start, 4 * size))))
            start += 4 * size
        return SampleIndex(*parts)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, place: int) -> SampleT: ...

    @overload
    def __getitem__(self, place: slice) -> list[SampleT]: ...

    def __getitem__(self, place: int | slice) -> SampleT | list[SampleT]:
        if isinstance(place, slice):
            return [self._sample(one) for one in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        return self._sample(place % len(self))

    def _sample(self, place: int) -> SampleT:
        start = self._ends[place - 1] if place else 0
        return self._make(*_values(self._read(start, self._ends[place] - start).decode()))

    def _read(self, start: int, size: int) -> bytes:
        """The bytes of a part of the file."""
        try:
            return b"".join(_blocks(self._handle, start, size))
        except OSError as error:
            raise UserError(f"cannot read {self.path} ({error}): is its disk still there?") from error
        except ValueError as error:
            raise UserError(f"{self.path} was cut short while it was read; start again, and it is made anew") from error


def _values(text: str) -> tuple[Any, ...]:
    """The values in what Python wrote of a tuple of numbers, texts and tuples."""
    if "'" not in text and '"' not in text:  # numbers: JSON is read twenty times as fast
        return _as_tuples(json.loads(text.replace(",)", "]").replace("(", "[").replace(")", "]")))
    values: tuple[Any, ...] = ast.literal_eval(text)
    return values


def _as_tuples(values: list[Any]) -> tuple[Any, ...]:
    return tuple(_as_tuples(value) if isinstance(value, list) else value for value in values)


def write_samples(path: Path, blocks: Iterable[SampleBlock], key: str, beat: Callable[[], None]) -> None:
    """Write samples as they come; the file is there when it is whole.

    Args:
        path: where to, in a folder that exists.
        blocks: the samples, some at a time.
        key: what they are a function of, besides code.
        beat: called after every block.

    Raises:
        OSError: the file cannot be written.
    """
    digest, ends, index, size = hashlib.blake2b(digest_size=16), array("Q"), SampleIndex.of([]), 0
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}{PART}")
    try:
        with os.fdopen(open_in_place(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb", buffering=BLOCK) as file:
            for block in blocks:
                digest.update(block.content)
                ends.extend(size + end for end in block.ends)
                index.extend(block.index)
                size += file.write(block.content)
                beat()
            tables = b"".join(_little_endian(part).tobytes() for part in (ends, *index.parts))
            file.write(tables)
            facts = {"format": FORMAT, "key": key, "samples": len(ends), "rows": len(index.checksums)}
            facts |= {"digest": digest.hexdigest(), "tables": _hex(tables)}
            file.write(b"\n" + json.dumps(facts).encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_samples(path: Path, key: str, make: Callable[..., SampleT]) -> SampleFile[SampleT] | None:
    """The samples in a file, verified; None if there is none, or none that is whole (which the log says).

    Args:
        path: where it may be.
        key: what the samples are to be a function of.
        make: makes a sample of its values: their class.
    """
    try:
        handle = open_in_place(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("%s cannot be read (%s): samples are encoded again", path, error)
        return None
    try:
        ends, num_rows, digest = _verified(handle, key)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        os.close(handle)
        log.warning("%s is damaged or no such file (%s): samples are encoded again", path, error)
        return None
    with contextlib.suppress(OSError):  # both are for `evict`; some file systems have no locks
        os.utime(path)
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    file = SampleFile(path, digest, handle, ends, num_rows, make)
    weakref.finalize(file, os.close, handle)
    return file


def _verified(handle: int, key: str) -> tuple[array[int], int, str]:
    """Where each sample ends, the number of rows in all of them, and the digest of them all.

    Raises:
        OSError, ValueError, KeyError, TypeError: the file is not what `write_samples` wrote, or has another key.
    """
    size = os.fstat(handle).st_size
    tail = os.pread(handle, LONGEST_LINE, max(0, size - LONGEST_LINE))
    line = tail[tail.rfind(b"\n") + 1 :]
    facts = json.loads(line)
    if facts["format"] != FORMAT or facts["key"] != key:
        raise ValueError("its last line says something else")
    num_samples, num_rows = int(facts["samples"]), int(facts["rows"])
    tables_size = 8 * num_samples + 4 * (2 * num_samples + num_rows)
    payload_size = size - len(line) - 1 - tables_size
    tables = b"".join(_blocks(handle, payload_size, tables_size))
    ends = _little_endian(array("Q", tables[: 8 * num_samples]))
    if _hex(tables) != facts["tables"] or (ends[-1] if ends else 0) != payload_size:
        raise ValueError("its tables are not whole")
    digest = hashlib.blake2b(digest_size=16)
    for block in _blocks(handle, 0, payload_size):
        digest.update(block)
    if digest.hexdigest() != facts["digest"]:
        raise ValueError("its samples are not those that were written")
    return ends, num_rows, digest.hexdigest()


def _blocks(handle: int, start: int, size: int) -> Iterator[bytes]:
    """The bytes of a part of a file.

    Args:
        handle: of the file.
        start: of the part.
        size: of the part; negative ones are refused.
    """
    if size < 0:
        raise ValueError("it is cut short")
    while size:
        block = os.pread(handle, min(BLOCK, size), start)
        if not block:
            raise ValueError("it is cut short")
        yield block
        start, size = start + len(block), size - len(block)


def _little_endian(numbers: array[int]) -> array[int]:
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _hex(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def evict(folder: Path, limit: float) -> None:
    """Delete what was not used for longest until the files in a folder take no more than ``limit`` bytes.

    A file that a process of any host reads is left alone, where the file system has locks.
    """
    now, used = time.time(), 0
    facts = [(path, path.lstat()) for path in folder.iterdir() if path.is_file() and not path.is_symlink()]
    for path, status in sorted(facts, key=lambda fact: -fact[1].st_mtime):  # the latest first
        if path.suffix == PART:
            if now - status.st_mtime > STALE_S:
                path.unlink(missing_ok=True)
        elif used + status.st_size <= limit:
            used += status.st_size
        elif _is_unused(path):
            log.info("%s makes room for other samples", path)
            path.unlink(missing_ok=True)


def _is_unused(path: Path) -> bool:
    handle = open_in_place(path, os.O_RDWR)  # NFS locks what may be written to
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks here
        return True
    finally:
        os.close(handle)
    return True
