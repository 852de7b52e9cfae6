"""Opening a run folder: the run that lies there, rebuilt at any of its steps."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

from mezo_dist import algorithms
from mezo_dist.algorithms import FirstOrder
from mezo_dist.config.reader import from_dict
from mezo_dist.config.schema import LayoutConfig, RunConfig
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.errors import UserError, printable
from mezo_dist.objectives.rewards.judge import Judge
from mezo_dist.runs.build import Run, build_run, problem_of
from mezo_dist.runs.model import LoadedModel, check_agreement, load_base
from mezo_dist.runs.replay import check_header, load_saved, replay_from_newest
from mezo_dist.storage import trajectory
from mezo_dist.storage.replay import replay_steps
from mezo_dist.storage.run_files import SNAPSHOTS
from mezo_dist.storage.run_folder import read_log
from mezo_dist.storage.trajectory import Log

LEAST_SEEDS = 1 << 20
"""Directions of a step that a trajectory of any size may ask for."""


@dataclass(frozen=True)
class OpenedRun:
    """A run folder that was read; no model has been loaded yet."""

    folder: Path
    log: Log
    config: RunConfig
    num_steps: int
    """How many of its steps are wanted."""
    asked: int | None = None
    """The same, if somebody asked for a number; None: as many as there are."""


def open_run(folder: Path, num_steps: int | None, comm: Communicator, *, trust_remote_code: bool = False) -> OpenedRun:
    """Read the trajectory in ``folder``. Collective.

    Args:
        folder: of the run.
        num_steps: how many of its steps are wanted; None: all.
        comm: the ranks.
        trust_remote_code: let the model's own code run, if the run did.

    Raises:
        UserError: no run there, damaged, or shorter than asked for; or its model brings code that is not trusted.
    """
    log = read_log(folder, comm)
    wanted = len(log.steps) if num_steps is None else num_steps
    if not 0 <= wanted <= len(log.steps):
        raise UserError(f"--step {wanted}: {folder} has {len(log.steps)} steps")
    config = from_dict(log.header.config, str(folder / trajectory.FILE))
    if config.digest() != log.header.config_digest:
        raise UserError(
            f"{folder / trajectory.FILE}: its settings do not fit their digest: they were edited, or another version "
            f"of mezo_dist ({log.header.version}) reads them otherwise"
        )
    _check_size(config, log)
    if config.model.trust_remote_code and not trust_remote_code:
        raise UserError(
            f"{folder}: model {config.model.name} brings code of its own. A run folder from somebody else must not "
            "start that unasked: add --trust-remote-code if you do trust it"
        )
    # The weights are what counts here, and they are the same. Perhaps there is no GPU for graphs, or no compiler.
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, compile="off"))
    if comm.world_size == 1:
        config = dataclasses.replace(config, layout=LayoutConfig())  # the same bits, and no processes to shard over
    else:
        config = dataclasses.replace(config, layout=dataclasses.replace(config.layout, linear="materialised"))
    return OpenedRun(folder, log, config, wanted, num_steps)


def _check_size(config: RunConfig, log: Log) -> None:
    """Raises UserError if the planner would draw far more seeds for a step than the file can hold losses."""
    algorithm, header = config.algorithm, log.header
    directions = max(getattr(algorithm, name, 1) for name in ("directions", "anchor_directions"))
    samples = max(header.full_size, config.train.batch_size) if getattr(algorithm, "per_sample", False) else 1
    if log.steps and directions * samples > max(log.size, LEAST_SEEDS):
        raise UserError(
            f"algorithm.directions: a step would have {directions * samples} of them, but the file no losses"
        )


def load_run(opened: OpenedRun, comm: Communicator, judge: Judge | None = None) -> Run:
    """The opened run, built, with the weights that it had after the wanted steps. Collective.

    Args:
        opened: the run.
        comm: the ranks.
        judge: what judges written texts; None: nothing, whatever the run's config names.

    Raises:
        UserError: data, model or weights are not those of the run.
    """
    run = build_run(opened.config, comm, opened.log.header, judge)
    check_header(run.header(), opened.log.header)
    snapshots, num_steps = opened.folder / SNAPSHOTS, opened.num_steps
    if isinstance(opened.config.algorithm, FirstOrder):
        num_steps = load_saved(run.loaded, opened.log, opened.asked, snapshots, comm)
    else:
        replay_from_newest(run.loaded, run.algorithm, opened.log, num_steps, snapshots, comm)
    return dataclasses.replace(run, step=num_steps)


def audit(opened: OpenedRun, comm: Communicator) -> tuple[LoadedModel, str]:
    """Rebuild weights from base and trajectory alone, no snapshot and no data, and verify all recorded fingerprints.

    Returns:
        The model, and what was done, for people.

    Raises:
        UserError: something is missing, damaged or not as it was.
    """
    if isinstance(opened.config.algorithm, FirstOrder):
        raise UserError(
            f"{opened.folder}: a run of algorithm.name: {opened.config.algorithm.name} cannot be rebuilt from its "
            "losses, as its gradients were not logged; its weights are in its snapshots: `evaluate` and `export` "
            "take the last one"
        )
    loaded = load_base(opened.config, comm)
    check_agreement(loaded, comm)
    header = opened.log.header
    problem = problem_of(opened.config, header.full_size, header.num_train, header.eps)
    check_header(loaded.header(problem, header.data), header)  # there is no data to compare
    began = time.perf_counter()
    algorithm = algorithms.build(opened.config.algorithm.name, opened.config.algorithm, problem)
    progress = replay_steps(loaded.engine, header.seed, algorithm, opened.log, opened.num_steps)
    seconds = time.perf_counter() - began
    verified = [done for done in opened.log.marks if done <= opened.num_steps]
    updated = sum(p.numel() for p in loaded.pretrained.model.parameters() if p.requires_grad) * progress.step
    return loaded, "\n".join(
        [
            f"{printable(header.base_model)} + {progress.step} steps ({progress.skipped} skipped) in {seconds:.1f} s "
            f"({updated / max(seconds, 1e-9) / 1e9:.2f} billion weights x steps per second)",
            f"fingerprint {loaded.engine.fingerprint()}",
            f"verified {len(verified)} recorded fingerprint(s), after steps {verified}",
        ]
    )
