"""Does ``lr: auto`` learn as well as a rate that was tuned, with one setting for all data sets and kinds of weights?

    python examples/studies/auto_rate.py [--tasks NAME ...] [--kinds NAME ...]

For every data set and kind of weights (`KINDS`), MeZO (and, for norms, MeZO-SVRG at the passes of 256 steps of MeZO)
gets the same forward passes, batches and schedule with

* a tuned rate: four of them, half a decade apart, on seed 0; the best one by validation (accuracy, then loss) goes on,
  and the grid grows by one at an edge, once more if need be;
* ``lr: auto`` as it is by default. Nothing is chosen for it here.

Both run from `SEEDS` and are scored on `UNTOUCHED`: samples that no choice in this repository was held against.

The share at the start, 0.8 / sqrt(steps), was chosen before, on the validation samples of three of these data sets,
among 0.24, 0.8 and 1.6: results/auto_rate.jsonl, whose heads name the commits that made the runs. That share alone,
without looking back, is in results/auto_rate-untouched.jsonl.

Writes one line per finished run to auto_rate-look_back.jsonl, headed by a line about machine and versions. What is
there is not run again, so the same command goes on where it was stopped; `--report` prints tables of what is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from curve_contenders import EXTENSIONS, STEP_OF_RATES, TASKS, CurvePreset, Learner, Setting, rounded, schedule
from curve_runs import Bench, learn
from learning_curves import Record, Results, provenance, score

from mezo_dist.algorithms.mezo import MeZO
from mezo_dist.algorithms.momentum import Momentum
from mezo_dist.algorithms.schedules import Annealing
from mezo_dist.algorithms.svrg import MeZOSVRG

TUNING_SEED, SEEDS = 0, (1, 2, 3)
RATES = 4
"""Learning rates of a grid to begin with."""
BATCH = 16
LAYERS = [f"layers.29.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
ALL = ("model.trainable=['*']",)
LORA = ("model.trainable=['*']", "model.peft.method=lora", "model.peft.r=4", f"model.peft.target_modules={LAYERS}")


@dataclass(frozen=True)
class Kind:
    """Which weights are trained, and how."""

    least: float
    """Smallest rate of the grid."""
    overrides: tuple[str, ...] = ()
    """Of configs/quickstart.yaml."""
    steps: int = 64
    directions: int = 7
    """One-sided if there are several."""
    eps: float = 1e-2
    calibrated: bool = True
    anchors: int = 0
    """Samples of an anchor of MeZO-SVRG with q = 2, both of whose rates are one; 0: MeZO."""
    momentum: float = 0.0
    """Of a window of ten estimates."""

    @property
    def passes(self) -> int:
        """Forward passes of one sample in a step, on average."""
        sides = self.directions + 1
        return (self.anchors + 2 * BATCH) * sides // 2 if self.anchors else BATCH * sides

    def preset(self, task: str) -> CurvePreset:
        """How much of everything, for one data set."""
        return CurvePreset(
            {"": Setting((*self.overrides, "task.metric=accuracy"))},
            DATA,
            budget=self.passes * (self.steps if task in UNTOUCHED else 4),
            eps=self.eps,
            max_tokens=dict.fromkeys(DATA, 48) | {"bbc-news": 24, "r8": 24, "editorial-sentences": 32},
            batch_size=BATCH,
            looks=0,
            untouched=UNTOUCHED,
        )


DATA = {
    **TASKS,
    **{name: f"configs/tasks/{name}.yaml" for name in ("r8", "product-sentences", "editorial-sentences")},
    "tiny": "tiny",
}
"""The last one: made-up sentences and a tiny random model, to try this script."""
UNTOUCHED = {
    "movie-sentences": slice(-1512, -1000),
    "tweets": slice(-512, None),
    "bbc-news": slice(-359, None),
    "r8": slice(-512, None),
    "product-sentences": slice(-512, None),
    "editorial-sentences": slice(-512, None),
}
"""Places in the permutation that a task's splits are cut from. Studies and recipes took training and validation samples
from its first 768 places, and test samples from the 1,000 after them. (R8 has test samples of its own: those from the
first 1,000 there.) quickstart_rate.py scored the last 1,000 movie sentences. The recipes of headlines, which learn
topics too, draw from the articles of bbc-news in another order."""
KINDS = {
    "norms": Kind(0.03),
    "norms, plain losses": Kind(0.003, calibrated=False),
    "norms, 256 steps": Kind(0.03, steps=256),
    "norms, MeZO-SVRG": Kind(0.03, steps=85, anchors=64),
    "norms, momentum": Kind(0.03, momentum=0.9),
    "norms, bfloat16": Kind(0.03, ("model.weights=bfloat16",)),
    "norms, bfloat16, eps 0.05": Kind(0.03, ("model.weights=bfloat16",), eps=5e-2),
    "LoRA": Kind(0.003, LORA),
    "LoRA, bfloat16": Kind(0.003, (*LORA, "model.weights=bfloat16"), eps=2e-2),
    "last MLP": Kind(1e-4, ('model.trainable=["model.layers.29.mlp.*"]',)),
    "all weights": Kind(6e-5, ALL, steps=128, directions=1, eps=1e-3),
    "all weights, bfloat16": Kind(6e-5, (*ALL, "model.weights=bfloat16"), steps=128, directions=1, eps=2e-3),
}


class Cell:
    """One kind of weights on one data set.

    Args:
        name: of the kind.
        task: name of the data set.
        results: the file.
        bench: the model with its data; None: only what is there counts.
    """

    def __init__(self, name: str, task: str, results: Results, bench: Bench | None = None) -> None:
        self.kind, self.label, self._results = KINDS[name], f"{name}, {task}", results
        preset = self.kind.preset(task)
        self._bench = bench and dataclasses.replace(bench, preset=preset, budget=preset.budget)

    def auto(self, seed: int) -> Record | None:
        """A run of ``lr: auto``."""
        return self._run("auto", 0.0, seed)

    def tuned(self, lr: float, seed: int) -> Record | None:
        """A run with this rate."""
        return self._run("tuned", rounded(lr), seed)

    def best_rate(self) -> float:
        """The rate that validation likes best."""
        rates, scores = [self.kind.least * STEP_OF_RATES**k for k in range(RATES)], {}
        for _ in range(EXTENSIONS + 1):
            runs = {rounded(lr): self.tuned(lr, TUNING_SEED) for lr in rates}
            scores |= {lr: score(run) for lr, run in runs.items() if run is not None}
            if not scores:
                return math.nan
            best = max(scores, key=lambda lr: scores[lr])
            if min(scores) < best < max(scores):
                break
            rates = [best / STEP_OF_RATES if best == min(scores) else best * STEP_OF_RATES]
        return best

    def _run(self, contender: str, lr: float, seed: int) -> Record | None:
        """One run, from the file if it is there; None if it is not and there is no bench."""
        label = f"{self.label}, {contender}"
        done = self._results.find(label, lr, seed)
        if done is None and self._bench is not None:
            curve = learn(self._bench, self._learner(auto=contender == "auto"), lr, seed)
            done = {"kind": "run", "label": label, "lr": lr, "seed": seed, **curve}
            self._results.add(done)
            print(f"{label:42} {lr:<8g} seed {seed}  {done['points'][-1]} rates {done['rates']}", flush=True)
        return done

    def _learner(self, *, auto: bool) -> Learner:
        kind = self.kind

        def make(lr: float, steps: int, eps: float) -> MeZO | MeZOSVRG:
            more: dict[str, Any] = {"lr": "auto" if auto else lr, "eps": eps, "schedule": schedule(steps)}
            more |= {"directions": kind.directions, "one_sided": kind.directions > 1}
            more |= {"momentum": Momentum(kind.momentum)}
            if not kind.anchors:
                return MeZO(**more)
            more |= {"anchor_lr": more["lr"], "anchor_directions": kind.directions}
            return MeZOSVRG(q=2, annealing=Annealing(divisor=1), **more)

        full = min(kind.anchors, self._bench.num_train) if kind.anchors and self._bench else None
        return Learner("", make, kind.passes, {}, BATCH, full_size=full, calibrated=kind.calibrated)


def work(cell: Cell, seeds: Sequence[int]) -> None:
    """All runs of a cell that are not there yet."""
    for seed in seeds:
        cell.auto(seed)
    lr = cell.best_rate()
    for seed in seeds:
        cell.tuned(lr, seed)


def table(cells: Sequence[Cell], seeds: Sequence[int]) -> str:
    """Accuracy and loss of tuned rates and of ``lr: auto``, and the rates, in Markdown."""
    head = "| weights, data | tuned: rate | accuracy | loss | auto: rate | accuracy | loss | accuracy, auto - tuned |"
    lines = [head, "|---" * 8 + "|"]
    for cell in cells:
        lr = cell.best_rate()
        tuned = [run for seed in seeds if (run := cell.tuned(lr, seed)) is not None]
        auto = [run for seed in seeds if (run := cell.auto(seed)) is not None]
        if len(tuned) == len(auto) == len(seeds):
            rates = [run["rates"][1] for run in auto]
            columns = [f"{lr:g}", *_figures(tuned), f"{min(rates):.2g} to {max(rates):.2g}", *_figures(auto)]
            lines.append(f"| {cell.label} | {' | '.join(columns)} | {_accuracy(auto) - _accuracy(tuned):+.1f} |")
    return "\n".join(lines)


def _accuracy(runs: Sequence[Record]) -> float:
    """The mean, in per cent."""
    return 100 * statistics.mean(run["points"][-1][5] for run in runs)


def _figures(runs: Sequence[Record]) -> list[str]:
    losses, accuracies = zip(*(run["points"][-1][4:6] for run in runs), strict=True)
    spread = f" ± {100 * statistics.stdev(accuracies):.1f}" if len(runs) > 1 else ""
    diverged = sum(run["diverged"] for run in runs)
    accuracy = f"{_accuracy(runs):.1f}{spread}" + (f", {diverged} diverged" if diverged else "")
    return [accuracy, f"{statistics.mean(losses):.3f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--tasks", nargs="+", choices=DATA, default=[name for name in DATA if name != "tiny"])
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="of the runs that are scored")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="sum up what is there and run nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    seeds = f"{TUNING_SEED} to choose rates, then {tuple(options.seeds)}"
    where = (
        f"a process with {options.threads} thread(s)" if not torch.cuda.is_available() else torch.cuda.get_device_name()
    )
    about = provenance(where, seeds)
    columns = "forward passes of training, seconds, validation loss and accuracy, the same of untouched samples"
    rates = "first, middle and last learning rate, before the schedule"
    results = Results(options.out / "auto_rate-look_back.jsonl", {**about, "columns": columns, "rates": rates})
    pairs = [(name, task) for task in options.tasks for name in options.kinds]
    benches: dict[tuple[str, ...], Bench] = {}
    for name, task in pairs if not options.report else ():
        shared = (*KINDS[name].overrides, task)
        if shared not in benches:
            with tempfile.TemporaryDirectory() as folder:
                benches = {shared: Bench.open(KINDS[name].preset(task), "", task, Path(folder))}
        work(Cell(name, task, results, benches[shared]), options.seeds)
    print(table([Cell(name, task, results) for name, task in pairs], options.seeds))


if __name__ == "__main__":
    main()
