"""Where do full-batch anchors pay? The noise of minibatches along real runs, against what theory asks for.

    python examples/studies/where_svrg_pays.py [--tasks NAME ...] [--samples N ...]

A step along the mean of K one-sided directions, at its best rate, lowers the loss by |g|^2 K / (2 tr(H) (1 + r / B))
(docs/why.md), r / B being E|g_B - g|^2 / |g|^2 of batches of B. So a forward pass of one sample buys

    MeZO         K / ((K + 1) (B + r))           in units of |g|^2 / (2 tr(H))
    MeZO-SVRG    K / ((K + 1) (N + 2 B)) at most, for q = 2: anchors see N samples, and both steps of a cycle go along
                 the same K directions, which count once

and MeZO-SVRG can be ahead where r > N + B alone: where the gradient of the whole training set is smaller than what it
would change by, were the samples drawn again. With few samples runs come there, with many they do not.

Two norms of SmolLM2-135M, calibrated losses, batches of `BATCH`, N training samples, equal forward passes. What is
compared is the loss of the training samples, and rates are tuned on it (seed 0): this is a question of minimising. The
loss of test samples is said beside it. r is measured on the way of MeZO's first run, from the exact gradients of all
training samples, by back-propagation.

Writes one line per finished run to where_svrg_pays.jsonl, and where_svrg_pays.png. What is there is not run again;
`--report` draws and prints what is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from curve_contenders import EXTENSIONS, STEP_OF_RATES, TASKS, CurvePreset, Learner, Setting, rounded, schedule
from curve_runs import Bench, learn
from estimator_quality import trainable
from learning_curves import Record, Results, provenance

from mezo_dist.algorithms.mezo import MeZO
from mezo_dist.algorithms.schedules import Annealing
from mezo_dist.algorithms.svrg import MeZOSVRG
from mezo_dist.objectives.calibration import best_offsets
from mezo_dist.runs.build import Run

BATCH, DIRECTIONS, TUNING_SEED, SEEDS = 4, 7, 0, (1, 2, 3)
SAMPLES = (32, 128, 512)
BATCHES_TO_LOOK_AT = 400
LEAST = 0.03
PRESET = CurvePreset(
    {"norms": Setting(())},
    TASKS,
    budget=32768,
    eps=1e-2,
    max_tokens={"movie-sentences": 48, "tweets": 48, "bbc-news": 24},
    batch_size=BATCH,
    looks=8,
)
TINY = dataclasses.replace(PRESET, tasks={"tiny": "tiny"}, budget=512, max_tokens={}, rates=2, looks=1)
"""Made-up sentences and a tiny random model, to try this script."""
MEZO, SVRG = "MeZO", "MeZO-SVRG"


def noise(run: Run) -> float:
    """r: BATCH E|g_B - g|^2 / |g|^2 of calibrated losses, for batches B drawn without replacement.

    Each batch is at offsets of its own, as in training, so its gradient is no mean of fixed gradients of samples.
    """
    logits, slopes, labels = _slopes(run)
    draw, errors = random.Random(0), []
    whole = _gradient(logits, slopes, labels)
    for _ in range(BATCHES_TO_LOOK_AT):
        rows = draw.sample(range(len(labels)), BATCH)
        errors.append(float((_gradient(logits[rows], slopes[rows], labels[rows]) - whole).square().sum()))
    return BATCH * statistics.mean(errors) / float(whole.square().sum())


def _gradient(logits: torch.Tensor, slopes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """fp64 [weights]: the gradient of the calibrated loss of these samples."""
    residual = (logits + best_offsets(logits, labels)).softmax(-1)
    residual[torch.arange(len(labels)), labels] -= 1
    return torch.einsum("nc,ncw->w", residual, slopes) / len(labels)


def _slopes(run: Run) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """fp64 [n, classes] logits, fp64 [n, classes, weights] their gradients, and [n] labels of all training samples."""
    parameters = [p for _, p in trainable(run)]
    logits, slopes, labels = [], [], []
    for item in run.split("train"):
        output = run.evaluator.forward(run.pretrained.model, item).payload
        for row in output:
            each = [torch.autograd.grad(value, parameters, retain_graph=True) for value in row]
            slopes.append(torch.stack([torch.cat([part.flatten() for part in parts]) for parts in each]).double())
        logits.append(output.detach().double())
        labels.append(item.targets["label"])
    return torch.cat(logits), torch.stack(slopes), torch.cat(labels)


class Watched(Bench):
    """A bench whose looks at a run say the noise, too."""

    def scores(self, *, calibrated: bool) -> list[float]:
        return [*super().scores(calibrated=calibrated), noise(self.run)]


def learner(name: str, num_samples: int) -> Learner:
    """A contender, for so many training samples."""

    def mezo(lr: float, steps: int, eps: float) -> MeZO:
        return MeZO(lr=lr, eps=eps, directions=DIRECTIONS, one_sided=True, schedule=schedule(steps))

    def svrg(lr: float, steps: int, eps: float) -> MeZOSVRG:
        several: dict[str, Any] = {"directions": DIRECTIONS, "anchor_directions": DIRECTIONS, "one_sided": True}
        off = Annealing(divisor=1)
        return MeZOSVRG(lr=lr, anchor_lr=lr, eps=eps, q=2, schedule=schedule(steps), annealing=off, **several)

    make: Callable[[float, int, float], Any] = {MEZO: mezo, SVRG: svrg}[name]
    sides = DIRECTIONS + 1
    cost = sides * BATCH if name == MEZO else sides * (num_samples + 2 * BATCH) / 2
    return Learner(name, make, cost, {"norms": LEAST}, BATCH, calibrated=True)


class Cell:
    """One data set with one number of training samples.

    Args:
        task: name of the data set.
        num_samples: for training.
        results: the file.
        bench: the model with its data; None: only what is there counts.
    """

    def __init__(self, task: str, num_samples: int, results: Results, bench: Bench | None = None) -> None:
        self.task, self.num_samples, self._results, self._bench = task, num_samples, results, bench

    def run(self, name: str, lr: float, seed: int) -> Record | None:
        """One run, from the file if it is there; None if it is not and there is no bench."""
        label = f"{self.task}, {self.num_samples}, {name}"
        done = self._results.find(label, lr, seed)
        if done is None and self._bench is not None:
            is_watched = name == MEZO and seed == SEEDS[0]
            bench = Watched(**vars(self._bench)) if is_watched else self._bench
            done = {"kind": "run", "label": label, "lr": rounded(lr), "seed": seed}
            done |= learn(bench, learner(name, self.num_samples), lr, seed)
            self._results.add(done)
            print(f"{label:36} {lr:<8g} seed {seed}  {done['points'][-1]}", flush=True)
        return done

    def best(self, name: str) -> list[Record]:
        """The runs with the rate that the training samples like best."""
        preset, seeds = (TINY, SEEDS[:1]) if self.task in TINY.tasks else (PRESET, SEEDS)
        rates, losses = [rounded(LEAST * STEP_OF_RATES**k) for k in range(preset.rates)], {}
        for _ in range(EXTENSIONS + 1):
            runs = {lr: self.run(name, lr, TUNING_SEED) for lr in rates}
            losses |= {lr: run["points"][-1][2] for lr, run in runs.items() if run is not None}
            if not losses:
                return []
            lr = min(losses, key=lambda lr: losses[lr])
            if min(losses) < lr < max(losses):
                break
            rates = [rounded(lr / STEP_OF_RATES if lr == min(losses) else lr * STEP_OF_RATES)]
        return [run for seed in seeds if (run := self.run(name, lr, seed)) is not None]


def table(cells: list[Cell]) -> str:
    """Losses of both, and the noise on the way of MeZO, in Markdown."""
    head = "| data | N | MeZO: rate | training loss | test loss | MeZO-SVRG: rate | training loss | test loss "
    lines = [head + "| r at the start | highest | at the end | N + B |", "|---" * 12 + "|"]
    for cell in cells:
        columns, r = [cell.task, str(cell.num_samples)], []
        for name in (MEZO, SVRG):
            if not (runs := cell.best(name)):
                break
            ends = [run["points"][-1] for run in runs]
            columns.append(f"{runs[0]['lr']:g}")
            for place in (2, 4):
                values = [end[place] for end in ends]
                spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                columns.append(f"{statistics.mean(values):.3f}{spread}")
            r = r or [point[6] for point in runs[0]["points"]]
        else:
            columns += [f"{value:.0f}" for value in (r[0], max(r), r[-1])] + [str(cell.num_samples + BATCH)]
            lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines)


def plot(cells: list[Cell], path: Path) -> None:
    """Above: training loss against forward passes; below: r on the way, and where MeZO-SVRG would begin to pay."""
    from matplotlib.figure import Figure

    whole = [cell for cell in cells if cell.best(MEZO) and cell.best(SVRG)]
    if not whole:
        return
    figure = Figure(figsize=(1 + 3.5 * len(whole), 6), layout="constrained")
    for k, cell in enumerate(whole):
        above, below = figure.add_subplot(2, len(whole), k + 1), figure.add_subplot(2, len(whole), len(whole) + k + 1)
        for color, name in zip(("tab:blue", "tab:red"), (MEZO, SVRG), strict=True):
            for run in cell.best(name):
                points = [point for point in run["points"] if point[0]]
                label = f"{name}, {run['lr']:g}" if run["seed"] == SEEDS[0] else None
                above.plot([p[0] for p in points], [p[2] for p in points], color=color, alpha=0.7, label=label)
        above.set_title(f"{cell.task}, N = {cell.num_samples}")
        above.legend()
        points = [point for point in cell.best(MEZO)[0]["points"] if point[0]]
        below.plot([p[0] for p in points], [p[6] for p in points], color="tab:blue", label="r on the way of MeZO")
        below.axhline(cell.num_samples + BATCH, color="tab:red", linestyle="--", label="N + B: MeZO-SVRG pays above")
        below.set_yscale("log")
        below.legend()
        below.set_xlabel("forward passes of one sample")
        for axes in (above, below):
            axes.set_xscale("log", base=2)
        if not k:
            above.set_ylabel("loss of the training samples")
            below.set_ylabel("r")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tasks", nargs="+", choices=[*PRESET.tasks, *TINY.tasks], default=["movie-sentences", "tweets"]
    )
    parser.add_argument("--samples", nargs="+", type=int, default=list(SAMPLES), help="numbers of training samples")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="sum up what is there and run nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    about = provenance(f"{options.threads} thread(s)", f"{TUNING_SEED} to choose rates, then {list(SEEDS)}")
    columns = "forward passes, seconds, training loss and metric, test loss and metric, r where it was measured"
    results = Results(options.out / "where_svrg_pays.jsonl", {**about, "columns": columns})
    cells = []
    for task in options.tasks:
        for num_samples in options.samples:
            if options.report:
                cells.append(Cell(task, num_samples, results))
                continue
            with tempfile.TemporaryDirectory() as folder:
                preset = TINY if task in TINY.tasks else PRESET
                sizes = {"train": num_samples, "validation": 8} | ({} if preset is TINY else {"test": 512})
                preset = dataclasses.replace(preset, sizes=sizes)
                bench = Bench.open(preset, "norms", task, Path(folder))
                bench.splits = {name: bench.run.split(name) for name in ("train", "test")}
                cells.append(cell := Cell(task, num_samples, results, bench))
                for name in (MEZO, SVRG):
                    cell.best(name)
    plot(cells, options.out / "where_svrg_pays.png")
    print(table(cells))


if __name__ == "__main__":
    main()
