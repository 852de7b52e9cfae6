"""From a trajectory back to weights: base + what the logged losses say was added."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mezo_dist.storage import snapshots
from mezo_dist.storage import trajectory
from mezo_dist.algorithms.base import Algorithm, Evaluation, Update
from mezo_dist.config.schema import NO_RESULTS, EngineConfig, RunConfig
from mezo_dist.config.reader import from_dict
from mezo_dist.directions.combination import ZERO, Combination
from mezo_dist.errors import UserError
from mezo_dist.storage.run_folder import read_log
from mezo_dist.runs.build import Weights, agree, build_algorithm, load_weights
from mezo_dist.storage.trajectory import Header, Log, Step, digest
from mezo_dist.distributed.communicator import Wire

log = logging.getLogger(__name__)
TERMS_AT_ONCE = 4096
"""About how many terms are added in one pass over the weights; more would only take memory."""


@dataclass
class Progress:
    """Where a run is."""

    state: Any
    """Of the planner."""
    step: int = 0
    """Steps done."""
    skipped: int = 0
    skipped_in_a_row: int = 0

    def after(self, state: Any, *, skipped: bool) -> None:
        """Count one more step."""
        self.state, self.step = state, self.step + 1
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0


def plan_again(algorithm: Algorithm, steps: Sequence[Step], progress: Progress) -> Iterator[Update]:
    """What each of the logged steps did to the weights. ``progress`` is after the step that came last.

    Raises:
        UserError: the algorithm computes something else from the losses than it did in the run.
    """
    for step in steps:
        if step.skipped:
            progress.after(progress.state, skipped=True)
            yield Update(progress.state, ZERO)
            continue
        update = algorithm.update(progress.state, step.step, step.rounds)
        if isinstance(update, Evaluation) or digest(update.combination, update.scale) != step.update:
            raise UserError(
                f"step {step.step} is not what this version of the algorithm makes of its losses; the trajectory's "
                "header names the version of mezo_dist that can rebuild it"
            )
        progress.after(update.state, skipped=False)
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
        own, other = getattr(mine, name), getattr(theirs, name)
        if own != other:
            raise UserError(f"the trajectory was made from another {what} ({other}) than this run's ({own})")


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


def open_run(
    folder: Path, num_steps: int | None, wire: Wire, *, trust_remote_code: bool = False
) -> tuple[Log, RunConfig, int]:
    """Trajectory, settings and number of wanted steps of the run in ``folder``.

    Raises:
        UserError: no run there, damaged, or shorter than asked for.
    """
    found = read_log(folder, wire)
    wanted = len(found.steps) if num_steps is None else num_steps
    if not 0 <= wanted <= len(found.steps):
        raise UserError(f"--step {wanted}: {folder} has {len(found.steps)} steps")
    config = from_dict(found.header.config, str(folder / trajectory.FILE))
    if config.model.trust_remote_code and not trust_remote_code:
        raise UserError(
            f"{folder}: model {config.model.name} brings code of its own. A run folder from somebody else must not "
            "start that unasked: add --trust-remote-code if you do trust it"
        )
    if wire.world_size == 1:
        config = dataclasses.replace(config, engine=EngineConfig())  # the same bits, and no processes to shard over
    return found, config, wanted


def audit(folder: Path, num_steps: int | None, wire: Wire, *, trust_remote_code: bool = False) -> tuple[Weights, str]:
    """Rebuild weights from base and trajectory alone, no snapshot and no data, and verify all recorded fingerprints.

    Returns:
        The weights, and what was done, for people.

    Raises:
        UserError: something is missing, damaged or not as it was; see `open_run`, `rebuild`.
    """
    found, config, wanted = open_run(folder, num_steps, wire, trust_remote_code=trust_remote_code)
    weights = load_weights(config, wire)
    agree(weights, wire)
    header = found.header
    check_header(weights.header(header.full_size), header)
    began = time.perf_counter()
    progress = rebuild(weights, build_algorithm(config, header.full_size), found, wanted)
    seconds = time.perf_counter() - began
    verified = [done for done in found.marks if done <= wanted]
    updated = sum(p.numel() for p in weights.loaded.model.parameters() if p.requires_grad) * progress.step
    return weights, "\n".join(
        [
            f"{header.base_model} + {progress.step} steps ({progress.skipped} skipped) in {seconds:.1f} s "
            f"({updated / max(seconds, 1e-9) / 1e9:.2f} billion weights x steps per second)",
            f"fingerprint {weights.engine.fingerprint()}",
            f"verified {len(verified)} recorded fingerprint(s), after steps {verified}",
        ]
    )


@dataclass
class _Pending:
    """Updates that wait to be applied, all in one pass over the weights."""

    weights: Weights
    updates: list[tuple[Combination, int]] = field(default_factory=list)
    num_terms: int = 0
    before_anchor: int | None = None
    """How many of them come before the last anchor; None: none of them is one."""

    def add(self, step: int, update: Update, *, anchor: bool) -> None:
        if update.keep and anchor:
            self.before_anchor = len(self.updates)
        if update.scale != 1:  # what waits comes first
            self.apply()
            self.weights.engine.scale(update.scale, self.weights.decay_seed(step))
        if update.combination:
            self.updates.append((update.combination, self.weights.rounding_seed(step)))
            self.num_terms += len(update.combination)

    def apply(self) -> None:
        first = 0
        if self.before_anchor is not None:
            first = self.before_anchor
            self.weights.engine.apply_steps(self.updates[:first])
            self.weights.engine.keep_anchor()
        self.weights.engine.apply_steps(self.updates[first:])
        self.updates, self.num_terms, self.before_anchor = [], 0, None


def rebuild(
    weights: Weights,
    algorithm: Algorithm,
    found: Log,
    num_steps: int,
    *,
    start: int = 0,
    verify: bool = True,
    anchor: bool = False,
) -> Progress:
    """Bring weights that are those after ``start`` steps to where they were after ``num_steps``. Collective.

    Args:
        weights: the base model, or what a snapshot made of it.
        algorithm: the run's planner.
        found: the trajectory.
        num_steps: at most as many as it has.
        start: steps that the weights have seen.
        verify: compare the weights with all fingerprints on the way, which costs a pass over them for each.
        anchor: also keep the copies that the run kept (`Update.keep`); one that goes on needs the last of them.

    Raises:
        UserError: the weights are not what they were, or see `plan_again`.
    """
    progress = Progress(algorithm.init())
    pending = _Pending(weights)
    for update in plan_again(algorithm, found.steps[:num_steps], progress):
        if progress.step <= start:
            continue
        pending.add(progress.step - 1, update, anchor=anchor)
        marked = verify and progress.step in found.marks
        if marked or pending.num_terms >= TERMS_AT_ONCE:
            pending.apply()
        if marked:
            _check_mark(weights, found.marks[progress.step], progress.step)
    pending.apply()
    return progress


def _check_mark(weights: Weights, recorded: str, step: int) -> None:
    own = weights.engine.fingerprint()
    if own != recorded:
        raise UserError(
            f"after step {step} the weights have the fingerprint {own}, but had {recorded} in the run: it was made on "
            "another kind of machine, with other software, or on a faulty one"
        )


def rebuild_from_newest(
    weights: Weights,
    algorithm: Algorithm,
    found: Log,
    num_steps: int,
    snapshots: Path,
    wire: Wire,
    *,
    anchor: bool = False,
) -> tuple[Progress, int]:
    """`rebuild` from the newest sound snapshot that is not too new, or else from the base. Collective.

    Snapshots hold the copy that was kept last, too (``anchor``).

    Returns:
        Where the run is, and the number of steps that the snapshot held (0: none was used).
    """
    start = _load_newest(weights, found, num_steps, snapshots, wire, anchor=anchor)
    began = time.perf_counter()
    progress = rebuild(weights, algorithm, found, num_steps, start=start, anchor=anchor)
    log.info("rebuilt steps %d to %d in %.1f s", start, progress.step, time.perf_counter() - began)
    return progress, start


def snapshot_facts(header: Header) -> dict[str, str]:
    """What a snapshot must share with the run that wants to go on from it."""
    return {"identity": header.identity, "base_fingerprint": header.base_fingerprint}


def _load_newest(weights: Weights, found: Log, num_steps: int, folder: Path, wire: Wire, *, anchor: bool) -> int:
    """Load the newest snapshot that is sound and not after ``num_steps``. Returns its step, 0 if there is none."""
    failed = False
    names = wire.broadcast_text(" ".join(path.name for path in snapshots.snapshots(folder))).split()
    for name in reversed(names):
        try:
            about = wire.collect(lambda path=folder / name: _about(snapshots.read_snapshot(path)))[0]  # type: ignore[misc]
            if about["facts"] != snapshot_facts(found.header):
                log.warning("%s belongs to another run; it is left alone", folder / name)
            elif about["step"] <= num_steps:
                return snapshots.load_snapshot(folder / name, weights.engine, wire, anchor=anchor).step
        except UserError as error:
            log.warning("a snapshot cannot be used, an older one may do: %s", error)
            failed = True
    if failed and weights.engine.fingerprint() != found.header.base_fingerprint:
        raise UserError(f"a snapshot in {folder} could be read in part only; remove it and start again")
    return 0


def _about(snapshot: snapshots.Snapshot) -> dict[str, Any]:
    return {"facts": snapshot.facts, "step": snapshot.step}
