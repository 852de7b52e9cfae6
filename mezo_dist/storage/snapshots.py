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

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.anchor import ANCHOR_PREFIX
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.layouts.base import Shard
from mezo_dist.errors import UserError
from mezo_dist.json_types import JsonObject
from mezo_dist.storage import safetensors_io
from mezo_dist.storage.files import is_plain_folder, read_in_place, remove, sync_folder

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


def save_snapshot(
    folder: Path,
    engine: Engine,
    step: int,
    comm: Communicator,
    *,
    facts: JsonObject | None = None,
    keep: int = 2,
) -> Path:
    """Write ``folder/step-NNNNNNNN``; it appears under that name only when all of it is on disk.

    The copy that the engine keeps (`Engine.copy_anchor`) is saved, too, if there is one; buffers are not, as they are
    no weights. Every piece is written once: ranks that own the same pieces (replicas) share the work. Collective: all
    ranks must call it.

    Args:
        folder: holds all snapshots of the run; it is created if need be.
        engine: whose weights.
        step: number of steps that they have seen.
        comm: between the ranks.
        facts: JSON types, which `Snapshot.facts` will hold; those of rank 0 are saved.
        keep: how many complete snapshots may stay, this one included; older ones are removed once it is there.

    Returns:
        The snapshot's folder, on all ranks.

    Raises:
        UserError: on all ranks, if one of them could not write (full disk, no permission).
    """
    target = folder / _name(step)
    part = target.with_name(f".{target.name}.part")
    try:
        _on_main(comm, _make_empty, part)
        pieces = [_piece(shard) for shard in _shards(engine) if shard.tensor.numel()]
        replicas = comm.collect(lambda: hashlib.sha256(json.dumps(pieces).encode()).hexdigest())
        mine = [rank for rank, digest in enumerate(replicas) if digest == replicas[comm.rank]]
        assigned = _assigned(pieces, mine.index(comm.rank), len(mine))
        parts = comm.collect(lambda: _write_part(part, f"rank-{comm.rank:05d}.safetensors", engine, assigned))
        _on_main(comm, _publish, part, target, _index(step, dict(facts or {}), parts), keep)
    except UserError as error:
        if comm.rank == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"snapshot {target} could not be written: {error}") from error
    return target


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
    snapshot = _read_index(folder)
    if folder.name != _name(snapshot.step):
        raise UserError(f"{folder}: was renamed, for its index says step {snapshot.step}")
    return snapshot


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _read_index(folder: Path) -> Snapshot:
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
        _check_fits(snapshot, engine.shards(), is_anchor=False)
        checked.append(snapshot)

    def fill() -> None:
        (snapshot,) = checked
        _fill(engine.shards(), snapshot)
        if anchor and any(name.startswith(ANCHOR_PREFIX) for name in snapshot.weights):
            engine.copy_anchor()  # makes room
            _check_fits(snapshot, engine.anchor_shards(), is_anchor=True)
            _fill(engine.anchor_shards(), snapshot)

    comm.collect(check)
    comm.collect(fill)
    return checked[0]


def _on_main(comm: Communicator, work: Callable[..., object], *args: object) -> None:
    """``work(*args)`` on rank 0; its error on all ranks."""
    comm.collect(lambda: str(work(*args)) if comm.rank == 0 else "")


def _make_empty(folder: Path) -> None:
    remove(folder)
    folder.mkdir(parents=True)


def _shards(engine: Engine) -> Iterator[Shard]:
    """All that is saved."""
    yield from engine.shards()
    yield from engine.anchor_shards()


def _piece(shard: Shard) -> JsonObject:
    """What the index says of a shard; equal on replicas."""
    code, size = safetensors_io.CODES[shard.tensor.dtype], shard.tensor.numel()
    return {"name": shard.name, "dtype": code, "shape": list(shard.shape), "offset": shard.offset, "size": size}


def _assigned(pieces: Sequence[JsonObject], place: int, num_replicas: int) -> dict[str, JsonObject]:
    """What replica number ``place`` writes: each piece goes to the one that has the fewest elements so far.

    Args:
        pieces: all that the replicas hold.
        place: number of this replica.
        num_replicas: how many hold the same pieces.
    """
    loads = [0] * num_replicas
    assigned = {}
    for piece in pieces:
        least = loads.index(min(loads))
        loads[least] += piece["size"]
        if least == place:
            assigned[piece["name"]] = piece
    return assigned


def _key(name: str, offset: int) -> str:
    return f"{name}@{offset}"


def _write_part(folder: Path, file: str, engine: Engine, assigned: Mapping[str, JsonObject]) -> JsonObject:
    """Write one rank's file of a snapshot. Returns what the index needs of it.

    Args:
        folder: of the snapshot.
        file: name of the file.
        engine: owns the weights.
        assigned: the pieces to write, by name.
    """
    layout = {
        _key(name, piece["offset"]): (safetensors_io.DTYPES[piece["dtype"]], [piece["size"]])
        for name, piece in assigned.items()
    }
    digest = safetensors_io.write(folder / file, layout, (s.tensor for s in _shards(engine) if s.name in assigned))
    return {"file": file, "sha256": digest, "pieces": list(assigned.values())}


def _index(step: int, facts: JsonObject, parts: Sequence[JsonObject]) -> JsonObject:
    """The index's contents, from what every rank wrote.

    Args:
        step: number of steps that the weights have seen.
        facts: the caller's.
        parts: what every rank wrote.
    """
    weights: dict[str, JsonObject] = {}
    for part in parts:
        for piece in part["pieces"]:
            weight = weights.setdefault(piece["name"], {"dtype": piece["dtype"], "shape": piece["shape"], "pieces": []})
            weight["pieces"].append([part["file"], piece["offset"], piece["size"]])
    for weight in weights.values():
        weight["pieces"].sort(key=lambda piece: piece[1])
    files = {part["file"]: part["sha256"] for part in parts}
    return {"format": FORMAT, "step": step, "facts": facts, "files": files, "weights": weights}


def _publish(part: Path, target: Path, index: JsonObject, keep: int) -> None:
    """Write the index, give the snapshot its name, and remove older ones.

    Args:
        part: folder in which it was written.
        target: its name.
        index: contents of the index.
        keep: how many snapshots may stay.
    """
    with (part / INDEX).open("w", encoding="utf-8") as file:
        json.dump(index, file, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    _read_index(part)
    sync_folder(part)
    _remove(target)
    os.replace(part, target)
    sync_folder(target.parent)
    for old in snapshots(target.parent)[:-keep]:
        _remove(old)


def _remove(folder: Path) -> None:
    """Remove a snapshot so that a half removed one is never taken for a complete one."""
    if folder.exists():
        aside = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
        shutil.rmtree(aside)


def _check_pieces(snapshot: Snapshot) -> None:
    """Raises UserError if the files do not hold what the index says."""
    entries = {name: safetensors_io.read_header(snapshot.folder / name, in_place=True) for name in snapshot.files}
    for name, weight in snapshot.weights.items():
        for piece in weight.pieces:
            entry = entries[piece.file].get(_key(name, piece.offset))
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
                entry = entries[piece.file][_key(shard.name, piece.offset)]
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


def _check_fits(snapshot: Snapshot, shards: Iterable[Shard], *, is_anchor: bool) -> None:
    """Raises UserError if a snapshot holds other weights than an engine.

    Args:
        snapshot: its index.
        shards: the engine's.
        is_anchor: whether they are those of the copied anchor.
    """
    needed = {shard.name: (tuple(shard.shape), shard.tensor.dtype) for shard in shards if shard.shape.numel()}
    saved_names = {name for name in snapshot.weights if name.startswith(ANCHOR_PREFIX) == is_anchor}
    if other := sorted(needed.keys() ^ saved_names):
        raise UserError(f"{snapshot.folder}: of another model: {', '.join(other[:3])} is only in one of the two")
    for name, (shape, dtype) in needed.items():
        saved = snapshot.weights[name]
        if (saved.shape, saved.dtype) != (shape, dtype):
            raise UserError(
                f"{snapshot.folder}: {name} is {saved.dtype} {saved.shape} there, but {dtype} {shape} in this run "
                "(model.weights, model.name)"
            )
