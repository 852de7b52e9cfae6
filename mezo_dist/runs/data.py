"""The data of a run: rows become samples once per host, and once for all runs on the same data.

To encode a million rows takes a minute or two of processors, and a gigabyte. So the first rank of a host encodes large
data, on all cores, into a file in the package's cache folder (``$MEZO_DIST_CACHE``, see `mezo_dist.assets`), and all
ranks read samples from there as they need them. The name of the file is a digest of all that the samples are a function
of: the content of the data, the settings of the task, the tokenizer, and the code. A later run finds it, and need not
even read the rows.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import jinja2
import tokenizers
import transformers

from mezo_dist.assets.registry import cache_folder
from mezo_dist.config.task import TaskSettings
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.distributed.environment import code_digest
from mezo_dist.distributed.in_turn import in_thread, in_turns, turn_on_host
from mezo_dist.errors import UserError
from mezo_dist.models.load import Pretrained
from mezo_dist.storage.files import read_in_place, replace_file
from mezo_dist.storage.sample_file import SUFFIX, block_of, digest_of, evict, read_samples, write_samples
from mezo_dist.tasks.batches import Sample
from mezo_dist.tasks.fields import Row
from mezo_dist.tasks.identity import identity_of, packed, unpacked
from mezo_dist.tasks.kind import TaskKind, TextModel
from mezo_dist.tasks.rows import SPLITS, Rows, load_rows, uses_cache

log = logging.getLogger(__name__)
LEAST_ROWS = 2_000
"""Rows in all splits from which on the samples are kept in a file."""
LIMIT = "MEZO_DIST_SAMPLES_GIB"
"""Environment variable: what the files may take together; 0: no files are written or read."""
DEFAULT_LIMIT_GIB = 20.0
LONGEST_MANIFEST = 1 << 24
"""Bytes of a file about rows, most of which is the first row."""
_FROZEN_AT_FIRST = gc.get_freeze_count()
"""Objects that Python itself froze at its start, as some versions do."""
Beat = Callable[[], None]


@dataclass(frozen=True)
class Encoded:
    """The samples of a split."""

    samples: Sequence[Sample]
    digest: str
    """32 hexadecimal digits over them, in their order."""


@final
@dataclass
class TaskData:
    """The rows of a run's splits, which are read only when somebody has to see them."""

    task: TaskSettings
    sizes: dict[str, int]
    """Split -> number of rows."""
    first_row: Row
    """The first row of the training split."""
    identity: str | None
    """What the rows and all that is asked of them are; None: nothing is to be kept of them."""
    notes: list[tuple[int, str]]
    """What there is to say of the rows, with levels of logging."""
    _rows: Rows | None = None

    @property
    def is_kept(self) -> bool:
        """Samples of these rows are kept in files."""
        return self.identity is not None and sum(self.sizes.values()) >= LEAST_ROWS

    def rows(self, split: str) -> list[Row]:
        """The rows of a split."""
        if self._rows is None:
            self._rows = load_rows(self.task)
            self.notes.clear()  # they are said
            _check_unchanged(self.task, self.identity)
        rows: list[Row] = getattr(self._rows, split)
        return rows

    def forget_rows(self) -> None:
        """Free their memory; what is to be said of them is said."""
        self._rows = None
        while self.notes:
            level, text = self.notes.pop(0)
            log.log(level, "%s", text)


def open_data(task: TaskSettings, comm: Communicator) -> TaskData:
    """The data of a task. Collective.

    Raises:
        UserError: see `load_rows`.
    """
    if comm.world_size == 1:
        return _open(task)
    turn = turn_on_host(comm, _folder())
    if uses_cache(task):  # of `datasets`, which ranks of several hosts may share
        turn = 0 if comm.rank == 0 else turn + 1
    return in_turns(comm, turn, lambda beat: in_thread(lambda: _open(task), beat))


def encode_data(
    data: TaskData, kind: TaskKind, pretrained: Pretrained, model: TextModel, comm: Communicator
) -> dict[str, Encoded]:
    """The samples of each split. Collective.

    Args:
        data: the rows.
        kind: makes samples of them.
        pretrained: the model.
        model: what encoding knows of it.
        comm: the ranks.

    Raises:
        UserError: a row does not fit the task or the model.
    """
    key = _key(data.identity, pretrained, model) if data.is_kept and data.identity is not None else None
    if not any(comm.collect(lambda: key is not None)):
        encoded = {name: _in_memory(data, kind, name) for name in SPLITS}
    else:
        turn = turn_on_host(comm, _folder())
        encoded = in_turns(comm, turn, lambda beat: {name: _encoded(data, kind, name, key, beat) for name in SPLITS})
    data.forget_rows()
    return encoded


# Rows


def _open(task: TaskSettings) -> TaskData:
    identity = _identity(task)
    known = _manifest(task, identity) if identity is not None else None
    if known is not None:
        return known
    notes: list[tuple[int, str]] = []
    rows = load_rows(task, lambda level, text: notes.append((level, text)))
    sizes = {name: len(getattr(rows, name)) for name in SPLITS}
    data = TaskData(task, sizes, rows.train[0], identity, notes, rows)
    if data.is_kept:
        _check_unchanged(task, identity)
        _keep_manifest(data)
    return data


def _check_unchanged(task: TaskSettings, identity: str | None) -> None:
    """Raises UserError if the data are no longer what they were: nothing may be kept under a wrong name."""
    if identity is not None and _identity(task) != identity:
        raise UserError(f"task.data: {task.data} was changed while it was read; start again")


def _identity(task: TaskSettings) -> str | None:
    if not _limit():
        return None
    versions = [module.__version__ for module in (jinja2, tokenizers, transformers)]
    try:
        return identity_of(task, code_digest(), *versions)
    except (OSError, UserError):
        return None  # said when rows are read


def _manifest(task: TaskSettings, identity: str) -> TaskData | None:
    """The data as `_keep_manifest` knows them."""
    path = _folder() / f"{identity[:32]}.rows.json"
    try:
        facts = json.loads(read_in_place(path, LONGEST_MANIFEST))
        if facts["identity"] != identity or facts["digest"] != _digest(facts["data"]):
            raise ValueError("it is about other rows, or was changed")
        sizes, first_row, notes = facts["data"]
        return TaskData(task, sizes, unpacked(first_row), identity, [(level, text) for level, text in notes])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is no such file, or damaged (%s): rows are read again", path, error)
        return None


def _keep_manifest(data: TaskData) -> None:
    """Keep what has to be known of rows to find their samples."""
    try:
        facts = [data.sizes, packed(data.first_row), data.notes]
    except TypeError as error:
        log.debug("rows are read at every start: they hold a %s", error)
        return
    assert data.identity is not None
    content = {"identity": data.identity, "digest": _digest(facts), "data": facts}
    try:
        _folder().mkdir(parents=True, exist_ok=True)
        replace_file(_folder() / f"{data.identity[:32]}.rows.json", json.dumps(content).encode())
    except OSError as error:
        _cannot_keep(error)


# Samples


def _key(identity: str, pretrained: Pretrained, model: TextModel) -> str | None:
    """32 hexadecimal digits over all that samples are a function of; None if that cannot be said.

    Args:
        identity: of the rows and the task.
        pretrained: the model.
        model: what encoding knows of it.
    """
    tokenizer = model.tokenizer
    if type(tokenizer).__module__.split(".")[0] != "transformers":
        log.info("samples are encoded at every start: the class of the tokenizer came with the model")
        return None
    words = {name: str(value) for name, value in tokenizer.init_kwargs.items() if "name_or_path" not in name}
    facts = [
        identity,
        pretrained.tokenizer_digest,
        [model.kind, model.max_tokens, model.num_tokens],
        [tokenizer.model_input_names, tokenizer.chat_template, tokenizer.split_special_tokens, words],
    ]
    return _digest(facts)


def _in_memory(data: TaskData, kind: TaskKind, split: str) -> Encoded:
    samples = list(kind.encode(data.rows(split), split))
    return Encoded(samples, digest_of(samples))


def _encoded(data: TaskData, kind: TaskKind, split: str, key: str | None, beat: Beat) -> Encoded:
    """The samples of a split, from their file, which is written if it is not there.

    Args:
        data: the rows.
        kind: makes samples of them.
        split: its name.
        key: what the samples are a function of, for all splits; None: it cannot be said.
        beat: see `in_turns`.
    """
    if key is None:
        return _in_memory(data, kind, split)
    folder, name = _folder(), f"{key} {split}"
    path = folder / f"{key}-{split}{SUFFIX}"
    file = read_samples(path, name, kind.sample)
    if file is not None:
        log.info("%s split: %d samples are read from %s", split, len(file), path)
        return Encoded(file, file.digest)
    rows, began_s = data.rows(split), time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _no_search_for_cycles():
            write_samples(path, kind.encode(rows, split).blocks(block_of), name, beat)
        evict(folder, _limit())
    except OSError as error:
        _cannot_keep(error)
        return _in_memory(data, kind, split)
    file = read_samples(path, name, kind.sample)
    if file is None:  # made room for others' files at once
        return _in_memory(data, kind, split)
    seconds = time.monotonic() - began_s
    log.info("%s split: %d samples are encoded, in %.1f s, and kept in %s", split, len(file), seconds, path)
    return Encoded(file, file.digest)


@contextlib.contextmanager
def _no_search_for_cycles() -> Iterator[None]:
    """Within, Python's search for unused cycles does not look at a million rows over and over again."""
    is_ours = gc.get_freeze_count() <= _FROZEN_AT_FIRST
    gc.freeze()
    try:
        yield
    finally:
        if is_ours:  # not if somebody wants what was there before to stay so
            gc.unfreeze()


def _cannot_keep(error: OSError) -> None:
    log.warning(
        "the samples cannot be kept in %s (%s): they are encoded at every start, on every rank; make room there, or "
        "set MEZO_DIST_CACHE to another folder",
        _folder(),
        error,
    )


def _folder() -> Path:
    return cache_folder() / "samples"


def _limit() -> float:
    """Bytes that the files may take."""
    text = os.environ.get(LIMIT, "")
    try:
        limit = float(text) if text.strip() else DEFAULT_LIMIT_GIB
    except ValueError:
        limit = -1.0
    if not 0 <= limit < float("inf"):
        raise UserError(f"{LIMIT}={text!r}: a number of GiB is wanted, 0 to keep no samples")
    return limit * 2**30


def _digest(facts: object) -> str:
    return hashlib.blake2b(json.dumps(facts, sort_keys=True, default=repr).encode(), digest_size=16).hexdigest()
