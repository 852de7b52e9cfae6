"""Which learning rate should the quickstart have? Validation says; then sentences that nobody has looked at are scored.

    python examples/studies/quickstart_rate.py
    python examples/studies/quickstart_rate.py --config configs/mezo-svrg.yaml

Runs of configs/quickstart.yaml as it stands (its training split, batches, schedule, 131,072 forward passes), with
other rates; with the second command, of its second act at its full length. Every rate runs from the seeds
`TUNING_SEEDS` and is scored on the quickstart's validation split. The best one has the highest mean accuracy there, and
among equals the lowest mean loss. If it lies at an edge of the grid, the grid grows there by one, and once more if need
be.

Then the best rate runs from the seeds `SEEDS`, and the last `HELD_OUT` sentences of the data's permutation are scored,
once per seed. They are in none of the quickstart's splits (its test split of 1,000 is the part of the permutation that
the studies took their 512 test samples from) and no choice of this repository was ever held against them. The model
before training is scored on them as well, without and with offsets of the classes. So is, last, ``lr: auto``, for which
nothing here is chosen.

Writes one line per finished run to quickstart_rate.jsonl, headed by a line about machine and versions. What is there is
not run again, so the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from curve_contenders import EXTENSIONS, rounded
from estimator_quality import ROOT, Vector, put, trainable
from learning_curves import Record, Results, provenance

from mezo_dist import algorithms
from mezo_dist.algorithms.step import Progress
from mezo_dist.config import reader
from mezo_dist.directions.seeds import derive_seed
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.runs.build import Run, build_run, problem_of
from mezo_dist.runs.training import apply_step, evaluate_step
from mezo_dist.tasks.batches import BatchOrder
from mezo_dist.testing import write_tiny_config

STEP_OF_GRID = 10**0.25
"""Ratio of neighbouring learning rates."""
TUNING_SEEDS, SEEDS = (3,), (0, 1, 2)
HELD_OUT = 1000
AUTO = "auto"
"""The kind of runs with ``lr: auto``; 0 stands for their rate."""
Scores = dict[str, list[float]]
"""Split -> loss and metric."""


@dataclasses.dataclass(frozen=True)
class Study:
    """The quickstart's model with its data, on which run after run begins from the same weights."""

    run: Run
    """Its splits have another one, ``held out``."""
    start: Vector
    label: str = ""
    """What records of its runs are called: the config's name."""

    @staticmethod
    def open(config: str, overrides: list[str], held_out: int, folder: Path) -> Study:
        """Model, data and engine; the last samples of all that training and validation leave are held out."""
        path = write_tiny_config(folder, algorithm="mezo") if config == "tiny" else ROOT / config
        given = ["task.splits.test.size=null", f"output.dir={folder / 'run'}", *overrides]
        run = build_run(reader.load(path, given), Communicator())
        run = dataclasses.replace(run, splits={**run.splits, "held out": run.splits["test"][-held_out:]})
        return Study(run, {name: p.detach().clone() for name, p in trainable(run)}, Path(config).stem)

    def train(self, lr: float | str, seed: int) -> int:
        """A run of the product from the base weights; the steps that it took before losses were no longer finite."""
        put(self.run, self.start)
        settings: Any = self.run.config.algorithm
        rates = {"lr": lr, "anchor_lr": lr} if hasattr(settings, "anchor_lr") else {"lr": lr}
        settings = dataclasses.replace(settings, **rates)
        config = dataclasses.replace(self.run.config, algorithm=settings, seed=seed)
        known, n = self.run.problem, len(self.run.splits["train"])
        problem = problem_of(config, known.full_size, n, known.eps)
        run = dataclasses.replace(
            self.run,
            config=config,
            problem=problem,
            algorithm=algorithms.build(settings.name, settings, problem),
            order=BatchOrder(n, config.train.batch_size, seed),
            full_order=BatchOrder(n, known.full_size, derive_seed(seed, "full")),
        )
        progress: Progress[Any] = Progress(run.algorithm.init())
        while progress.step < config.train.steps and progress.skipped_in_a_row < config.train.max_skipped:
            result, _ = evaluate_step(run, progress.state, progress.step)
            apply_step(run, result)
            progress.after(result.update)
        return progress.step

    def scores(self, splits: tuple[str, ...], *, calibrated: bool) -> Scores:
        """Loss and metric of the current weights."""
        calibration = self.run.calibration() if calibrated else None
        adjust = calibration.adjusted if calibration else None
        values = {}
        for name in splits:
            result = self.run.evaluator.score(self.run.split(name), self.run.kind.summarise, lambda _: None, adjust)
            values[name] = [round(result["loss"], 4), round(result[self.run.config.task.metric], 4)]
        return values


def record(study: Study, results: Results, lr: float, seed: int, kind: str, splits: tuple[str, ...]) -> Record:
    """One run with its scores, from the file if it is there."""
    label = f"{study.label}, {kind}"
    if (done := results.find(label, lr, seed)) is not None:
        return done
    steps = study.train("auto" if kind == AUTO else lr, seed) if lr or kind == AUTO else 0
    row = {"kind": "run", "label": label, "lr": rounded(lr), "seed": seed, "steps": steps}
    row |= {"diverged": (bool(lr) or kind == AUTO) and steps < study.run.config.train.steps}
    row |= {"scores": study.scores(splits, calibrated=kind != "before")}
    results.add(row)
    print({name: row[name] for name in ("label", "lr", "seed", "scores")}, flush=True)
    return row


def choose(study: Study, results: Results, rates: list[float], seeds: tuple[int, ...]) -> float:
    """The rate that validation likes best."""
    values: dict[float, tuple[float, float]] = {}
    for _ in range(EXTENSIONS + 1):
        rows = {lr: [] for lr in rates}
        for seed in seeds:
            for lr in rates:
                rows[lr].append(record(study, results, lr, seed, "to choose", ("validation",)))
        values |= {lr: _value(runs) for lr, runs in rows.items()}
        best = max(values, key=lambda lr: values[lr])
        if min(values) < best < max(values):
            break
        rates = [rounded(best / STEP_OF_GRID if best == min(values) else best * STEP_OF_GRID)]
    return best


def _value(runs: list[Record]) -> tuple[float, float]:
    """Mean validation accuracy, then mean loss; a rate of which a run diverged comes last."""
    losses, accuracies = zip(*(run["scores"]["validation"] for run in runs), strict=True)
    return (-1.0 if any(run["diverged"] for run in runs) else statistics.mean(accuracies), -statistics.mean(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.yaml", help="``tiny``: a tiny job, to try this script")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.03, 0.056, 0.1])
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="samples")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings other than the config's")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    about = provenance(
        f"a process with {options.threads} thread(s)", f"{TUNING_SEEDS} to choose the rate, then {SEEDS}"
    )
    results = Results(options.out / "quickstart_rate.jsonl", {**about, "scores": "loss and metric of each split"})
    with tempfile.TemporaryDirectory() as folder:
        study = Study.open(options.config, options.overrides, options.held_out, Path(folder))
        best = choose(study, results, options.rates, TUNING_SEEDS)
        print(f"validation chose {best:g}", flush=True)
        put(study.run, study.start)
        for kind in ("before", "before, calibrated"):
            record(study, results, 0.0, 0, kind, ("validation", "held out"))
        for seed in SEEDS:
            record(study, results, best, seed, "chosen", ("validation", "held out"))
        for seed in SEEDS:
            record(study, results, 0.0, seed, AUTO, ("validation", "held out"))
    for kind, lr in (("chosen", best), (AUTO, 0.0)):
        rows = [results.find(f"{study.label}, {kind}", lr, seed) for seed in SEEDS]
        accuracies = [row["scores"]["held out"][1] for row in rows if row is not None]
        mean, deviation = statistics.mean(accuracies), statistics.stdev(accuracies)
        print(f"{kind}, held out: {mean:.4f}, standard deviation {deviation:.4f}")


if __name__ == "__main__":
    main()
