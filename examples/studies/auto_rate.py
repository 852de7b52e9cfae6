"""Does ``lr: auto`` learn as well as a rate that was tuned, with one setting for all data sets and kinds of weights?

    python examples/studies/auto_rate.py [--tasks NAME ...] [--kinds NAME ...]

For every data set and kind of weights, MeZO with 7 one-sided directions gets the same budget of forward passes, batches
and schedule (as in `learning_curves.py`) with

* a tuned rate: four of them, half a decade apart, on seed 0; the best one by validation (accuracy, then loss) goes on,
  and the grid grows by one at an edge, once more if need be;
* ``lr: auto`` with eta = one of `SHARES` over the square root of the number of steps.

Tuned rates then run from `SEEDS`, as ``lr: auto`` does. One share is chosen for all data sets and kinds of weights, by
the mean validation accuracy over all runs. Test samples are looked at, but nothing is chosen on them. The kind `LONG`
has four times the steps; its tuned runs are those of `learning_curves.py`, and auto has the product's share alone.

Writes one line per finished run to auto_rate.jsonl, headed by a line about machine and versions. What is there is not
run again, so the same command goes on where it was stopped; `--report` prints tables of what is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from curve_contenders import EXTENSIONS, STEP_OF_RATES, TASKS, CurvePreset, Learner, Setting, rounded, schedule
from curve_runs import Bench, learn
from learning_curves import Record, Results, provenance, score

from mezo_dist.algorithms.auto_rate import SHARE
from mezo_dist.algorithms.mezo import MeZO

SHARES = (0.24, SHARE, 1.6)
TUNING_SEED, SEEDS = 0, (1, 2, 3)
LONG = "norms, 256 steps"
LAYERS = [f"layers.29.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
LORA = ("model.trainable=['*']", "model.peft.method=lora", "model.peft.r=4", f"model.peft.target_modules={LAYERS}")
PRESET = CurvePreset(
    {
        "norms": Setting(()),
        "norms, plain losses": Setting(()),
        LONG: Setting(()),
        "LoRA": Setting(LORA),
        "last MLP": Setting(('model.trainable=["model.layers.29.mlp.*"]',)),
    },
    TASKS,
    budget=8192,
    eps=1e-2,
    sizes={"test": 512},
    max_tokens={"movie-sentences": 48, "tweets": 48, "bbc-news": 24},
    batch_size=16,
    looks=0,
)
"""A quarter of the forward passes of `learning_curves.py`: 64 steps."""
TINY = dataclasses.replace(PRESET, tasks={"tiny": "tiny"}, budget=512, sizes={}, max_tokens={}, rates=2)
"""Made-up sentences and a tiny random model, to try this script."""
LEAST = {"norms": 0.03, "norms, plain losses": 0.003, LONG: 0.03, "LoRA": 0.003, "last MLP": 1e-4}
"""Smallest rate of the grid for every kind of weights."""


def preset_of(task: str) -> CurvePreset:
    """How much of everything, for one data set."""
    return TINY if task in TINY.tasks else PRESET


def learner(kind: str, *, auto: bool) -> Learner:
    """The contender; for ``lr: auto`` what it is given in place of a rate is eta."""
    batch = PRESET.batch_size

    def make(value: float, steps: int, eps: float) -> MeZO:
        rate: dict[str, Any] = {"lr": "auto", "eta": value} if auto else {"lr": value}
        return MeZO(**rate, eps=eps, directions=7, one_sided=True, schedule=schedule(steps))

    share = 4.0 if kind == LONG else 1.0
    return Learner("", make, 8 * batch, {kind: LEAST[kind]}, batch, share=share, calibrated="plain" not in kind)


class Cell:
    """One kind of weights on one data set.

    Args:
        kind: of weights.
        task: name of the data set.
        results: the file.
        bench: the model with its data; None: only what is there counts.
    """

    def __init__(self, kind: str, task: str, results: Results, bench: Bench | None = None) -> None:
        self.kind, self.task, self._results, self._bench = kind, task, results, bench
        self.preset = preset_of(task)

    @property
    def steps(self) -> int:
        """Steps of a run."""
        return learner(self.kind, auto=True).steps(self.preset.budget)

    def auto(self, share: float, seed: int) -> Record | None:
        """A run of ``lr: auto``."""
        return self._run("auto", rounded(share / math.sqrt(self.steps)), seed)

    def tuned(self, lr: float, seed: int) -> Record | None:
        """A run with this rate."""
        return self._run("tuned", rounded(lr), seed)

    def _run(self, contender: str, value: float, seed: int) -> Record | None:
        """One run, from the file if it is there; None if it is not and there is no bench."""
        label = f"{self.kind}, {self.task}, {contender}"
        done = self._results.find(label, value, seed)
        if done is None and self._bench is not None:
            curve = learn(self._bench, learner(self.kind, auto=contender == "auto"), value, seed)
            done = {"kind": "run", "label": label, "lr": value, "seed": seed, **curve}
            self._results.add(done)
            print(f"{label:42} {value:<8g} seed {seed}  {done['points'][-1]} rates {done['rates']}", flush=True)
        return done

    def best_rate(self) -> float:
        """The rate that validation likes best."""
        rates, scores = [LEAST[self.kind] * STEP_OF_RATES**k for k in range(self.preset.rates)], {}
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


class Stored(Cell):
    """Four times the steps, as in `learning_curves.py`, which ran the tuned rates."""

    def tuned(self, lr: float, seed: int) -> Record | None:
        path = Path(__file__).parent / f"results/learning_curves-cpu-prompts-{self.task}.jsonl"
        done = Results(path, {}).find("MeZO, 7 one-sided, calibrated", lr, seed)
        return done if done is not None and done["steps"] == self.steps else None


def cell(kind: str, task: str, results: Results, bench: Bench | None = None) -> Cell:
    """One kind of weights on one data set; arguments are those of `Cell`."""
    return (Stored if kind == LONG else Cell)(kind, task, results, bench)


def work(one: Cell) -> None:
    """All runs of a cell that are not there yet."""
    for seed in (TUNING_SEED, *SEEDS):
        for share in (SHARE,) if one.kind == LONG else SHARES:
            one.auto(share, seed)
    lr = one.best_rate()
    for seed in SEEDS:
        one.tuned(lr, seed)


def chosen_share(cells: Sequence[Cell]) -> float:
    """The share with the best mean validation accuracy, over all cells that have all of them, and all seeds."""
    whole = [one for one in cells if all(one.auto(share, seed) for share in SHARES for seed in (TUNING_SEED, *SEEDS))]
    means: dict[float, float] = {}
    for share in SHARES if whole else ():
        runs = [run for one in whole for seed in (TUNING_SEED, *SEEDS) if (run := one.auto(share, seed)) is not None]
        means[share] = statistics.mean(score(run)[0] for run in runs)
        print(f"eta {share} / sqrt(steps): validation accuracy {100 * means[share]:.2f} % over {len(runs)} runs")
    return max(means, key=lambda share: means[share], default=SHARE)


def table(cells: Sequence[Cell], share: float) -> str:
    """Test accuracy and loss of tuned rates and of ``lr: auto``, and the rates, in Markdown."""
    head = "| weights | data | tuned: rate | accuracy | loss | auto: rate | accuracy | loss |"
    lines = [head, "|---" * 8 + "|"]
    for one in cells:
        lr = one.best_rate()
        tuned = [run for seed in SEEDS if (run := one.tuned(lr, seed)) is not None]
        auto = [run for seed in SEEDS if (run := one.auto(share, seed)) is not None]
        if tuned and auto:
            rates = [run["rates"][1] for run in auto]
            columns = [f"{lr:g}", *_figures(tuned), f"{min(rates):.2g} to {max(rates):.2g}", *_figures(auto)]
            lines.append(f"| {one.kind} | {one.task} | {' | '.join(columns)} |")
    return "\n".join(lines)


def _figures(runs: list[Record]) -> list[str]:
    losses, accuracies = zip(*(run["points"][-1][4:6] for run in runs), strict=True)
    spread = f" ± {100 * statistics.stdev(accuracies):.1f}" if len(runs) > 1 else ""
    diverged = sum(run["diverged"] for run in runs)
    accuracy = f"{100 * statistics.mean(accuracies):.1f}{spread}" + (f", {diverged} diverged" if diverged else "")
    return [accuracy, f"{statistics.mean(losses):.3f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=PRESET.settings, default=list(PRESET.settings))
    parser.add_argument("--tasks", nargs="+", choices=[*PRESET.tasks, *TINY.tasks], default=list(PRESET.tasks))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="sum up what is there and run nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seeds = f"{TUNING_SEED} to choose rates, then {SEEDS}"
    about = provenance(f"a process with {options.threads} thread(s)", seeds)
    columns = "forward passes of training, seconds, validation loss, validation metric, test loss, test metric"
    rates = "first, middle and last learning rate, before the schedule"
    results = Results(options.out / "auto_rate.jsonl", {**about, "columns": columns, "rates": rates, "lr": "or eta"})
    pairs = [(kind, task) for task in options.tasks for kind in options.kinds]
    benches: dict[tuple[str, ...], Bench] = {}
    for kind, task in pairs if not options.report else ():
        shared = (*PRESET.settings[kind].overrides, task)
        if shared not in benches:
            with tempfile.TemporaryDirectory() as folder:
                benches = {shared: Bench.open(preset_of(task), kind, task, Path(folder), "cpu")}
        work(cell(kind, task, results, benches[shared]))
    cells = [cell(kind, task, results) for kind, task in pairs]
    print(table(cells, chosen_share(cells)))


if __name__ == "__main__":
    main()
