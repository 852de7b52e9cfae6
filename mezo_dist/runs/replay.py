"""A run goes on, or is made again: from its trajectory, and the newest snapshot that it has."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from mezo_dist.algorithms.base import Algorithm
from mezo_dist.algorithms.step import Progress
from mezo_dist.config.schema import NO_RESULTS, RunConfig
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.errors import UserError
from mezo_dist.runs.model import LoadedModel
from mezo_dist.storage import snapshots
from mezo_dist.storage.replay import replay_steps
from mezo_dist.storage.trajectory import Header, Log

log = logging.getLogger(__name__)


def check_config(config: RunConfig, header: Header) -> None:
    """Raises UserError naming the settings in which a run differs from the trajectory that it wants to go on with."""
    if config.digest() != header.config_digest:
        keys = sorted(_differences(config.to_dict(), header.config))
        raise UserError(
            f"settings differ from those of the trajectory: {', '.join(keys)}; use another output.dir, or --force-new"
        )


def check_header(mine: Header, theirs: Header) -> None:
    """Raises UserError if a trajectory was made from something else than what this run has loaded."""
    for what, name in _FACTS.items():
        here, there = getattr(mine, name), getattr(theirs, name)
        if here != there:
            raise UserError(f"the trajectory was made from another {what} ({there}) than this run's ({here})")


_FACTS = {
    "base model": "base_fingerprint",
    "law": "law_version",
    "kind of weights": "weights",
    "full batch": "full_size",
    "training set": "num_train",
}


def _differences(mine: Any, theirs: Any, path: str = "") -> list[str]:
    if isinstance(mine, dict) and isinstance(theirs, dict):
        names = (mine.keys() | theirs.keys()) - (set() if path else set(NO_RESULTS))
        return [d for n in names for d in _differences(mine.get(n), theirs.get(n), f"{path}.{n}" if path else n)]
    return [path] if mine != theirs else []


def replay_from_newest(
    loaded: LoadedModel,
    algorithm: Algorithm[Any],
    recorded: Log,
    num_steps: int,
    folder: Path,
    comm: Communicator,
    *,
    anchor: bool = False,
) -> tuple[Progress[Any], int]:
    """`replay_steps` from the newest sound snapshot that is not too new, or else from the base. Collective.

    Args:
        loaded: the base model.
        algorithm: the run's planner.
        recorded: the trajectory.
        num_steps: at most as many as it has.
        folder: of the snapshots.
        comm: the ranks.
        anchor: see `replay_steps`; snapshots hold the last copy, too.

    Returns:
        Where the run is, and the number of steps that the snapshot held (0: none was used).
    """
    start = _load_newest(loaded, recorded, num_steps, folder, comm, anchor=anchor)
    began = time.perf_counter()
    seed = recorded.header.seed
    progress = replay_steps(loaded.engine, seed, algorithm, recorded, num_steps, start=start, anchor=anchor)
    log.info("rebuilt steps %d to %d in %.1f s", start, progress.step, time.perf_counter() - began)
    return progress, start


def snapshot_facts(header: Header) -> dict[str, str]:
    """What a snapshot must share with the run that wants to go on from it."""
    return {"identity": header.identity, "base_fingerprint": header.base_fingerprint}


def _load_newest(
    loaded: LoadedModel, recorded: Log, num_steps: int, folder: Path, comm: Communicator, *, anchor: bool
) -> int:
    """Load the newest snapshot that is sound and not after ``num_steps``. Returns its step, 0 if there is none."""
    failed = False
    names = comm.broadcast_text(" ".join(path.name for path in snapshots.snapshots(folder))).split()
    for name in reversed(names):
        try:
            about = comm.collect(lambda path=folder / name: _about(snapshots.read_snapshot(path)))[0]  # type: ignore[misc]
            if about["facts"] != snapshot_facts(recorded.header):
                log.warning("%s belongs to another run; it is left alone", folder / name)
            elif about["step"] <= num_steps:
                return snapshots.load_snapshot(folder / name, loaded.engine, comm, anchor=anchor).step
        except UserError as error:
            log.warning("a snapshot cannot be used, an older one may do: %s", error)
            failed = True
    if failed and loaded.engine.fingerprint() != recorded.header.base_fingerprint:
        raise UserError(f"a snapshot in {folder} could be read in part only; remove it and start again")
    return 0


def _about(snapshot: snapshots.Snapshot) -> dict[str, Any]:
    return {"facts": snapshot.facts, "step": snapshot.step}
