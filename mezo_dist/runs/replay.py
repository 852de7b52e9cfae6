"""From a trajectory back to weights: base + what the logged losses say was done to them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mezo_dist.algorithms.base import Algorithm, Evaluation, Update
from mezo_dist.algorithms.operations import CopyAnchor, Operation, apply_updates
from mezo_dist.algorithms.step import Progress
from mezo_dist.config.schema import NO_RESULTS, RunConfig
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.engine import Engine
from mezo_dist.errors import UserError
from mezo_dist.runs.model import LoadedModel
from mezo_dist.storage import snapshots
from mezo_dist.storage.trajectory import Header, Log, Step, digest

log = logging.getLogger(__name__)
TERMS_AT_ONCE = 4096
"""About how many terms are added in one pass over the weights; more would only take memory."""


def replay_updates(
    algorithm: Algorithm[Any], steps: Sequence[Step], progress: Progress[Any]
) -> Iterator[Update[Any] | None]:
    """What each of the logged steps did, None where it was skipped. ``progress`` is after the step that came last.

    Raises:
        UserError: the algorithm computes something else from the losses than it did in the run.
    """
    for step in steps:
        if step.skipped:
            progress.after(None)
            yield None
            continue
        update = algorithm.update(progress.state, step.step, step.rounds)
        if isinstance(update, Evaluation) or digest(update.operations) != step.update:
            raise UserError(
                f"step {step.step} is not what this version of the algorithm makes of its losses; the trajectory's "
                "header names the version of mezo_dist that can rebuild it"
            )
        progress.after(update)
        yield update


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
}


def _differences(mine: Any, theirs: Any, path: str = "") -> list[str]:
    if isinstance(mine, dict) and isinstance(theirs, dict):
        names = (mine.keys() | theirs.keys()) - (set() if path else set(NO_RESULTS))
        return [d for n in names for d in _differences(mine.get(n), theirs.get(n), f"{path}.{n}" if path else n)]
    return [path] if mine != theirs else []


def replay_steps(
    engine: Engine,
    run_seed: int,
    algorithm: Algorithm[Any],
    recorded: Log,
    num_steps: int,
    *,
    start: int = 0,
    verify: bool = True,
    anchor: bool = False,
) -> Progress[Any]:
    """Bring weights that are those after ``start`` steps to where they were after ``num_steps``. Collective.

    Args:
        engine: owns the weights: the base model's, or what a snapshot made of them.
        run_seed: seed of the run.
        algorithm: the run's planner.
        recorded: the trajectory.
        num_steps: at most as many as it has.
        start: steps that the weights have seen.
        verify: compare the weights with all fingerprints on the way, which costs a pass over them for each.
        anchor: also make the copies that the run made (`CopyAnchor`); a run that goes on needs the last of them.

    Raises:
        UserError: the weights are not what they were, or see `replay_updates`.
    """
    progress = Progress(algorithm.init())
    pending: list[tuple[int, Sequence[Operation]]] = []
    num_terms = 0
    for update in replay_updates(algorithm, recorded.steps[:num_steps], progress):
        if progress.step <= start:
            continue
        if update is not None:
            pending.append((progress.step - 1, update.operations))
            num_terms += len(update.combination)
        marked = verify and progress.step in recorded.marks
        if marked or num_terms >= TERMS_AT_ONCE:
            apply_updates(engine, run_seed, _with_last_copy(pending, anchor=anchor))
            pending, num_terms = [], 0
        if marked:
            _check_mark(engine, recorded.marks[progress.step], progress.step)
    apply_updates(engine, run_seed, _with_last_copy(pending, anchor=anchor))
    return progress


def _with_last_copy(
    updates: Sequence[tuple[int, Sequence[Operation]]], *, anchor: bool
) -> list[tuple[int, list[Operation]]]:
    """The updates without copies that a later one replaces (without any, if no ``anchor`` is wanted)."""
    copying = [step for step, operations in updates if CopyAnchor() in operations]
    last = copying[-1] if copying and anchor else None
    return [
        (step, [o for o in operations if not isinstance(o, CopyAnchor) or step == last]) for step, operations in updates
    ]


def _check_mark(engine: Engine, recorded: str, step: int) -> None:
    fingerprint = engine.fingerprint()
    if fingerprint != recorded:
        raise UserError(
            f"after step {step} the weights have the fingerprint {fingerprint}, but had {recorded} in the run: it was "
            "made on another kind of machine, with other software, or on a faulty one"
        )


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
