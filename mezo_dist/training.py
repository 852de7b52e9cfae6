"""The training loop: plan, evaluate, update, log; and the same steps again from a log."""

from __future__ import annotations

import json
import logging
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezo_dist import checkpoint, trajectory
from mezo_dist.algorithms.base import Evaluation, Losses, Update
from mezo_dist.config import RunConfig, TrainConfig
from mezo_dist.config_reader import from_dict
from mezo_dist.directions.combination import ZERO, CoefficientError
from mezo_dist.errors import UserError
from mezo_dist.monitor import Monitor
from mezo_dist.runs import TRAJECTORY, Run, claim_folder, prepare, save_config
from mezo_dist.trajectory import Step, TrajectoryWriter
from mezo_dist.wire import Wire

log = logging.getLogger(__name__)


@dataclass
class _Progress:
    """Where the loop is."""

    state: Any
    step: int = 0
    skipped_in_a_row: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class Planned:
    """A step that was evaluated but not applied: the planner's next state, the log line, and what it cost."""

    state: Any
    step: Step
    metrics: dict[str, float]
    forwards: int
    """Forward passes, counted in samples."""


def train(config: RunConfig, wire: Wire) -> Path:
    """Run the whole job on this rank: evaluate, train, evaluate, export. Returns the run folder.

    Raises:
        UserError: bad input, or too many steps in a row without a finite loss.
        OutOfStepError: ranks disagree.
    """
    folder = claim_folder(config, wire)
    path = folder / TRAJECTORY
    resumed = path.exists()  # asked before `prepare`, where ranks meet: afterwards rank 0 may have made the file
    run = prepare(config, wire)
    is_main = wire.rank == 0
    progress = _Progress(run.algorithm.init())
    if resumed:
        before = _resume(run, path, progress)
    with Monitor.open(
        folder if is_main else None, is_main=is_main, num_steps=config.train.steps, first_step=progress.step
    ) as monitor:
        monitor.table("run", facts(run, folder))
        if is_main and not resumed:
            save_config(config, folder)
        monitor.text("config", f"```json\n{json.dumps(config.to_dict(), indent=2)}\n```")
        if not resumed:
            before = score(run, "test", monitor, 0) if config.output.test else {}
            _write_results(folder, is_main, {"before": before})
        writer = TrajectoryWriter(path, None if resumed else run.header()) if is_main else None
        started = time.perf_counter()
        try:
            _loop(run, progress, writer, monitor)
        finally:
            if writer is not None:
                writer.close()
        _finish(run, folder, progress, before, time.perf_counter() - started, monitor)
    return folder


def _loop(run: Run, progress: _Progress, writer: TrajectoryWriter | None, monitor: Monitor) -> None:
    config = run.config.train
    while progress.step < config.steps:
        began, sent = time.perf_counter(), run.wire.payload_bytes
        planned = plan_step(run, progress.state, progress.step)
        step = planned.step
        evaluated = time.perf_counter()
        if writer is not None:
            writer.append(step)  # before the weights change: what is on disk can be replayed, what is not never was
        run.apply(step)
        progress.state, progress.step = planned.state, progress.step + 1
        _count_skips(progress, step, config, monitor)
        scalars = {"loss/train" if name == "loss" else name: value for name, value in planned.metrics.items()}
        scalars |= {
            "time/evaluate_s": evaluated - began,
            "time/update_s": time.perf_counter() - evaluated,
            "wire/payload_bytes_per_step": float(run.wire.payload_bytes - sent),
            "memory/peak_rss_GiB": peak_rss_gib(),
            "skipped_steps": float(progress.skipped),
        }
        monitor.step(progress.step, scalars, samples=planned.forwards)
        if config.evaluate_every and progress.step % config.evaluate_every == 0 and progress.step < config.steps:
            score(run, "validation", monitor, progress.step)


def plan_step(run: Run, state: Any, number: int) -> Planned:
    """Evaluate step ``number``; nothing is applied yet.

    A loss (or a coefficient) that is not finite anywhere makes the step a skipped one, on every rank alike.
    """
    rounds: list[Losses] = []
    forwards = 0

    def skipped(reason: str) -> Planned:
        return Planned(state, Step(number, (), ZERO, reason), {}, forwards)

    request: Evaluation | Update = run.algorithm.plan(state, number)
    while isinstance(request, Evaluation):
        batch = run.batch(request.batch, number)
        forwards += len(request.variants) * sum(len(micro_batch.slots) for micro_batch in batch)
        losses = run.evaluator.losses(request, batch, (run.config.digest(), number, len(rounds)))
        if losses is None:
            return skipped("a loss is not finite")
        rounds.append(losses)
        try:
            request = run.algorithm.update(state, number, rounds)
        except CoefficientError as error:
            return skipped(str(error))
    return Planned(request.state, Step(number, tuple(rounds), request.combination), request.metrics, forwards)


def _count_skips(progress: _Progress, step: Step, config: TrainConfig, monitor: Monitor) -> None:
    if not step.skipped:
        progress.skipped_in_a_row = 0
        return
    progress.skipped += 1
    progress.skipped_in_a_row += 1
    monitor.say(f"step {progress.step}/{config.steps} skipped: {step.skipped} ({progress.skipped_in_a_row} in a row)")
    if progress.skipped_in_a_row >= config.max_skipped:
        raise UserError(
            f"train.max_skipped: {config.max_skipped} steps in a row had no finite loss, the last one step "
            f"{progress.step}; the learning rate or eps is probably too large, or the model needs another dtype "
            "(model.compute)"
        )


def replay(run: Run, steps: Sequence[Step]) -> None:
    """Apply logged steps to the base weights: the same bits as the run that logged them."""
    for step in steps:
        run.apply(step)


def check_header(run: Run, header: trajectory.Header) -> None:
    """Raises UserError naming what differs if a trajectory does not belong to this run's model and settings."""
    own = run.header()
    if own.config_digest != header.config_digest:
        keys = sorted(_differences(own.config, header.config))
        raise UserError(f"settings differ from those of the trajectory: {', '.join(keys)}; use another output.dir")
    for what, mine, theirs in (
        ("base model", own.base_fingerprint, header.base_fingerprint),
        ("law", own.law_version, header.law_version),
    ):
        if mine != theirs:
            raise UserError(f"the trajectory was made from another {what} ({theirs}) than this run's ({mine})")


def _differences(mine: Any, theirs: Any, path: str = "") -> list[str]:
    if isinstance(mine, dict) and isinstance(theirs, dict):
        names = (mine.keys() | theirs.keys()) - (set() if path else {"output", "distributed"})
        return [d for n in names for d in _differences(mine.get(n), theirs.get(n), f"{path}.{n}" if path else n)]
    return [path] if mine != theirs else []


def _resume(run: Run, path: Path, progress: _Progress) -> dict[str, float]:
    """Bring weights and planner to the end of the log. Returns the result before training, as it was written."""
    if run.wire.rank == 0:
        trajectory.cut_torn_line(path)
    run.wire.barrier()
    header, steps = trajectory.read(path)
    check_header(run, header)
    for step in steps:
        if step.skipped:
            progress.skipped += 1
            progress.skipped_in_a_row += 1
            continue
        progress.skipped_in_a_row = 0
        update = run.algorithm.update(progress.state, step.step, step.rounds)
        if isinstance(update, Evaluation) or update.combination != step.combination:
            raise UserError(f"{path}: step {step.step} is not what this version of the algorithm does; use replay")
        progress.state = update.state
    replay(run, steps)
    progress.step = len(steps)
    results = path.with_name("results.json")
    before: dict[str, float] = json.loads(results.read_text()).get("before", {}) if results.exists() else {}
    return before


def score(run: Run, split: str, monitor: Monitor, step: int) -> dict[str, float]:
    """Loss and metric of the current weights on a split, shown and logged."""
    samples = run.splits[split]
    with monitor.evaluation(split, len(samples)) as advance:
        result = run.evaluator.score(run.split(split), run.config.task.metric, len(run.config.task.labels), advance)
    monitor.result(split, step, result)
    return result


def _finish(
    run: Run, folder: Path, progress: _Progress, before: dict[str, float], seconds: float, monitor: Monitor
) -> None:
    is_main = run.wire.rank == 0
    results: dict[str, Any] = {"before": before, "steps": progress.step, "skipped_steps": progress.skipped}
    results["validation"] = score(run, "validation", monitor, progress.step)
    if run.config.output.test:
        results["after"] = score(run, "test", monitor, progress.step)
    results |= {"training_s": round(seconds, 1), "weights": run.engine.fingerprint()}
    _write_results(folder, is_main, results)
    if run.config.output.export and is_main:
        checkpoint.export(run.loaded.model, run.loaded.tokenizer, folder / "model")
    run.wire.barrier()
    for name in run.engine.never_used():
        log.warning("no forward pass ever used %s; its updates were noise (freeze it)", name)
    monitor.say(summary(run, folder, results))


def facts(run: Run, folder: Path) -> list[tuple[str, str]]:
    """What is about to happen, for people: shown before step 1."""
    config, loaded = run.config, run.loaded
    trainable = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
    sizes = ", ".join(f"{len(samples)} {name}" for name, samples in run.splits.items())
    algorithm = ", ".join(f"{k} {v}" for k, v in vars(config.algorithm).items() if isinstance(v, (int, float)))
    return [
        ("model", f"{config.model.name} ({trainable / 1e6:.1f}M trainable weights, {config.model.weights})"),
        ("task", f"{config.task.name}: {sizes} samples"),
        ("algorithm", f"{config.algorithm.name}: {algorithm}"),
        ("directions", f"{config.law}, run seed {config.seed}"),
        ("engine", f"{config.engine}, {run.wire.world_size} process(es)"),
        ("steps", f"{config.train.steps} of {config.train.batch_size} samples"),
        ("run folder", str(folder)),
    ]


def summary(run: Run, folder: Path, results: dict[str, Any]) -> str:
    """What happened, in plain words, and what to try next."""
    metric = run.config.task.metric
    lines = [""]
    if results.get("before") and results.get("after"):
        before, after = results["before"], results["after"]
        lines.append(
            f"On {len(run.splits['test'])} held-out test samples {metric} went from {before[metric]:.3f} to "
            f"{after[metric]:.3f} and the loss from {before['loss']:.3f} to {after['loss']:.3f}, with forward passes "
            f"only, in {results['steps']} steps ({results['training_s']:.0f} s)."
        )
    lines += [
        f"The whole fine-tuning is in {folder / TRAJECTORY} ({(folder / TRAJECTORY).stat().st_size / 1024:.0f} KiB): "
        "base model + this file = the fine-tuned model.",
        "What to try next:",
        f"  tensorboard --logdir {folder}",
    ]
    if run.config.output.export:
        loader = run.loaded.auto_class
        lines.append(f"  python -c \"import transformers as t; t.{loader}.from_pretrained('{folder / 'model'}')\"")
    return "\n".join([*lines, f"  mezo-dist evaluate {folder}"])


def _write_results(folder: Path, is_main: bool, results: dict[str, Any]) -> None:
    if is_main:
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def peak_rss_gib() -> float:
    """Peak resident memory of this process in GiB (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def rebuild(folder: Path, num_steps: int | None, wire: Wire) -> tuple[Run, int]:
    """The run in ``folder`` with its first ``num_steps`` steps applied (all if None), and their number.

    Raises:
        UserError: no run there, damaged, made from another base model, or shorter than asked for.
    """
    header, steps = trajectory.read(folder / TRAJECTORY)
    wanted = len(steps) if num_steps is None else num_steps
    if not 0 <= wanted <= len(steps):
        raise UserError(f"--step {wanted}: {folder} has {len(steps)} steps")
    run = prepare(from_dict(header.config, str(folder / TRAJECTORY)), wire)
    check_header(run, header)
    replay(run, steps[:wanted])
    return run, wanted
