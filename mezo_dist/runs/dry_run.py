"""``mezo-dist train --dry-run``: everything is checked, three steps are taken, and nothing is left behind.

What the whole run will take is predicted from what was measured: the time of each kind of step, and of evaluating a
part of each split. Steps and evaluations are measured once for samples that are seen for the first time and once for
samples that were seen before, which the frozen cache makes faster.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from mezo_dist.algorithms.step import Progress
from mezo_dist.config.schema import RunConfig
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.errors import UserError
from mezo_dist.monitoring.console import Monitor, format_duration
from mezo_dist.monitoring.curve_writers import check_installed
from mezo_dist.monitoring.scalars import train_loss_tag
from mezo_dist.objectives.calibration import MOST_SAMPLES
from mezo_dist.objectives.rewards.judge import judging
from mezo_dist.planning.machine import GIB
from mezo_dist.runs.build import Run, build_run, with_gradients
from mezo_dist.runs.looks import evaluation_interval
from mezo_dist.runs.pool import planned_memory
from mezo_dist.runs.replay import check_config, check_header
from mezo_dist.runs.stop import LOADING, stop_on_sigterm, stopped_loading
from mezo_dist.runs.summary import facts
from mezo_dist.runs.training import apply_step, evaluate_step, peak_rss_gib
from mezo_dist.storage.foreseen import look_at_folder
from mezo_dist.storage.run_folder import Claim
from mezo_dist.tasks.kind import Sample

STEPS = 3
LEAST_SAMPLES = 16
"""Samples of a split that are evaluated to see how long it takes, at least, if it has them."""


@dataclass
class Pace:
    """Seconds of something: for samples that are seen for the first time, and later."""

    first: float
    later: float


@dataclass
class Measured:
    """What a dry run saw."""

    loading_s: float
    steps: dict[str, Pace] = field(default_factory=dict)
    """``minibatch`` or ``full`` -> seconds of a step on such a batch."""
    starting_s: float = 0.0
    """What the very first step took beside that: kernels are compiled, buffers made."""
    splits: dict[str, Pace] = field(default_factory=dict)
    """Split -> seconds per sample of evaluating it."""
    offsets: Pace | None = None
    """Seconds per sample of fitting offsets (``train.calibrate``)."""
    tokens: int = 0
    """Length of the longest sample of the steps, padding included."""


def try_out(config: RunConfig, comm: Communicator) -> None:
    """Do all that `training.train` checks, take three steps, and say what the whole run will take. Collective.

    Nothing is written; the weights are changed in memory alone.

    Args:
        config: the settings.
        comm: the ranks.

    Raises:
        UserError: the run would fail, too. Stopped: SIGTERM came.
    """
    comm.place = LOADING
    comm.collect(lambda: check_installed(config.monitor) if comm.rank == 0 else None)
    began = time.perf_counter()
    with stop_on_sigterm(config, comm), judging(config, comm) as judge:
        claim = look_at_folder(config, comm)
        if claim.log is not None:
            check_config(config, claim.log.header)
        run = with_gradients(build_run(config, comm, claim.log.header if claim.log is not None else None, judge))
        if claim.log is not None:
            check_header(run.header(), claim.log.header)
        comm.synchronize("loaded")
        if comm.stopping:
            raise stopped_loading(config)
        with Monitor.open(None, is_main=comm.rank == 0, num_steps=min(STEPS, config.train.steps)) as monitor:
            monitor.table("dry run", [*facts(run, claim.folder), *_of_folder(claim, config)])
            measured = Measured(time.perf_counter() - began)
            _take_steps(run, measured, monitor)
            _evaluate(run, measured, monitor)
            done = len(claim.log.steps) if claim.log is not None else 0
            monitor.table("the whole run", _whole(run, measured, done))
            monitor.table("memory of a rank", _memory(run, measured))
            monitor.say("Nothing was written. Without --dry-run, it starts.")


def _of_folder(claim: Claim, config: RunConfig) -> list[tuple[str, str]]:
    """What the run folder holds, if it is a run that is gone on with."""
    if claim.log is None:
        return []
    done = len(claim.log.steps)
    return [("resumes", f"{claim.folder} holds {done} of {config.train.steps} steps; the run goes on after them")]


def _take_steps(run: Run, measured: Measured, monitor: Monitor) -> None:
    """Take the first steps from the base model, and evaluate the last one's batch again, which is remembered now.

    Args:
        run: the run.
        measured: gets their times.
        monitor: shows the steps.
    """
    progress, train = Progress(run.algorithm.init()), run.config.train
    number, seconds = min(STEPS, train.steps), list[tuple[str, float]]()
    for step in range(number):
        run.comm.place = f"step {step + 1} of a dry run"
        state, batch = progress.state, run.algorithm.plan(progress.state, step).batch
        began = time.perf_counter()
        result, num_forwards = evaluate_step(run, state, step)
        evaluated = time.perf_counter()
        apply_step(run, result)
        progress.after(result.update)
        seconds.append((batch, time.perf_counter() - began))
        measured.tokens = max(
            [measured.tokens, *(item.inputs["input_ids"].shape[1] for item in run.batch(batch, step))]
        )
        if result.update is None:
            monitor.say(f"step {step + 1} would be skipped: {result.skipped}")
        else:
            tags = {"loss": train_loss_tag(calibrated=train.calibrate)}
            scalars = {tags.get(name, name): value for name, value in result.update.metrics.items()}
            monitor.step(progress.step, scalars, samples=num_forwards)
    measured.steps = {kind: Pace(last, last) for kind, last in seconds}  # the last of each kind counts
    if run.gradients is None:
        again = time.perf_counter()
        evaluate_step(run, state, number - 1)
        remembered = time.perf_counter() - again + seconds[-1][1] - (evaluated - began)
        measured.steps[batch].later = min(seconds[-1][1], remembered)
    measured.starting_s = max(0.0, seconds[0][1] - measured.steps[seconds[0][0]].first)


def _evaluate(run: Run, measured: Measured, monitor: Monitor) -> None:
    """Evaluate a part of each split that the run evaluates, twice, to see how long the whole takes.

    Args:
        run: the run.
        measured: gets the times.
        monitor: shows progress.
    """
    run.comm.place = "evaluation of a dry run"
    for name in ("validation", *(["test"] if run.config.output.test else [])):
        part = _part(run, run.splits[name])
        with monitor.evaluation(f"part of {name}", 2 * len(part)) as advance:
            batch, times = run.cut(part), [time.perf_counter()]
            for _ in range(2):
                run.evaluator.score(batch, run.kind.summarise, advance)
                times.append(time.perf_counter())
        measured.splits[name] = _pace(times, len(part))
    if run.config.train.calibrate:
        part = _part(run, run.splits["train"][:MOST_SAMPLES])
        batch, times = run.cut(part), [time.perf_counter()]
        for _ in range(2):
            run.fitted_offsets(batch)
            times.append(time.perf_counter())
        measured.offsets = _pace(times, len(part))


def _pace(times: Sequence[float], num_samples: int) -> Pace:
    first, later = ((after - before) / num_samples for before, after in itertools.pairwise(times))
    return Pace(first, min(first, later))


def _part(run: Run, samples: Sequence[Sample]) -> list[Sample]:
    """Samples from all over a split: two micro-batches for each rank, or more where these are small."""
    size = max(LEAST_SAMPLES, 2 * run.comm.world_size * run.config.train.micro_batch)
    return list(samples[:: max(1, len(samples) // size)])[:size]


def _whole(run: Run, measured: Measured, done: int) -> list[tuple[str, str]]:
    """Rows of the time that the whole run will take.

    Args:
        run: the run.
        measured: what it is predicted from.
        done: steps that the run folder holds.
    """
    train = run.config.train
    steps = dict.fromkeys(measured.steps, 0)
    cycle = getattr(run.config.algorithm, "q", 1) if "full" in steps else 0
    for step in range(done, train.steps):
        steps["full" if cycle and (step % cycle == 0 or len(steps) == 1) else "minibatch"] += 1
    epoch = math.ceil(len(run.splits["train"]) / train.batch_size)
    rows, stepping = [], measured.starting_s
    for batch, count in steps.items():
        pace, first = measured.steps[batch], min(count, 1 if batch == "full" else max(0, epoch - done))
        stepping += first * pace.first + (count - first) * pace.later
        then = f", {pace.later:.3g} s where its samples were seen before" if pace.later < 0.8 * pace.first else ""
        name = {"full": "anchor step", "minibatch": "inner step" if "full" in steps else "step"}[batch]
        rows.append((name, f"{pace.first:.3g} s{then}; {count:,} to take"))
    evaluating, what = _evaluating(run, measured, done)
    total = measured.loading_s + stepping + evaluating
    rows += [
        ("start", f"{format_duration(measured.loading_s)} to load and check"),
        ("steps", f"{format_duration(stepping)}"),
        ("evaluations", f"{format_duration(evaluating)} ({what})"),
        (
            "all",
            f"about {format_duration(total)} on these {run.comm.world_size} process(es), without snapshots and export",
        ),
    ]
    return rows if not done else [*rows, ("not counted", f"going back to step {done}")]


def _evaluating(run: Run, measured: Measured, done: int) -> tuple[float, str]:
    """Seconds of all evaluations of the run, and which they are.

    Args:
        run: the run.
        measured: what they are predicted from.
        done: steps that the run folder holds.
    """
    every, steps, before = evaluation_interval(run), run.config.train.steps, 0 if done else 1
    along = len([step for step in range(done + 1, steps) if step % every == 0]) + before if every else 0
    times = {"validation": along + 1, **({"test": before + 1} if run.config.output.test else {})}
    seconds = sum(
        len(run.splits[name]) * (measured.splits[name].first + (count - 1) * measured.splits[name].later)
        for name, count in times.items()
    )
    listed = [f"{name} {count} x {len(run.splits[name]):,} samples" for name, count in times.items()]
    if measured.offsets is not None:
        size = min(MOST_SAMPLES, len(run.splits["train"]))
        count = along + 1 + (before if run.config.output.test and not every else 0)
        seconds += size * (measured.offsets.first + (count - 1) * measured.offsets.later)
        listed.append(f"offsets {count} x {size:,}")
    return seconds, ", ".join(listed)


def _memory(run: Run, measured: Measured) -> list[tuple[str, str]]:
    """Rows of the memory that was measured, and of what `mezo-dist plan` predicts. Collective."""
    on_gpu = torch.cuda.is_available()
    peaks = run.comm.collect(lambda: [peak_rss_gib(), torch.cuda.max_memory_allocated() / GIB if on_gpu else 0.0])
    rows = [("measured", f"{_per_rank([host for host, _ in peaks])} at the most so far")]
    if on_gpu:
        rows.append(("of the GPU", f"{_per_rank([device for _, device in peaks])} allocated at the most so far"))
    return [*rows, ("planned", _planned(run, measured))]


def _per_rank(peaks: Sequence[float]) -> str:
    """One figure for each rank; for many, the range."""
    if len(peaks) > 8:
        return f"{min(peaks):.2f} to {max(peaks):.2f} GiB on {len(peaks)} ranks"
    return f"{', '.join(f'{peak:.2f}' for peak in peaks)} GiB"


def _planned(run: Run, measured: Measured) -> str:
    """What the cost model says of the memory of a rank, for the samples that were seen."""
    try:
        memory = planned_memory(run, measured.tokens)
    except UserError as error:
        return f"no ({error})"
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in memory.parts.items() if size > 0.005 * GIB)
    return f"{memory.total / GIB:.2f} GiB when {memory.when}: {parts}"
