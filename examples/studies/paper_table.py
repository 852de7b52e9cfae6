"""The paper's table: fresh classification heads without a prompt, by MeZO, MeZO-SVRG and SGD.

    python examples/studies/paper_table.py [--preset cpu] [--settings NAME ...] [--tasks NAME ...] [--only LABEL ...]

Gautam et al. 2024 (arXiv 2404.08080) train fresh heads on 512 samples of GLUE, 128 tokens, batches of 64, q = 2, a
perturbation of 1e-3, and give MeZO 96,000 steps on RoBERTa-large (12,288,000 forward passes of one sample, `PAPER`),
MeZO-SVRG 24,000 (15,360,000) and SGD 1,000 (192,000, as a backward pass counts as two). Here:

* `cpu`: MiniLM-L6 on the data sets that install from PyPI (GLUE cannot be had offline). Every contender has the same
  number of passes, `PAPER` over `FACTOR`. `head` trains the classifier alone: what comes before it is computed once per
  sample, and a pass is nearly free. `pooler and head` trains the layer before it, too. Scored on `auto_rate.UNTOUCHED`,
  samples that no choice was held against; the presets below on test samples.
* `whole`: the same with all weights of MiniLM-L6: 75 to 160 s a run where thirteen share an H200, a quarter of an hour
  on a core.
* `gpu`: the paper's own models and tasks, all weights, its own number of passes. Never run.
* `tiny`: a random model on made-up sentences, to try this script.

Every contender with a rate is tuned alike: three rates (four on a GPU), half a decade apart, on seed 0; the best one
(validation accuracy, then loss) goes on, and the grid grows by one at an edge, once more if need be. Then it runs from
seeds 1, 2 and 3, which give a fresh head, too. All have the schedule of the studies. `lr: auto` has no rate and is not
tuned. The paper's rate of anchor steps is 50 to 1,000 times that of inner steps: one contender has 50, another equal
rates.

Writes one line per finished run to paper_table-PRESET-SETTING-TASK.jsonl; what is there is not run again. `--report`
prints the table of what is there, and draws paper_table-PRESET.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from auto_rate import UNTOUCHED
from curve_contenders import MINILM, TASKS, CurvePreset, Learner, Setting, schedule
from curve_runs import Bench
from learning_curves import TUNING_SEED, Job, Record, Results, provenance, run, tune

from mezo_dist.algorithms.mezo import MeZO
from mezo_dist.algorithms.schedules import Annealing
from mezo_dist.algorithms.svrg import MeZOSVRG

PAPER = 96_000 * 2 * 64
"""Forward passes of one sample that the paper gives MeZO on RoBERTa-large."""
FACTOR = 100
BATCH, RATIO = 64, 50
HEAD, POOLER = "head", "pooler and head"
LONGEST = "train.max_tokens=128"
GLUE = {name: f"configs/tasks/{name}.yaml" for name in ("sst2", "mnli", "qnli", "cola")}
PAPERS_MODELS = {
    "distilbert-base-cased": 200_000,
    "roberta-large": 96_000,
    "gpt2-xl": 32_000,
    "facebook/opt-2.7b": 32_000,
}
"""And the steps of MeZO on them."""
MOST_STEPS = max(PAPERS_MODELS.values())


def _whole(model: str) -> Setting:
    """All weights of a model of the paper. The rates below are for heads; the paper's grids are 1e-6 to 1e-4 for MeZO
    and 1e-4 to 1e-2 for SGD."""
    overrides = (f"model.name={model}", "model.head=classifier", 'model.trainable=["*"]', LONGEST)
    return Setting((*overrides, "train.micro_batch=16"), zeroth_scale=1e-5, first_scale=1e-3)


PRESETS = {
    "cpu": CurvePreset(
        {
            HEAD: Setting((*MINILM, 'model.trainable=["classifier.*"]', LONGEST, "train.micro_batch=64")),
            POOLER: Setting(
                (*MINILM, 'model.trainable=["bert.pooler.*", "classifier.*"]', LONGEST, "train.micro_batch=64")
            ),
        },
        TASKS, budget=PAPER // FACTOR, eps=1e-3, rates=3, looks=6, untouched=UNTOUCHED,
    ),
    "whole": CurvePreset(
        {"all weights": Setting((*MINILM, 'model.trainable=["*"]', LONGEST, "train.micro_batch=64"), 0.032, 0.1)},
        TASKS, budget=PAPER // FACTOR, eps=1e-3, rates=3, sizes={"test": 512}, looks=6,
    ),
    "gpu": CurvePreset(
        {model: _whole(model) for model in PAPERS_MODELS},
        GLUE, budget=MOST_STEPS * 2 * BATCH, eps=1e-3, sizes={"train": 512, "validation": 256},
        shares={(model, task): steps / MOST_STEPS for model, steps in PAPERS_MODELS.items() for task in GLUE},
    ),
    "tiny": CurvePreset(
        {HEAD: Setting(("model.head=classifier", 'model.trainable=["score.*"]'))},
        {"tiny": "tiny"}, budget=768, eps=1e-3, rates=2, seeds=(1,), batch_size=16, looks=1,
    ),
}  # fmt: skip
LEAST = {"MeZO": (0.03, 0.003), "MeZO-SVRG": (0.095, 0.0095), "SGD": (0.95, 0.095)}
"""Smallest rates of the grids, for heads and for all else."""


def contenders(preset: CurvePreset, num_train: int) -> list[Learner]:
    """What is compared, for so many training samples."""
    batch, off = preset.batch_size, Annealing(divisor=1)
    cycle = (2 * num_train + 4 * batch) / 2

    def mezo(lr: Any, steps: int, eps: float) -> MeZO:
        return MeZO(lr=lr, eps=eps, schedule=schedule(steps))

    def seven(_: float, steps: int, eps: float) -> MeZO:
        return MeZO(lr="auto", eps=eps, directions=7, one_sided=True, schedule=schedule(steps))

    def svrg(lr: Any, steps: int, eps: float, ratio: int = 1) -> MeZOSVRG:
        inner = lr if lr == "auto" else lr / ratio
        return MeZOSVRG(lr=inner, anchor_lr=lr, eps=eps, q=2, schedule=schedule(steps), annealing=off)

    rates = {name: {s: head if s == HEAD else rest for s in preset.settings} for name, (head, rest) in LEAST.items()}
    slower = f"MeZO-SVRG, anchor rate {RATIO} times"
    return [
        Learner("MeZO", mezo, 2 * batch, rates["MeZO"], batch),
        Learner("MeZO-SVRG", svrg, cycle, rates["MeZO-SVRG"], batch),
        Learner(slower, lambda *a: svrg(*a, ratio=RATIO), cycle, rates["MeZO-SVRG"], batch),
        Learner("MeZO-SVRG, lr: auto", lambda _, *a: svrg("auto", *a), cycle, {}, batch),
        Learner("MeZO, lr: auto", lambda _, *a: mezo("auto", *a), 2 * batch, {}, batch),
        Learner("MeZO, 7 one-sided, calibrated, lr: auto", seven, 8 * batch, {}, batch, calibrated=True),
        Learner("SGD", "sgd", 3 * batch, rates["SGD"], batch),
    ]


def path_of(job: Job) -> Path:
    """The result file of a setting on a data set."""
    setting = job.setting.replace("/", "-").replace(" ", "-")
    return job.out / f"paper_table-{job.preset}-{setting}-{job.task}.jsonl"


def work(job: Job) -> None:
    """All runs of a setting on a data set that are not there yet."""
    preset = PRESETS[job.preset]
    seeds = f"{TUNING_SEED} to choose rates, then {list(preset.seeds)}"
    columns = "forward passes of training, seconds, validation loss, validation metric, test loss, test metric"
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    about = provenance(f"{gpu}a process with {job.threads} thread(s)", seeds)
    results = Results(path_of(job), {**about, "columns": columns, "lr": "0: auto"})
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench.open(preset, job.setting, job.task, Path(folder))
        for learner in contenders(preset, bench.num_train):
            if job.only and learner.label not in job.only:
                continue
            lr = tune(bench, job, learner, results) if learner.rate else 0.0
            for seed in preset.seeds:
                run(bench, job, learner, lr, seed, results)


def chosen(job: Job) -> dict[str, list[Record]]:
    """The runs with the rate that was chosen, by contender."""
    preset, path = PRESETS[job.preset], path_of(job)
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    of_seeds = [r for r in records if r["kind"] == "run" and r["seed"] in preset.seeds]
    return {
        label: [r for r in of_seeds if r["label"] == label] for label in dict.fromkeys(r["label"] for r in of_seeds)
    }


def table(jobs: list[Job]) -> str:
    """Test accuracy at the end, with the rate that was chosen, in Markdown."""
    cells = {(job.setting, job.task): chosen(job) for job in jobs}
    cells = {key: cell for key, cell in cells.items() if cell}
    labels = list(dict.fromkeys(label for cell in cells.values() for label in cell))
    lines = [
        "| | " + " | ".join(f"{setting}, {task}" for setting, task in cells) + " |",
        "|---" * (1 + len(cells)) + "|",
    ]
    first = [next(iter(cell.values())) for cell in cells.values()]
    lines.append("| before | " + " | ".join(_accuracy(runs, 0) for runs in first) + " |")
    for label in labels:
        columns = [_figures(cell[label]) if label in cell else "" for cell in cells.values()]
        lines.append(f"| {label} | " + " | ".join(columns) + " |")
    return "\n".join(lines)


def _figures(runs: list[Record]) -> str:
    rates = sorted({rate for run in runs for rate in run["rates"]} or {run["lr"] for run in runs})
    rate = f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:.2g} to {rates[-1]:.2g}"
    diverged = sum(run["diverged"] for run in runs)
    return f"{_accuracy(runs, -1)} ({rate})" + (f", {diverged} diverged" if diverged else "")


def _accuracy(runs: list[Record], place: int) -> str:
    values = [100 * run["points"][place][5] for run in runs]
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def plot(jobs: list[Job], path: Path) -> None:
    """Test accuracy against forward passes: a row for each setting, the same colour for a contender everywhere."""
    from matplotlib.figure import Figure

    labels = [contender.label for contender in contenders(PRESETS[jobs[0].preset], 512)]
    cells = {(job.setting, job.task): cell for job in jobs if (cell := chosen(job))}
    if not cells:
        return
    settings, tasks = (list(dict.fromkeys(key[place] for key in cells)) for place in (0, 1))
    figure = Figure(figsize=(1 + 4 * len(tasks), 1 + 3.5 * len(settings)), layout="constrained")
    panels = figure.subplots(len(settings), len(tasks), squeeze=False)
    for (setting, task), cell in cells.items():
        axes = panels[settings.index(setting)][tasks.index(task)]
        for number, label in enumerate(labels):
            points = [run["points"][1:] for run in cell.get(label, []) if not run["diverged"]]
            means = [statistics.mean(100 * point[5] for point in same) for same in zip(*points, strict=False)]
            passes = [point[0] for point in points[0]][: len(means)] if points else []
            axes.plot(passes, means, color=f"C{number}", label=label)
        axes.set_title(f"{setting}, {task}")
        axes.set_xscale("log", base=2)
    for axes in panels[:, 0]:
        axes.set_ylabel("test accuracy, %")
    for axes in panels[-1]:
        axes.set_xlabel("forward passes of one sample")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=90)


def jobs_of(options: argparse.Namespace) -> Iterator[Job]:
    """One for every setting and data set that was asked for."""
    preset = PRESETS[options.preset]
    for setting in options.settings or preset.settings:
        for task in options.tasks or preset.tasks:
            only = tuple(options.only)
            yield Job(options.preset, setting, task, only, options.threads, options.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--settings", nargs="+", metavar="NAME", help="all of the preset if left out")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="all of the preset if left out")
    parser.add_argument("--only", nargs="+", metavar="LABEL", default=(), help="contenders; all if left out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="sum up what is there and run nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    for job in () if options.report else jobs_of(options):
        work(job)
    every = [*jobs_of(options)]
    plot(every, options.out / f"paper_table-{options.preset}.png")
    print(table(every))


if __name__ == "__main__":
    main()
