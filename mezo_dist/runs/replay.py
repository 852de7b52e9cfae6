"""Resuming and rebuilding a run: from its trajectory, and from the newest snapshot that it has."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from mezo_dist.algorithms.base import Algorithm, StateT
from mezo_dist.algorithms.step import Progress
from mezo_dist.config.schema import NO_RESULTS, RunConfig, differences
from mezo_dist.config.yaml_file import shown
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.engine import Engine
from mezo_dist.errors import UserError
from mezo_dist.json_types import JsonObject
from mezo_dist.runs.model import LoadedModel, reload_base
from mezo_dist.storage import snapshots
from mezo_dist.storage.replay import replay_steps
from mezo_dist.storage.run_folder import Claim, cut_log
from mezo_dist.storage.trajectory import Header, Log, Mark

log = logging.getLogger(__name__)


def check_config(config: RunConfig, header: Header) -> None:
    """Raises UserError naming the settings in which a run differs from the trajectory that it wants to go on with."""
    if config.digest() != header.config_digest:
        here, there = ({k: v for k, v in c.items() if k not in NO_RESULTS} for c in (config.to_dict(), header.config))
        names = sorted(differences(here, there))
        told = [f"{name} ({shown(_value(there, name))} there, {shown(_value(here, name))} here)" for name in names]
        raise UserError(
            f"settings differ from those of the trajectory: {', '.join(told)}; put back what they were, or use another "
            "output.dir, or --force-new"
        )


def _value(settings: object, name: str) -> object:
    """A setting by its dotted name; None where there is none of that name."""
    for part in name.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings


def check_header(mine: Header, theirs: Header) -> None:
    """Raises UserError if a trajectory belongs to another base model, tokenizer, law or data than this run has
    loaded."""
    here, there = _facts(mine), _facts(theirs)
    others = [
        f"{what} ({there.get(what)} there, {fact} here)" for what, fact in here.items() if there.get(what) != fact
    ]
    if others:
        raise UserError(
            f"the trajectory was made from another {', '.join(others)}: put back what it was, or begin a new run "
            "(another output.dir, or --force-new)"
        )


def _facts(header: Header) -> dict[str, object]:
    """What must not differ between a trajectory and the run that goes on with it, beside the settings."""
    return {
        "base model": header.base_fingerprint,
        "model config, saved buffers or code": header.model_config,
        "tokenizer": header.tokenizer,
        "law": header.law_version,
        "seed": header.seed,
        "kind of weights": header.weights,
        **{f"{name} split": digest for name, digest in header.data.items()},
        "full batch": header.full_size,
        "training set": header.num_train,
    }


def replay_from_newest(
    loaded: LoadedModel,
    algorithm: Algorithm[StateT],
    recorded: Log,
    num_steps: int,
    folder: Path,
    comm: Communicator,
    *,
    anchor: bool = False,
) -> tuple[Progress[StateT], int]:
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


def go_back_to_snapshot(
    loaded: LoadedModel, algorithm: Algorithm[StateT], claim: Claim, recorded: Log, comm: Communicator
) -> tuple[Claim, Progress[StateT]]:
    """Bring a run of a first-order baseline to its newest sound snapshot, or to its base, and cut its trajectory there:
    the steps after it are in no weights, and are taken again. Collective.

    Args:
        loaded: the base model.
        algorithm: the run's planner.
        claim: the run folder.
        recorded: its trajectory.
        comm: the ranks.

    Returns:
        The run folder with the shorter trajectory, and where the run is.
    """
    done = len(recorded.steps)
    start = _load_newest(loaded, recorded, done, claim.snapshots, comm, anchor=False)
    if start < done:
        log.warning(
            "%s: %s, so that the %d step(s) after it are taken again (output.snapshot_every)",
            claim.folder,
            f"the newest snapshot is that after step {start}" if start else "there is no snapshot, only the base model",
            done - start,
        )
        claim = cut_log(claim, start, comm)
        assert claim.log is not None
        recorded = claim.log
    return claim, replay_steps(loaded.engine, recorded.header.seed, algorithm, recorded, start, start=start)


def load_saved(loaded: LoadedModel, recorded: Log, num_steps: int | None, folder: Path, comm: Communicator) -> int:
    """Give the base model the weights that a run of a first-order baseline saved. Collective.

    Args:
        loaded: the base model.
        recorded: the trajectory.
        num_steps: after so many steps; None: the newest that were saved.
        folder: of the snapshots.
        comm: the ranks.

    Returns:
        The number of steps that they have seen.

    Raises:
        UserError: no such weights were saved.
    """
    start = _load_newest(loaded, recorded, len(recorded.steps) if num_steps is None else num_steps, folder, comm)
    if start != num_steps and (num_steps is not None or (recorded.steps and not start)):
        names = comm.broadcast_text(", ".join(path.name for path in snapshots.snapshots(folder)))
        what = "the last step" if num_steps is None else f"step {num_steps}"
        raise UserError(
            f"{folder.parent}: weights of a first-order run are in its snapshots alone, and there is none of {what} "
            f"that can be used (there: {names or 'none'}); --step 0 is the base model"
        )
    if start < len(recorded.steps):
        log.warning("%s: the weights are those after step %d of %d", folder.parent, start, len(recorded.steps))
    return start


def snapshot_facts(header: Header) -> dict[str, str]:
    """What a snapshot must share with the run that wants to go on from it."""
    return {"identity": header.identity, "base_fingerprint": header.base_fingerprint}


def _load_newest(
    loaded: LoadedModel, recorded: Log, num_steps: int, folder: Path, comm: Communicator, *, anchor: bool = False
) -> int:
    """Load the newest snapshot that is sound and not after ``num_steps``. Returns its step, 0 if there is none.

    Args:
        loaded: the base model.
        recorded: the trajectory.
        num_steps: the last step that is wanted.
        folder: of the snapshots.
        comm: the ranks.
        anchor: also fill the copy of the anchor.
    """
    tried = False
    names = comm.broadcast_text(" ".join(path.name for path in snapshots.snapshots(folder))).split()
    for name in reversed(names):
        try:
            about = comm.collect(lambda path=folder / name: _about(snapshots.read_snapshot(path)))[0]  # type: ignore[misc]
            step = about["step"]
            if about["facts"] != snapshot_facts(recorded.header):
                log.warning("%s belongs to another run; it is left alone", folder / name)
            elif step <= num_steps and step not in recorded.marks:
                log.warning("%s: the trajectory has no fingerprint of it; it is left alone", folder / name)
            elif step <= num_steps:
                tried = True
                snapshots.load_snapshot(folder / name, loaded.engine, comm, anchor=anchor)
                _check_loaded(folder / name, loaded.engine, recorded.marks[step], anchor=anchor)
                return step
        except UserError as error:
            log.warning("a snapshot cannot be used, so an older one is tried, or the base model: %s", error)
    if (
        tried and loaded.engine.fingerprint() != loaded.base_fingerprint
    ):  # a snapshot took the place of the base's weights
        reload_base(loaded)
    return 0


def _check_loaded(snapshot: Path, engine: Engine, recorded: Mark, *, anchor: bool) -> None:
    """Raises UserError if what was loaded is not what the trajectory says of that step.

    Args:
        snapshot: folder of the snapshot.
        engine: owns the weights.
        recorded: what the trajectory says of that step.
        anchor: whether the copy of the anchor counts, too.
    """
    if engine.fingerprint() != recorded.weights:
        raise UserError(f"{snapshot}: its weights are not those of the run (their fingerprint is another one)")
    if anchor and engine.anchor_fingerprint() != recorded.anchor:
        raise UserError(f"{snapshot}: its copy of the anchor is not the one of the run (another fingerprint)")


def _about(snapshot: snapshots.Snapshot) -> JsonObject:
    return {"facts": snapshot.facts, "step": snapshot.step}
