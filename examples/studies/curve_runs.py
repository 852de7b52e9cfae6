"""One run of `learning_curves.py`: a contender learns with one rate from one seed, and is looked at on the way."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from curve_contenders import FIRST_ORDER, CurvePreset, Learner, schedule
from estimator_quality import ROOT, Vector, put, trainable

from mezo_dist import algorithms
from mezo_dist.algorithms import FirstOrder
from mezo_dist.algorithms.base import Problem
from mezo_dist.algorithms.step import Progress
from mezo_dist.baselines.optimizer import WeightOptimizer
from mezo_dist.config import reader
from mezo_dist.directions.law import Law
from mezo_dist.directions.seeds import derive_seed
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.engine import Engine
from mezo_dist.objectives.joint import CALIBRATED
from mezo_dist.runs.build import Run, build_run
from mezo_dist.runs.evaluation import Evaluator
from mezo_dist.runs.gradients import Gradients
from mezo_dist.runs.training import apply_step, evaluate_step
from mezo_dist.tasks.batches import BatchOrder, MicroBatch
from mezo_dist.testing import write_tiny_config

Step = Callable[[int], tuple[int, bool]]
"""Takes a step; its forward passes, and whether all was finite."""


@dataclass
class Bench:
    """A model with its data, on which run after run begins from the same weights."""

    run: Run
    preset: CurvePreset
    start: Vector
    fresh: tuple[str, ...]
    """Trainable weights that the checkpoint does not have, to be drawn from each run's own seed."""
    splits: dict[str, list[MicroBatch]]
    budget: float
    """Forward passes of a run."""
    engines: dict[str, Engine] = field(default_factory=dict)
    """By law."""

    @staticmethod
    def open(preset: CurvePreset, setting: str, task: str, folder: Path) -> Bench:
        """Model (on the GPU, if there is one), data and engine; frozen blocks are computed for all samples."""
        overrides = [
            "train.micro_batch=32",
            *preset.settings[setting].overrides,
            f"output.dir={folder / 'run'}",
            "train.full_size=null",
        ]
        overrides += [f"train.batch_size={preset.batch_size}"]
        overrides += [f"task.splits.{name}.size={size}" for name, size in preset.sizes.items()]
        overrides += [f"train.max_tokens={preset.max_tokens[task]}"] if task in preset.max_tokens else []
        overrides += ["task.splits.test.size=null"] if task in preset.untouched else []
        if preset.tasks[task] == "tiny":
            config = reader.load(write_tiny_config(folder), ["task.splits.train.size=48", *overrides])
        else:
            source = f"task={ROOT / preset.tasks[task]}"
            config = reader.load(ROOT / "configs/quickstart.yaml", [source, *overrides])
        run = build_run(config, Communicator())
        if task in preset.untouched:
            run = dataclasses.replace(run, splits={**run.splits, "test": run.splits["test"][preset.untouched[task]]})
        start = {name: p.detach().clone() for name, p in trainable(run)}
        heads = ("classifier.", "pre_classifier.", "score.")
        fresh = tuple(name for name in start if config.model.head == "classifier" and name.startswith(heads))
        splits = {name: run.split(name) for name in ("validation", "test")}
        budget = preset.budget * preset.shares.get((setting, task), 1.0)
        bench = Bench(run, preset, start, fresh, splits, budget)
        bench.scores(calibrated=True)  # sees all samples once
        return bench

    @property
    def num_train(self) -> int:
        """Training samples."""
        return len(self.run.splits["train"])

    def reset(self, seed: int) -> None:
        """Back to the weights that a run from ``seed`` begins with."""
        generator = torch.Generator().manual_seed(seed)
        drawn = {
            name: torch.normal(0.0, 0.02 if t.dim() > 1 else 0.0, t.shape, generator=generator)
            for name, t in self.start.items()
            if name in self.fresh
        }
        put(self.run, self.start | drawn)

    def under(self, law: str, *, calibrated: bool) -> Run:
        """The run with an engine whose directions have this law, and with such losses."""
        if law not in self.engines:
            self.engines[law] = Engine(self.run.pretrained.model, Law(law))
        engine = self.engines[law]
        return dataclasses.replace(
            self.run,
            loaded=dataclasses.replace(self.run.loaded, engine=engine),
            evaluator=self._evaluator(engine, calibrated=calibrated),
        )

    def _evaluator(self, engine: Engine, *, calibrated: bool) -> Evaluator:
        return dataclasses.replace(self.run.evaluator, engine=engine, joint=CALIBRATED if calibrated else None)

    def scores(self, *, calibrated: bool) -> list[float]:
        """Loss and metric of the current weights on validation and test samples."""
        evaluator = self._evaluator(self.run.engine, calibrated=calibrated)
        adjust = self.run.fitted_offsets(self.run.split("train")).adjusted if calibrated else None
        scores = []
        for split in self.splits.values():
            result = evaluator.score(split, self.run.kind.summarise, lambda _: None, adjust)
            scores += [result["loss"], result[self.run.config.task.metric]]
        return scores


def learn(bench: Bench, learner: Learner, lr: float, seed: int) -> dict[str, Any]:
    """One run.

    Returns:
        ``points``: forward passes, seconds, validation loss and metric, test loss and metric. Seconds are those of
        training alone; on a CPU, those that it worked (for one thread: what a run takes on a core of its own).
        ``fitting``: forward passes that the offsets for predictions take, once, beyond those of training.
        ``diverged``: whether it ended early because losses were not finite.
        ``rates``: for ``lr: auto`` the first learning rate, that in the middle and the last one, before the schedule.
    """
    bench.reset(seed)
    num_steps, budget = learner.steps(bench.budget), learner.share * bench.budget
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    rates: list[float] = []
    take = _steps_of(bench, learner, lr, seed, num_steps, rates)
    marks = [budget / 2**k for k in range(bench.preset.looks, -1, -1)]
    points = [_point(bench, learner, 0, 0.0)] if bench.preset.looks else []
    done, seconds, skipped, step = 0, 0.0, 0, 0
    while step < num_steps and skipped < bench.run.config.train.max_skipped:
        began = clock()
        passes, sound = take(step)
        seconds += clock() - began
        done, step, skipped = done + passes, step + 1, 0 if sound else skipped + 1
        if done >= marks[0] or step == num_steps:
            points.append(_point(bench, learner, done, seconds))
            marks = [mark for mark in marks if mark > done] or [math.inf]
    fitting = bench.num_train if learner.calibrated else 0
    three = [float(f"{rates[place]:.3g}") for place in (0, len(rates) // 2, -1)] if rates else []
    return {"steps": step, "diverged": step < num_steps, "fitting": fitting, "points": points, "rates": three}


def _point(bench: Bench, learner: Learner, done: int, seconds: float) -> list[float]:
    scores = bench.scores(calibrated=learner.calibrated)
    return [done, round(seconds, 2), *(round(score, 4) if math.isfinite(score) else 1e9 for score in scores)]


def _steps_of(bench: Bench, learner: Learner, lr: float, seed: int, num_steps: int, rates: list[float]) -> Step:
    """Steps as `mezo_dist.runs.training` takes them; rates that ``lr: auto`` finds are appended to ``rates``."""
    n, full = bench.num_train, learner.full_size or bench.num_train
    config: Any
    if isinstance(learner.algorithm, str):
        config = FIRST_ORDER[learner.algorithm](lr=lr, schedule=schedule(num_steps))
    else:
        config = learner.algorithm(lr, num_steps, bench.preset.eps)
    run = bench.under(learner.law, calibrated=learner.calibrated)
    gradients = None
    if isinstance(config, FirstOrder):
        run.engine.optimizer = WeightOptimizer(run.engine, config)
        gradients = Gradients(run.evaluator, run.engine.optimizer, learner.calibrated, recompute=False)
    run = dataclasses.replace(
        run,
        algorithm=algorithms.build(
            config.name, config, Problem(seed, num_steps, learner.batch_size, full, num_train=n)
        ),
        order=BatchOrder(n, learner.batch_size, seed),
        full_order=BatchOrder(n, full, derive_seed(seed, "full")),
        gradients=gradients,
    )
    progress: Progress[Any] = Progress(run.algorithm.init())

    def take(step: int) -> tuple[int, bool]:
        result, forwards = evaluate_step(run, progress.state, step)
        apply_step(run, result)
        progress.after(result.update)
        if result.update is not None and "rate/lr" in result.update.metrics:
            rates.append(result.update.metrics["rate/lr"])
        return forwards, result.update is not None

    return take
