"""The trajectory of an `Optimizer`: a file of all steps, from which the weights can be rebuilt."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast, final

from torch import nn

import mezo_dist
from mezo_dist import algorithms
from mezo_dist.algorithms import Settings
from mezo_dist.algorithms.base import Algorithm, Problem, StateT, state_from_json
from mezo_dist.algorithms.groups import Group, GroupedPlanner
from mezo_dist.algorithms.step import Progress, StepResult
from mezo_dist.config.schema import differences, digest_of
from mezo_dist.directions.law import Law
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.distributed.join import join
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.fingerprint import buffers_digest
from mezo_dist.engines.layouts.base import Layout
from mezo_dist.errors import UserError
from mezo_dist.json_types import JsonObject
from mezo_dist.storage.replay import logged_step, replay_steps
from mezo_dist.storage.trajectory import Header, Log, Mark, parse, read_bytes
from mezo_dist.storage.trajectory_writer import TrajectoryWriter


def describe(algorithm: Settings, law: Law, problem: Problem, groups: Sequence[Group] = ()) -> JsonObject:
    """The settings of an `Optimizer` in JSON types: what a trajectory's header needs to make its steps again.

    Args:
        algorithm: settings of the algorithm.
        law: of the directions.
        problem: what the algorithm knows about the run.
        groups: groups of weights whose learning rates come with each step, if there are any.
    """
    facts = {
        "algorithm": dataclasses.asdict(algorithm),
        "law": law.name,
        "direction_rank": law.rank,
        "problem": dataclasses.asdict(problem),
    }
    grouped = {"groups": [dataclasses.asdict(group) for group in groups]} if groups else {}
    return json.loads(json.dumps(facts | grouped))


def planner_of(settings: JsonObject, source: str) -> Algorithm[object]:
    """The planner that `describe` described. Raises UserError, naming ``source``, if it does not fit this version."""
    try:
        name = settings["algorithm"]["name"]
        kind = algorithms.ALGORITHMS[name][0]
        config: Settings = state_from_json(kind, settings["algorithm"])
        problem = Problem(**settings["problem"])
        if "groups" not in settings:
            return algorithms.build(name, config, problem)
        groups = tuple(Group(tuple(group["names"]), group["weight_decay"]) for group in settings["groups"])
        return cast("Algorithm[object]", GroupedPlanner(config, problem, groups))  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source}: not the trajectory of a mezo_dist.Optimizer of this version ({error!r})") from error


@final
class TrajectoryLog:
    """The log of one `Optimizer`; `open` makes one. Rank 0 writes."""

    def __init__(self, recorded: Log | None, writer: TrajectoryWriter | None) -> None:
        self._recorded, self._writer = recorded, writer

    @staticmethod
    def open(
        path: Path, settings: JsonObject, engine: Engine, weights: str, comm: Communicator, *, resume: bool
    ) -> TrajectoryLog:
        """Begin a trajectory, or go on with one. Collective.

        Args:
            path: of the file.
            settings: from `describe`.
            engine: owns the base weights.
            weights: their fingerprint.
            comm: the processes.
            resume: go on with the file if there is one.

        Raises:
            UserError: on all processes: the file exists and is not to be resumed, is damaged, or is of other settings
                or another base model; or it cannot be written.
        """
        header = header_of(settings, engine, weights)
        writers: list[TrajectoryWriter] = []

        def begin() -> str:
            if comm.rank != 0:
                return ""
            if path.exists() and not resume:
                raise UserError(f"trajectory: {path} exists; name another file, or go on with it (resume=True)")
            data = read_bytes(path) if path.exists() else b""
            log = parse(data, path)
            if log is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                writers.append(TrajectoryWriter.begin(path, header))
                return ""
            check_same(header, log.header, path)
            writers.append(TrajectoryWriter.go_on(path, log))
            return data.decode()

        text = comm.collect(begin)[0]
        recorded = parse(text.encode(), path) if text else None
        return TrajectoryLog(recorded, writers[0] if writers else None)

    def replay(self, engine: Engine, planner: Algorithm[StateT]) -> Progress[StateT]:
        """Bring base weights to where the log ends. Collective."""
        if self._recorded is None:
            return Progress(planner.init())
        log = self._recorded
        return replay_steps(engine, log.header.seed, planner, log, len(log.steps), anchor=True)

    def append(self, result: StepResult[StateT]) -> None:
        """Log a step; it is on disk when this returns. Raises UserError if that failed."""
        if self._writer is not None:
            self._writer.append(logged_step(result))

    def close(self, num_steps: int, weights: str) -> None:
        """Log the fingerprint ``weights`` of the weights after ``num_steps`` steps, and close the file."""
        if self._writer is not None:
            if self._recorded is None or max(self._recorded.marks, default=-1) < num_steps:
                self._writer.append(Mark(num_steps, weights))
            self._writer.close()


def replay(
    model: nn.Module,
    trajectory: str | Path,
    num_steps: int | None = None,
    *,
    layout: Layout | None = None,
    comm: Communicator | None = None,
) -> int:
    """Make a trained model of its base model and the trajectory that an `Optimizer` wrote. Collective.

    No data and no forward pass is needed: directions follow from the seed, and what was added from the logged losses.
    Fingerprints recorded on the way are verified.

    Args:
        model: with the base weights; changed in place.
        trajectory: the file.
        num_steps: how many of its steps; all if None.
        layout: where the weights live, from `mezo_dist.shard`; whole in every process if None.
        comm: the processes; those of the launcher if None.

    Returns:
        The number of steps.

    Raises:
        UserError: the file is missing or damaged, has fewer steps, or belongs to another base model.

    >>> import tempfile, torch
    >>> from mezo_dist import MeZO, Optimizer, replay
    >>> model, again = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)
    >>> _ = again.load_state_dict(model.state_dict())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with Optimizer(model, MeZO(lr=0.1), trajectory=f"{folder}/steps.jsonl") as opt:
    ...         for _ in range(5):
    ...             loss = opt.step(lambda model, x: model(x).square().mean(), torch.ones(4, 3))
    ...     replay(again, f"{folder}/steps.jsonl")
    5
    >>> torch.equal(model.weight, again.weight)
    True
    """
    path = Path(trajectory)
    log = _read(path, comm or join())
    wanted = len(log.steps) if num_steps is None else num_steps
    if not 0 <= wanted <= len(log.steps):
        raise UserError(f"num_steps: {path} has {len(log.steps)} steps, not {wanted}")
    settings = log.header.config
    planner = planner_of(settings, str(path))
    law = Law(settings["law"], settings["direction_rank"])
    engine = Engine(model, law, layout, stochastic_rounding="stochastic" in log.header.weights)
    check_same(header_of(settings, engine, engine.fingerprint()), log.header, path)
    replay_steps(engine, log.header.seed, planner, log, wanted)
    return wanted


def _read(path: Path, comm: Communicator) -> Log:
    """The trajectory, which rank 0 reads for all. Raises UserError if it is missing, damaged or empty. Collective."""

    def read() -> str:
        if comm.rank != 0:
            return ""
        if not path.is_file():
            raise UserError(f"trajectory: {path} does not exist")
        return read_bytes(path.resolve()).decode()  # the caller's own path may be a link

    log = parse(comm.collect(read)[0].encode(), path)
    if log is None:
        raise UserError(f"trajectory: {path} has no steps")
    return log


def header_of(settings: JsonObject, engine: Engine, weights: str) -> Header:
    """The header of a new trajectory.

    Args:
        settings: from `describe`.
        engine: owns the base weights.
        weights: their fingerprint.
    """
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in engine.model.parameters() if p.requires_grad})
    rounding = "stochastic rounding" if engine.stochastic_rounding else "to nearest"
    return Header(
        config=settings,
        config_digest=digest_of(settings),
        base_model=type(engine.model).__name__,
        base_fingerprint=weights,
        model_config=buffers_digest(engine.model),
        tokenizer="",  # tokens and data are the caller's
        data={},
        law_version=engine.law.version,
        weights=f"{' and '.join(dtypes)}, {rounding}",
        seed=settings["problem"]["seed"],
        full_size=settings["problem"]["full_size"],
        version=mezo_dist.__version__,
        num_train=settings["problem"]["num_train"],
        eps=settings["problem"]["eps"],
    )


def check_same(here: Header, there: Header, path: Path) -> None:
    """Raises UserError, which names what differs, if a trajectory is not of these settings and base weights.

    Args:
        here: header of this optimizer.
        there: header of the trajectory.
        path: of the trajectory, for messages.
    """
    facts = {
        "base weights": "base_fingerprint",
        "saved buffers": "model_config",
        "law": "law_version",
        "kind of weights": "weights",
    }
    others = [*differences(here.config, there.config)]
    others += [what for what, name in facts.items() if getattr(here, name) != getattr(there, name)]
    if others:
        raise UserError(f"trajectory: {path} was made with other settings or weights: {', '.join(others)}")
