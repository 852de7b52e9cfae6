"""Training: claim the run folder, evaluate, take the steps, evaluate again, export."""

from __future__ import annotations

import contextlib
import errno
import logging
import resource
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console

from mezo_dist.algorithms import FirstOrder
from mezo_dist.algorithms.base import Evaluation, Losses
from mezo_dist.algorithms.operations import apply_updates
from mezo_dist.algorithms.step import Progress, StepResult, run_step
from mezo_dist.config.schema import RunConfig, TrainConfig
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.errors import Stopped, UserError
from mezo_dist.json_types import JsonObject
from mezo_dist.monitoring.console import Monitor
from mezo_dist.monitoring.curve_writers import check_installed
from mezo_dist.monitoring.scalars import train_loss_tag
from mezo_dist.objectives.rewards.judge import judging
from mezo_dist.runs.advice import Advice
from mezo_dist.runs.answers import ask, confusion, samples_after, write_answers
from mezo_dist.runs.build import Run, build_run, with_gradients
from mezo_dist.runs.export import export_model
from mezo_dist.runs.looks import calibrate, evaluation_interval, look_before, score
from mezo_dist.runs.memory import full_memory_explained
from mezo_dist.runs.pool import reserve
from mezo_dist.runs.recorder import RunRecorder
from mezo_dist.runs.replay import check_config, check_header, go_back_to_snapshot, replay_from_newest
from mezo_dist.runs.stop import LOADING, stop_on_sigterm, stopped_loading
from mezo_dist.runs.summary import facts, summary
from mezo_dist.storage import trajectory
from mezo_dist.storage.files import DISK_FAULTS
from mezo_dist.storage.replay import logged_step
from mezo_dist.storage.run_files import note, read_scores, write_results
from mezo_dist.storage.run_folder import Claim, check_shared, claim_folder
from mezo_dist.storage.trajectory import Log
from mezo_dist.tasks.kind import Answer

log = logging.getLogger(__name__)


def train(config: RunConfig, comm: Communicator, *, quiet: bool = False) -> Path:
    """Run the whole job on this rank: evaluate, train, evaluate, export. Returns the run folder.

    Args:
        config: the settings.
        comm: the ranks.
        quiet: show nothing on the console; files are written all the same.

    Raises:
        UserError: bad input, too many steps in a row without a finite loss, or memory that is full.
        OutOfStepError: ranks disagree.
        Stopped: SIGTERM came; the run can go on later.
    """
    comm.place = LOADING
    comm.collect(lambda: check_installed(config.monitor) if comm.rank == 0 else None)
    with (
        full_memory_explained(config),
        stop_on_sigterm(config, comm),
        judging(config, comm) as judge,
        claim_folder(config, comm) as claim,
    ):
        if claim.log is not None:
            check_config(config, claim.log.header)
        if isinstance(config.algorithm, FirstOrder):
            check_shared(claim, comm)
        run = with_gradients(build_run(config, comm, claim.log.header if claim.log is not None else None, judge))
        progress = Progress(run.algorithm.init())
        if claim.log is not None:
            claim, progress = _resume(run, claim, claim.log)
        comm.synchronize("loaded")
        if comm.stopping:
            raise stopped_loading(config)
        is_main = comm.rank == 0
        with (
            _disk_errors_explained(claim.folder),
            Monitor.open(
                claim.folder if is_main else None,
                is_main=is_main,
                num_steps=config.train.steps,
                first_step=progress.step if claim.log is not None else None,
                monitors=config.monitor,
                console=Console(quiet=True) if quiet else None,
            ) as monitor,
        ):
            _train(run, claim, progress, monitor)
    return claim.folder


def _train(run: Run, claim: Claim, progress: Progress[object], monitor: Monitor) -> None:
    """Evaluate, take the steps, and evaluate again.

    Args:
        run: data, model and planner.
        claim: the run folder.
        progress: where the run is.
        monitor: shows what happens.

    Raises:
        UserError: the weights of a first-order run could not be saved at its end.
    """
    config, is_main = run.config, run.comm.rank == 0
    monitor.table("run", facts(run, claim.folder))
    monitor.settings(config.to_dict())
    before: Mapping[str, float | None]
    if claim.log is not None:
        before = read_scores(claim.folder, "before", ["loss", config.task.metric]) if is_main else {}
    else:
        before = look_before(run, claim.folder, monitor)
    if run.comm.stopping:
        raise stopped_loading(config)
    run.comm.place = f"step {progress.step + 1}"
    if run.gradients is None and progress.step < config.train.steps:
        reserve(run, progress.step)
    recorder = RunRecorder.open(run, claim)
    started, is_safe = time.perf_counter(), True
    try:
        _loop(run, progress, recorder, monitor)
        if run.gradients is None:
            recorder.mark(progress.step)
        else:  # its weights are nowhere else
            is_safe = recorder.snapshot(progress.step)
    finally:
        recorder.close()
    _finish(run, claim.folder, progress, before, time.perf_counter() - started, monitor)
    if not is_safe:
        raise UserError(
            f"output.dir: {claim.folder} has no snapshot of the weights after the last step (the log says why); make "
            "room, then --output.if_exists=resume takes the steps after the snapshot before it again"
        )


def _resume(run: Run, claim: Claim, recorded: Log) -> tuple[Claim, Progress[object]]:
    """Bring the base model to where the run was; that of a first-order baseline, to where its last snapshot is.

    Args:
        run: data, model and planner.
        claim: the run folder.
        recorded: its trajectory.

    Returns:
        The run folder, of which the trajectory may have been cut, and where the run is.
    """
    check_header(run.header(), recorded.header)
    if run.gradients is None:
        progress, start = replay_from_newest(
            run.loaded, run.algorithm, recorded, len(recorded.steps), claim.snapshots, run.comm, anchor=True
        )
    else:
        claim, progress = go_back_to_snapshot(run.loaded, run.algorithm, claim, recorded, run.comm)
        start = progress.step
        run.gradients.optimizer.start_at(progress.step - progress.skipped)
    if run.comm.rank == 0:
        ranks = run.comm.world_size
        note(claim.folder, "resumed", progress.step, snapshot=start, torn_bytes=recorded.torn, ranks=ranks)
    return claim, progress


@contextlib.contextmanager
def _disk_errors_explained(folder: Path) -> Iterator[None]:
    """Logs are written to the same disk as the trajectory, and may be the first to notice that it is full."""
    try:
        yield
    except OSError as error:
        is_gone = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE) and not folder.is_dir()
        if not is_gone and error.errno not in DISK_FAULTS:
            raise
        remedy = "put it back where it was" if is_gone else "make room"
        raise UserError(
            f"output.dir: {folder} cannot be written to ({error.strerror}); no step in {trajectory.FILE} is lost: "
            f"{remedy}, then go on with --output.if_exists=resume"
        ) from error


def _loop(run: Run, progress: Progress[object], recorder: RunRecorder, monitor: Monitor) -> None:
    """Take the steps that are left.

    Args:
        run: data, model and planner.
        progress: where the run is; moved on.
        recorder: logs the steps.
        monitor: shows what happens.
    """
    config, comm, engine = run.config.train, run.comm, run.engine
    look_every, advice = evaluation_interval(run), Advice(is_calibrated=config.calibrate)
    while progress.step < config.steps:
        if comm.stopping:
            _stop(run, progress, recorder)
        comm.place = f"step {progress.step + 1}"
        began, sent = time.perf_counter(), comm.payload_bytes
        gathers, gathered = engine.gathers, engine.gathered_bytes
        result, num_forwards = evaluate_step(run, progress.state, progress.step)
        evaluated = time.perf_counter()
        # Logged before the weights change: what is on disk can be replayed, and what is not has never happened.
        recorder.append(logged_step(result))
        apply_step(run, result)
        progress.after(result.update)
        _check_skips(progress, result, config, monitor)
        metrics = result.update.metrics if result.update else {}
        for text in (*(result.update.notes if result.update else ()), *advice.after(metrics)):
            monitor.say(f"step {progress.step}/{config.steps}: {text}")
        loss_tag = train_loss_tag(calibrated=config.calibrate)
        tags = {"loss": loss_tag, "zero_differences": "objective/zero_differences"}
        scalars = {tags.get(name, name): value for name, value in metrics.items()}
        if run.evaluator.joint is None or not run.evaluator.joint.is_discrete:
            scalars.pop("objective/zero_differences", None)  # what changes smoothly has none
        scalars |= {
            "time/evaluate_s": evaluated - began,
            "time/update_s": time.perf_counter() - evaluated,
            "communicator/payload_bytes_per_step": float(comm.payload_bytes - sent),
            "memory/peak_rss_GiB": peak_rss_gib(),
            "trajectory/bytes": float(recorder.bytes),
            "skipped_steps": float(progress.skipped),
            "forward_passes_per_step": float(num_forwards),
        }
        if run.gradients is None:  # gathers by FSDP2 and DeepSpeed, for a gradient, are not counted
            scalars |= {
                "gathers/number_per_step": float(engine.gathers - gathers),
                "gathers/bytes_per_step": float(engine.gathered_bytes - gathered),
            }
        monitor.step(progress.step, scalars, samples=num_forwards)
        every = run.config.output.snapshot_every
        if every and progress.step % every == 0 and progress.step < config.steps:
            recorder.snapshot(progress.step)
        if look_every and progress.step % look_every == 0 and progress.step < config.steps:
            score(run, "validation", monitor, progress.step, calibrate(run, monitor))


def _stop(run: Run, progress: Progress[object], recorder: RunRecorder) -> None:
    """Whatever happens now, the trajectory holds the run; a snapshot makes going on faster, if there is time for it.

    Args:
        run: data, model and planner.
        progress: where the run is.
        recorder: saves a snapshot.
    """
    recorder.stopped(progress.step)
    raise Stopped(
        f"stopped after step {progress.step} of {run.config.train.steps}; go on with --output.if_exists=resume",
        run.config.distributed.stop_exit_code,
    )


def evaluate_step(run: Run, state: object, step: int) -> tuple[StepResult[object], int]:
    """Evaluate ``step``; nothing is done to the weights yet. Collective.

    Args:
        run: data, model and planner.
        state: the planner's, after the steps before.
        step: number of the step (0-based).

    Returns:
        The outcome of the step, and the number of samples that went through the model, counted once for every variant
        (and as often as `Gradients.cost` says where they were back-propagated through).
    """
    num_forwards = 0

    def evaluate(request: Evaluation, round_number: int) -> Losses | None:
        nonlocal num_forwards
        batch, mark = run.batch(request.batch, step), (run.config.digest(), step, round_number)
        num_samples = sum(len(micro_batch.slots) for micro_batch in batch)
        if request.gradient:
            assert run.gradients is not None
            num_forwards += run.gradients.cost * num_samples
            return run.gradients.losses(batch, mark)
        num_forwards += len(request.variants) * num_samples
        return run.evaluator.losses(request, batch, mark)

    return run_step(run.algorithm, state, step, evaluate), num_forwards


def apply_step(run: Run, result: StepResult[object]) -> None:
    """Apply the update of a step to the weights; a skipped step changes nothing."""
    if result.update is not None:
        apply_updates(run.engine, run.config.seed, [(result.step, result.update.operations)])


def _check_skips(progress: Progress[object], result: StepResult[object], config: TrainConfig, monitor: Monitor) -> None:
    """Say that a step was skipped. Raises UserError if too many were, one after another.

    Args:
        progress: where the run is, after the step.
        result: of the step.
        config: settings of the training.
        monitor: shows what happens.
    """
    if not result.skipped:
        return
    monitor.say(f"step {progress.step}/{config.steps} skipped: {result.skipped} ({progress.skipped_in_a_row} in a row)")
    if progress.skipped_in_a_row >= config.max_skipped:
        raise UserError(
            f"train.max_skipped: {config.max_skipped} steps in a row had no finite loss, the last one step "
            f"{progress.step}; the learning rate or eps is probably too large, or the model needs another dtype "
            "(model.compute)"
        )


def _finish(
    run: Run,
    folder: Path,
    progress: Progress[object],
    before: Mapping[str, float | None],
    seconds: float,
    monitor: Monitor,
) -> None:
    """Evaluate the trained weights, write the results, and export.

    Args:
        run: data, model and planner.
        folder: the run folder.
        progress: where the run is.
        before: scores before training.
        seconds: time that training took.
        monitor: shows what happens.
    """
    is_main, output = run.comm.rank == 0, run.config.output
    results: JsonObject = {"before": before, "steps": progress.step, "skipped_steps": progress.skipped}
    calibration = calibrate(run, monitor)
    said: list[Answer] = []
    listen = said if output.answers and run.config.task.words else None
    results["validation"] = score(
        run, "validation", monitor, progress.step, calibration, None if output.test else listen
    )
    if output.test:
        results["after"] = score(run, "test", monitor, progress.step, calibration, listen)
    results["samples"] = {name: len(samples) for name, samples in run.splits.items()}
    answers = ask(run, calibration) if output.answers else []
    if calibration:
        results["offsets"] = calibration.by_word()
    results |= {"training_s": round(seconds, 1), "weights": run.engine.fingerprint()}
    if is_main:
        write_results(folder, results)
        if output.answers:
            table = confusion(run, "test" if output.test else "validation", said)
            write_answers(folder, samples=samples_after(run, folder, answers), confusion=table)
        note(folder, "finished", progress.step)
    if output.export:
        export_model(run.engine, run.pretrained.tokenizer, folder / "model", run.comm, calibration=calibration)
    what = "its updates were noise" if run.gradients is None else "it has no gradient"
    for name in run.engine.never_used():
        log.warning("no forward pass ever used %s; %s (freeze it)", name, what)
    if is_main:  # other ranks may not see the folder
        for line in summary(run, folder, results):
            monitor.say(line)


def peak_rss_gib() -> float:
    """Peak resident memory of this process in GiB (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
