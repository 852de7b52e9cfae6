"""The training loop: plan, evaluate, update, log; and the same steps again from a log."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import resource
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezo_dist.storage import trajectory
from mezo_dist.algorithms.base import Evaluation, Losses, Update
from mezo_dist.objectives.calibration import MOST_SAMPLES, Calibration
from mezo_dist.config.schema import RunConfig, TrainConfig
from mezo_dist.directions.combination import ZERO, CoefficientError, Combination
from mezo_dist.errors import Stopped, UserError
from mezo_dist.runs.export import export_model
from mezo_dist.storage.run_folder import SNAPSHOTS, Claim, claim_folder, note, read_results, save_config, write_results
from mezo_dist.runs.recorder import Keeper
from mezo_dist.monitoring.console import Monitor
from mezo_dist.runs.replay import Progress, check_config, check_header, open_run, rebuild_from_newest
from mezo_dist.runs.build import Run, prepare
from mezo_dist.runs.summary import facts, summary
from mezo_dist.storage.trajectory import Log, Step, digest
from mezo_dist.distributed.communicator import Wire

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planned:
    """A step that was evaluated but not applied: the planner's next state, the log line, and what it cost."""

    state: Any
    step: Step
    combination: Combination
    metrics: dict[str, float]
    forwards: int
    """Forward passes, counted in samples."""
    keep: bool = False
    """See `Update`, for this one and the next."""
    scale: float = 1.0


def train(config: RunConfig, wire: Wire) -> Path:
    """Run the whole job on this rank: evaluate, train, evaluate, export. Returns the run folder.

    Raises:
        UserError: bad input, or too many steps in a row without a finite loss.
        OutOfStepError: ranks disagree.
        Stopped: SIGTERM came; the run can go on later.
    """
    with claim_folder(config, wire) as claim, _stop_on_sigterm(wire):
        if claim.log is not None:
            check_config(config, claim.log.header)
        run = prepare(config, wire)
        progress = Progress(run.algorithm.init()) if claim.log is None else _resume(run, claim, claim.log)
        is_main = wire.rank == 0
        with (
            _disk_errors_explained(claim.folder),
            Monitor.open(
                claim.folder if is_main else None,
                is_main=is_main,
                num_steps=config.train.steps,
                first_step=progress.step,
            ) as monitor,
        ):
            _train(run, claim, progress, monitor)
    return claim.folder


def _train(run: Run, claim: Claim, progress: Progress, monitor: Monitor) -> None:
    config, is_main = run.config, run.wire.rank == 0
    monitor.table("run", facts(run, claim.folder))
    monitor.text("config", f"```json\n{json.dumps(config.to_dict(), indent=2)}\n```")
    if claim.log is not None:
        before = read_results(claim.folder).get("before", {}) if is_main else {}
    else:
        before = score(run, "test", monitor, 0, calibrate(run, monitor)) if config.output.test else {}
        if is_main:
            save_config(config, claim.folder)
            write_results(claim.folder, {"before": before})
    keeper = Keeper.open(run, claim)
    started = time.perf_counter()
    try:
        _loop(run, progress, keeper, monitor)
        keeper.mark(progress.step)
    finally:
        keeper.close()
    _finish(run, claim.folder, progress, before, time.perf_counter() - started, monitor)


def _resume(run: Run, claim: Claim, found: Log) -> Progress:
    check_header(run.header(), found.header)
    progress, start = rebuild_from_newest(
        run.weights, run.algorithm, found, len(found.steps), claim.snapshots, run.wire, anchor=True
    )
    if run.wire.rank == 0:
        note(claim.folder, "resumed", progress.step, snapshot=start, torn_bytes=found.torn, ranks=run.wire.world_size)
    return progress


@contextlib.contextmanager
def _disk_errors_explained(folder: Path) -> Iterator[None]:
    """Logs are written to the same disk as the trajectory, and may be the first to notice that it is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            raise
        raise UserError(
            f"output.dir: {folder} cannot be written to ({error.strerror}); no step in {trajectory.FILE} is lost: "
            "make room, then go on with --output.if_exists=resume"
        ) from error


@contextlib.contextmanager
def _stop_on_sigterm(wire: Wire) -> Iterator[None]:
    """SIGTERM makes all ranks stop after the step they are in; a second one ends the process as ever."""

    def handle(*_: Any) -> None:
        wire.wants_stop = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may ask for signals
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _loop(run: Run, progress: Progress, keeper: Keeper, monitor: Monitor) -> None:
    config = run.config.train
    while progress.step < config.steps:
        if run.wire.stopping:
            _stop(run, progress, keeper)
        run.wire.place = f"step {progress.step + 1}"
        began, sent = time.perf_counter(), run.wire.payload_bytes
        gathers, gathered = run.engine.gathers, run.engine.gathered_bytes
        planned = plan_step(run, progress.state, progress.step)
        evaluated = time.perf_counter()
        keeper.append(planned.step)  # before the weights change: what is on disk can be replayed, what is not never was
        run.apply(planned.step.step, planned.combination, keep=planned.keep, scale=planned.scale)
        progress.after(planned.state, skipped=bool(planned.step.skipped))
        _check_skips(progress, planned.step, config, monitor)
        scalars = {"loss/train" if name == "loss" else name: value for name, value in planned.metrics.items()}
        scalars |= {
            "time/evaluate_s": evaluated - began,
            "time/update_s": time.perf_counter() - evaluated,
            "wire/payload_bytes_per_step": float(run.wire.payload_bytes - sent),
            "gathers/number_per_step": float(run.engine.gathers - gathers),
            "gathers/bytes_per_step": float(run.engine.gathered_bytes - gathered),
            "memory/peak_rss_GiB": peak_rss_gib(),
            "trajectory/bytes": float(keeper.bytes),
            "skipped_steps": float(progress.skipped),
        }
        monitor.step(progress.step, scalars, samples=planned.forwards)
        every = run.config.output.snapshot_every
        if every and progress.step % every == 0 and progress.step < config.steps:
            keeper.snapshot(progress.step)
        if config.evaluate_every and progress.step % config.evaluate_every == 0 and progress.step < config.steps:
            score(run, "validation", monitor, progress.step, calibrate(run, monitor))


def _stop(run: Run, progress: Progress, keeper: Keeper) -> None:
    """Whatever happens now, the trajectory holds the run; a snapshot makes going on faster, if there is time for it."""
    keeper.stopped(progress.step)
    raise Stopped(
        f"stopped after step {progress.step} of {run.config.train.steps}; go on with --output.if_exists=resume",
        run.config.distributed.stop_exit_code,
    )


def plan_step(run: Run, state: Any, number: int) -> Planned:
    """Evaluate step ``number``; nothing is applied yet.

    A loss (or a coefficient) that is not finite anywhere makes the step a skipped one, on every rank alike.
    """
    rounds: list[Losses] = []
    forwards = 0

    def skipped(reason: str) -> Planned:
        return Planned(state, Step(number, (), skipped=reason), ZERO, {}, forwards)

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
    step = Step(number, tuple(rounds), digest(request.combination, request.scale))
    return Planned(request.state, step, request.combination, request.metrics, forwards, request.keep, request.scale)


def _check_skips(progress: Progress, step: Step, config: TrainConfig, monitor: Monitor) -> None:
    if not step.skipped:
        return
    monitor.say(f"step {progress.step}/{config.steps} skipped: {step.skipped} ({progress.skipped_in_a_row} in a row)")
    if progress.skipped_in_a_row >= config.max_skipped:
        raise UserError(
            f"train.max_skipped: {config.max_skipped} steps in a row had no finite loss, the last one step "
            f"{progress.step}; the learning rate or eps is probably too large, or the model needs another dtype "
            "(model.compute)"
        )


def calibrate(run: Run, monitor: Monitor) -> Calibration | None:
    """`Run.calibration` of the current weights, shown as it goes on."""
    if not run.config.train.calibrate:
        return None
    with monitor.evaluation("train", min(len(run.splits["train"]), MOST_SAMPLES)) as advance:
        return run.calibration(advance)


def score(
    run: Run, split: str, monitor: Monitor, step: int, calibration: Calibration | None = None
) -> dict[str, float]:
    """Loss and metric of the current weights on a split, shown and logged."""
    samples, task = run.splits[split], run.config.task
    offsets = calibration.offsets if calibration else None
    with monitor.evaluation(split, len(samples)) as advance:
        result = run.evaluator.score(run.split(split), task.metric, len(task.labels), advance, offsets)
    monitor.result(split, step, result)
    return result


def _finish(
    run: Run, folder: Path, progress: Progress, before: dict[str, float], seconds: float, monitor: Monitor
) -> None:
    is_main = run.wire.rank == 0
    results: dict[str, Any] = {"before": before, "steps": progress.step, "skipped_steps": progress.skipped}
    calibration = calibrate(run, monitor)
    results["validation"] = score(run, "validation", monitor, progress.step, calibration)
    if run.config.output.test:
        results["after"] = score(run, "test", monitor, progress.step, calibration)
    if calibration:
        results["offsets"] = calibration.by_word()
    results |= {"training_s": round(seconds, 1), "weights": run.engine.fingerprint()}
    if is_main:
        write_results(folder, results)
        note(folder, "finished", progress.step)
    if run.config.output.export:
        export_model(run.engine, run.loaded.tokenizer, folder / "model", run.wire, calibration=calibration)
    for name in run.engine.never_used():
        log.warning("no forward pass ever used %s; its updates were noise (freeze it)", name)
    monitor.say(summary(run, folder, results))


def peak_rss_gib() -> float:
    """Peak resident memory of this process in GiB (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def rebuild(folder: Path, num_steps: int | None, wire: Wire, *, trust_remote_code: bool = False) -> tuple[Run, int]:
    """The run in ``folder`` with its first ``num_steps`` steps applied (all if None), and their number.

    Raises:
        UserError: no run there, damaged, made from another base model, or shorter than asked for.
    """
    found, config, wanted = open_run(folder, num_steps, wire, trust_remote_code=trust_remote_code)
    run = prepare(config, wire)
    check_header(run.header(), found.header)
    rebuild_from_newest(run.weights, run.algorithm, found, wanted, folder / SNAPSHOTS, wire)
    return run, wanted
