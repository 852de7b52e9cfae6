"""Snapshots: the weights of a run on disk, written and read shard by shard.

A snapshot is a folder with one safetensors file per rank that wrote something, and an index (JSON) that says which
piece of which weight lies in which file, with the SHA-256 of every file. It knows nothing of ranks or engines: any
world size and any layout can read it. `torch.distributed.checkpoint` is not used: its metadata file is a pickle, and
nothing in a run folder may ever be unpickled. Its ``HuggingFaceStorageWriter`` writes safetensors without a pickle, but
it knows no shards that start at any element of a flattened weight (ZeRO-3's do), has no checksum of its files, does not
publish a snapshot in one step when all of it is on disk, and has no place for the copied anchor.

All ranks must see the same folder, as for a run folder in general.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.anchor import ANCHOR_PREFIX
from mezo_dist.engines.engine import OPTIMIZER_PREFIX, Engine
from mezo_dist.engines.layouts.base import Shard
from mezo_dist.errors import UserError
from mezo_dist.json_types import JsonObject
from mezo_dist.storage import safetensors_io
from mezo_dist.storage.files import is_plain_folder, read_in_place

FORMAT = "mezo_dist/snapshot/1"
INDEX = "snapshot.json"
MAX_INDEX_BYTES = 1 << 28
"""Far above what the index of any model takes."""
_NAME = re.compile(r"step-\d{8,}")


@dataclass(frozen=True)
class Piece:
    """Elements ``offset ..`` of a flattened weight, in a file of the snapshot."""

    file: str
    offset: int
    size: int
    """Number of elements."""


@dataclass(frozen=True)
class SavedWeight:
    """A weight in a snapshot."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    """In order, without gaps."""


@dataclass(frozen=True)
class Snapshot:
    """The index of a complete snapshot."""

    folder: Path
    step: int
    """Number of steps that the weights have seen."""
    facts: JsonObject
    """What the caller of `save_snapshot` wanted kept with the weights."""
    files: dict[str, str]
    """SHA-256 of every file."""
    weights: dict[str, SavedWeight]


def snapshots(folder: Path) -> list[Path]:
    """Folders of the complete snapshots in ``folder`` (which need not exist), oldest first."""
    folders = (path.parent for path in folder.glob(f"step-*/{INDEX}") if _NAME.fullmatch(path.parent.name))
    return sorted(path for path in folders if is_plain_folder(path))


def read_snapshot(folder: Path) -> Snapshot:
    """Read a snapshot's index.

    Raises:
        UserError: there is none, it is damaged, or the snapshot was renamed to another step.
    """
    if not is_plain_folder(folder):
        raise UserError(f"{folder}: a link or a file, not a folder")
    snapshot = read_index(folder)
    if folder.name != folder_name(snapshot.step):
        raise UserError(f"{folder}: was renamed, for its index says step {snapshot.step}")
    return snapshot


def folder_name(step: int) -> str:
    """Name of the folder of the snapshot after ``step`` steps."""
    return f"step-{step:08d}"


def read_index(folder: Path) -> Snapshot:
    """As `read_snapshot`, whatever the folder is called.

    Raises:
        UserError: there is no index, or it is damaged.
    """
    path = folder / INDEX
    try:
        data = json.loads(read_in_place(path, MAX_INDEX_BYTES))
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']!r} is not {FORMAT}")
        files = {str(name): str(digest) for name, digest in data["files"].items()}
        if any(Path(name).name != name for name in files):
            raise ValueError("a file name with a folder in it")
        weights = {name: _weight(name, item, files) for name, item in data["weights"].items()}
        return Snapshot(folder, int(data["step"]), dict(data["facts"]), files, weights)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); not a complete snapshot") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: damaged, or of another version of mezo_dist ({error!r})") from error


def load_snapshot(folder: Path, engine: Engine, comm: Communicator, *, anchor: bool = False) -> Snapshot:
    """Overwrite the weights with those of a snapshot, whatever engine and world size it was written by.

    The state of an optimiser that is attached to the engine is overwritten, too.

    Files are checked against their SHA-256 before any weight is touched; ranks share that work. Collective.

    Args:
        folder: of the snapshot.
        engine: whose weights.
        comm: between the ranks.
        anchor: also fill the copy that the engine keeps (`Engine.copy_anchor`), if the snapshot has one.

    Raises:
        UserError: on all ranks: the snapshot is incomplete or damaged, or belongs to another model.
    """
    checked: list[Snapshot] = []

    def check() -> None:
        snapshot = read_snapshot(folder)
        for number, (name, digest) in enumerate(sorted(snapshot.files.items())):
            if number % comm.world_size == comm.rank and safetensors_io.sha256(folder / name) != digest:
                raise UserError(f"{folder / name}: damaged (its SHA-256 is not the one in {INDEX})")
        _check_pieces(snapshot)
        _check_fits(snapshot, engine.shards(), "")
        if engine.optimizer is not None:
            _check_fits(snapshot, engine.optimizer_shards(), OPTIMIZER_PREFIX)
        checked.append(snapshot)

    def fill() -> None:
        (snapshot,) = checked
        _fill(engine.shards(), snapshot)
        _fill(engine.optimizer_shards(), snapshot)
        if anchor and any(name.startswith(ANCHOR_PREFIX) for name in snapshot.weights):
            engine.copy_anchor()  # makes room
            _check_fits(snapshot, engine.anchor_shards(), ANCHOR_PREFIX)
            _fill(engine.anchor_shards(), snapshot)

    comm.collect(check)
    comm.collect(fill)
    return checked[0]


def piece_key(name: str, offset: int) -> str:
    """Name, in a file of a snapshot, of a weight's elements from ``offset`` on."""
    return f"{name}@{offset}"


def _check_pieces(snapshot: Snapshot) -> None:
    """Raises UserError if the files do not hold what the index says."""
    entries = {name: safetensors_io.read_header(snapshot.folder / name, in_place=True) for name in snapshot.files}
    for name, weight in snapshot.weights.items():
        for piece in weight.pieces:
            entry = entries[piece.file].get(piece_key(name, piece.offset))
            if entry is None or (entry.dtype, entry.num_elements) != (weight.dtype, piece.size):
                raise UserError(f"{snapshot.folder / piece.file}: does not hold {name} as {INDEX} says")


def _fill(shards: Iterable[Shard], snapshot: Snapshot) -> None:
    entries = {name: safetensors_io.read_header(snapshot.folder / name, in_place=True) for name in snapshot.files}
    for shard in shards:
        flat = shard.tensor.detach().view(-1)
        for piece in snapshot.weights[shard.name].pieces if len(flat) else ():
            first = max(piece.offset, shard.offset)
            stop = min(piece.offset + piece.size, shard.offset + len(flat))
            if first < stop:
                entry = entries[piece.file][piece_key(shard.name, piece.offset)]
                entry.read(flat[first - shard.offset : stop - shard.offset], first - piece.offset)


def _weight(name: str, item: JsonObject, files: Mapping[str, str]) -> SavedWeight:
    """Read a weight of the index. Raises ValueError if its pieces leave a gap.

    Args:
        name: of the weight.
        item: what the index says of it.
        files: all files of the snapshot.
    """
    weight = SavedWeight(
        safetensors_io.DTYPES[item["dtype"]], tuple(item["shape"]), tuple(Piece(*piece) for piece in item["pieces"])
    )
    end = 0
    for piece in weight.pieces:
        if piece.offset != end or piece.file not in files:
            raise ValueError(f"{name}: its pieces do not fit together")
        end += piece.size
    if end != math.prod(weight.shape):
        raise ValueError(f"{name}: its pieces do not make the whole weight")
    return weight


def _check_fits(snapshot: Snapshot, shards: Iterable[Shard], prefix: str) -> None:
    """Raises UserError if a snapshot holds other weights than an engine.

    Args:
        snapshot: its index.
        shards: the engine's.
        prefix: what the names of all of them begin with (of the anchor or the optimiser); empty for the weights.
    """
    needed = {shard.name: (tuple(shard.shape), shard.tensor.dtype) for shard in shards if shard.shape.numel()}
    prefixes = [known for known in (ANCHOR_PREFIX, OPTIMIZER_PREFIX) if known != prefix]
    saved_names = {n for n in snapshot.weights if n.startswith(prefix) and not n.startswith(tuple(prefixes))}
    if other := sorted(needed.keys() ^ saved_names):
        raise UserError(f"{snapshot.folder}: of another model: {', '.join(other[:3])} is only in one of the two")
    for name, (shape, dtype) in needed.items():
        saved = snapshot.weights[name]
        if (saved.shape, saved.dtype) != (shape, dtype):
            raise UserError(
                f"{snapshot.folder}: {name} is {saved.dtype} {saved.shape} there, but {dtype} {shape} in this run "
                "(model.weights, model.name)"
            )
