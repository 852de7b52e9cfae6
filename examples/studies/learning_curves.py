"""How well has each algorithm learnt after so many forward passes, and so many seconds?

    python examples/studies/learning_curves.py [--preset cpu] [--jobs 2] [--settings prompts head] [--tasks NAME ...]
                                               [--only LABEL ...]

Settings: `prompts` reads SmolLM2-135M's answer off the label words, `head` trains a fresh classification head on
MiniLM-L6. The preset `cpu` trains only the last few weights, so that what comes before them is computed once per sample
(not counted as time: it is the same for all); `gpu` trains all weights of the same models, and was never run.

Every contender gets the same budget of forward passes of one sample (a backward pass counts as two), the same batches
in the same order where batches are of one size, the same schedule, and the same tuning: four learning rates, half a
decade apart, on seed 0; the best one (validation accuracy at the end, then validation loss) goes on. If it lies at an
edge of the grid, the grid grows there by one, and once more if need be. Then the chosen rate runs on seeds 1, 2 and 3,
which give the directions, the order of batches and a fresh head. Test samples are looked at along the way, but nothing
is chosen on them.

Writes one line per finished run to learning_curves-PRESET-SETTING-TASK.jsonl, headed by a line about machine and
versions. What is there is not run again, so the same command goes on where it was stopped. At the end, or by
`--report`, learning_curves-PRESET-SETTING.png and learning_curves-PRESET.md sum up whatever is there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from curve_contenders import EXTENSIONS, PRESETS, STEP_OF_RATES, Learner, learners, rounded
from curve_report import report
from curve_runs import Bench, learn
from estimator_quality import ROOT, processor

import mezo_dist

Record = dict[str, Any]
TUNING_SEED = 0


@dataclass(frozen=True)
class Job:
    """One setting on one data set: what a process does by itself."""

    preset: str
    setting: str
    task: str
    only: tuple[str, ...]
    threads: int
    out: Path

    @property
    def path(self) -> Path:
        """The result file."""
        return self.out / f"learning_curves-{self.preset}-{self.setting}-{self.task}.jsonl"


class Results:
    """A result file that grows by a line per finished run."""

    def __init__(self, path: Path, about: Record) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        records = (json.loads(line) for line in lines)
        self.runs = {_key(r["label"], r["lr"], r["seed"]): r for r in records if r["kind"] == "run"}
        self._about: Record | None = {"kind": "about", **about}

    def add(self, record: Record) -> None:
        """Write it down; before the first one, who writes."""
        with self._path.open("a") as sink:
            if self._about is not None:
                sink.write(json.dumps(self._about) + "\n")
                self._about = None
            sink.write(json.dumps(record) + "\n")
        self.runs[_key(record["label"], record["lr"], record["seed"])] = record

    def find(self, label: str, lr: float, seed: int) -> Record | None:
        """A run that is there."""
        return self.runs.get(_key(label, lr, seed))


def _key(label: str, lr: float, seed: int) -> tuple[str, float, int]:
    return label, rounded(lr), seed


def provenance(processes: str, seeds: str) -> Record:
    """What every result file says of where it comes from.

    Args:
        processes: how the machine was used.
        seeds: which, and what for.
    """
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    code = ["--", "*.py", "*.yaml"]  # result files grow while a study goes on
    dirty = subprocess.run(["git", "diff", "--quiet", "HEAD", *code], cwd=ROOT, check=False).returncode
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit.stdout.strip() + (" with changes" if dirty else ""),
        "machine": f"{processor()}, {os.cpu_count()} cores; {processes}",
        "versions": f"mezo_dist {mezo_dist.__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d"),
        "seeds": seeds,
    }


def about(job: Job) -> Record:
    """Head of a result file."""
    processes = f"a process with {job.threads} thread(s) per data set"
    seeds = f"{TUNING_SEED} to choose the rate, then {list(PRESETS[job.preset].seeds)}"
    columns = "forward passes of training, seconds, validation loss, validation metric, test loss, test metric"
    return {**provenance(processes, seeds), "columns": columns}


def work(job: Job) -> None:
    """All runs of one setting on one data set that are not done yet."""
    torch.set_num_threads(job.threads)
    preset, results = PRESETS[job.preset], Results(job.path, about(job))
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench.open(preset, job.setting, job.task, Path(folder))
        chosen = [c for c in learners(preset, bench.num_train) if not job.only or c.label in job.only]
        for learner in chosen:
            lr = tune(bench, job, learner, results)
            for seed in preset.seeds:
                run(bench, job, learner, lr, seed, results)


def tune(bench: Bench, job: Job, learner: Learner, results: Results) -> float:
    """The rate that validation likes best."""
    rates = learner.rates(job.setting, bench.preset)
    return best_rate(rates, lambda lr: run(bench, job, learner, lr, TUNING_SEED, results))


def best_rate(rates: list[float], run_with: Callable[[float], Record]) -> float:
    """The rate that validation likes best, of a grid that grows where its best one lies at an edge.

    Args:
        rates: to begin with.
        run_with: the run of `TUNING_SEED` with a rate.
    """
    scores: dict[float, tuple[float, float]] = {}
    for _ in range(EXTENSIONS + 1):
        for lr in rates:
            scores[lr] = score(run_with(lr))
        best = max(scores, key=lambda lr: scores[lr])
        if min(scores) < best < max(scores):
            break
        rates = [rounded(best / STEP_OF_RATES if best == min(scores) else best * STEP_OF_RATES)]
    return best


def score(record: Record) -> tuple[float, float]:
    """Validation accuracy at the end, then validation loss; a run that diverged comes last."""
    _, _, loss, accuracy, _, _ = record["points"][-1]
    return (-1.0 if record["diverged"] else accuracy, -loss)


def run(bench: Bench, job: Job, learner: Learner, lr: float, seed: int, results: Results) -> Record:
    """One run, from the file if it is there."""
    key = _key(learner.label, lr, seed)
    if key not in results.runs:
        curve = learn(bench, learner, lr, seed)
        results.add({"kind": "run", "label": learner.label, "lr": rounded(lr), "seed": seed, **curve})
        done, seconds, _, validation, _, test = curve["points"][-1]
        figures = f"{done:7} passes {seconds:6.1f} s  validation {validation:.3f}  test {test:.3f}"
        print(f"{job.setting:8}{job.task:16} {learner.label:42} lr {lr:<8g} seed {seed}  {figures}", flush=True)
    return results.runs[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--settings", nargs="+", metavar="NAME", help="all of the preset if left out")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="all of the preset if left out")
    parser.add_argument("--only", nargs="+", metavar="LABEL", default=(), help="contenders; all if left out")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, one data set each")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--report", action="store_true", help="sum up what is there and run nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    options = parser.parse_args()
    preset = PRESETS[options.preset]
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.report:
        jobs = [
            Job(options.preset, setting, task, tuple(options.only), options.threads, options.out)
            for setting in options.settings or preset.settings
            for task in options.tasks or preset.tasks
        ]
        if options.jobs == 1:
            for job in jobs:
                work(job)
        else:
            os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(options.jobs, spawn, max_tasks_per_child=1) as pool:
                list(pool.map(work, jobs))
    print(report(options.out, options.preset))


if __name__ == "__main__":
    main()
