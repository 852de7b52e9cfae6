"""Writing a snapshot: every rank its file of pieces, rank 0 the index; see `snapshots` for the format."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.layouts.base import Shard
from mezo_dist.errors import UserError
from mezo_dist.json_types import JsonObject
from mezo_dist.storage import safetensors_io
from mezo_dist.storage.files import remove, sync_folder
from mezo_dist.storage.snapshots import FORMAT, INDEX, folder_name, piece_key, read_index, snapshots


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

    The copy that the engine keeps (`Engine.copy_anchor`) is saved, too, and so is the state of an optimiser
    (`Engine.optimizer`), if there is one; buffers are not, as they are
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
    target = folder / folder_name(step)
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
    yield from engine.optimizer_shards()


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


def _write_part(folder: Path, file: str, engine: Engine, assigned: Mapping[str, JsonObject]) -> JsonObject:
    """Write one rank's file of a snapshot. Returns what the index needs of it.

    Args:
        folder: of the snapshot.
        file: name of the file.
        engine: owns the weights.
        assigned: the pieces to write, by name.
    """
    layout = {
        piece_key(name, piece["offset"]): (safetensors_io.DTYPES[piece["dtype"]], [piece["size"]])
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
    read_index(part)
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
