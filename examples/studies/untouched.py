"""What do the contenders of `learning_curves.py` get on samples that no choice was held against?

    python examples/studies/untouched.py [--preset cpu] [--setting prompts] [--tasks NAME ...] [--only LABEL ...]
    python examples/studies/untouched.py --report

The test samples of the learning curves were looked at while contenders and recipes were thought up. So their final runs
(the rate that validation of seed 0 likes best, seeds 1 to 3) are made again and scored on
`auto_rate.UNTOUCHED`. Nothing is chosen here: rates are read off the stored runs by the rule that chose them, and every
run is held against the stored one (`same`: validation loss and metric, to the last digit that is stored). A calibrated
run is scored with offsets that the training samples fit, in as many forward passes; ``passes`` counts them.

Writes one line per finished run to untouched-PRESET.jsonl (for heads: untouched-PRESET-head.jsonl), headed by a line
about machine and versions. What is there is not run again; `--report` prints the table of what is there, beside the
test accuracy of the learning curves.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from auto_rate import UNTOUCHED
from curve_contenders import PRESETS, CurvePreset, Learner, learners
from curve_report import PASSES, TEST, VALIDATION
from curve_runs import Bench, learn
from learning_curves import TUNING_SEED, Record, Results, best_rate, provenance

BEFORE = {"before": False, "before, calibrated": True}
"""Rows without training, and whether offsets are fitted for them."""
FIRST = (
    "MeZO, batch 64",
    "MeZO, 7 one-sided, calibrated",
    "AdamW",
    "MeZO-SVRG",
    "MeZO-SVRG, calibrated",
    "SGD",
)
"""Contenders that run before the others."""


class Stored:
    """What `learning_curves.py` has written.

    Args:
        folder: where.
        preset: name of the preset.
        setting: of the preset.
        task: name of the data set.
    """

    def __init__(self, folder: Path, preset: str, setting: str, task: str) -> None:
        self._path = folder / f"learning_curves-{preset}-{setting}-{task}.jsonl"
        self._preset, self._setting, self._runs = PRESETS[preset], setting, Results(self._path, {})

    def has(self, learner: Learner) -> bool:
        """Whether a contender ran at all: some only ran in one of a preset's settings."""
        return any(record["label"] == learner.label for record in self._runs.runs.values())

    def run(self, learner: Learner, lr: float, seed: int) -> Record:
        """One run.

        Raises:
            ValueError: it is not there.
        """
        record = self._runs.find(learner.label, lr, seed)
        if record is None:
            what = f"no run of {learner.label!r} with rate {lr:g} and seed {seed}"
            raise ValueError(f"{self._path}: {what}; let learning_curves.py make it first")
        return record

    def rate(self, learner: Learner) -> float:
        """The rate that `learning_curves.py` chose: the same rule, on what it has stored."""
        grid = learner.rates(self._setting, self._preset)
        return best_rate(grid, lambda lr: self.run(learner, lr, TUNING_SEED))


def of_task(preset: CurvePreset, task: str) -> CurvePreset:
    """The preset with untouched samples for test samples, where a data set has some."""
    untouched = {task: UNTOUCHED[task]} if task in UNTOUCHED else {}
    return dataclasses.replace(preset, untouched=untouched, looks=0)


def study(stored: Stored, bench: Bench, task: str, only: Sequence[str], results: Results) -> None:
    """All runs on one data set that are not done yet."""
    seeds = bench.preset.seeds
    for name, calibrated in BEFORE.items():
        if results.find(f"{name}, {task}", 0.0, seeds[0]) is None:
            bench.reset(seeds[0])
            passes = bench.num_train if calibrated else 0
            scores = [round(value, 4) for value in bench.scores(calibrated=calibrated)]
            about = {"label": f"{name}, {task}", "lr": 0.0, "seed": seeds[0], "passes": passes}
            results.add({"kind": "run", **about, "validation": scores[:2], "untouched": scores[2:]})
    every = learners(bench.preset, bench.num_train)
    every = [c for c in every if (c.label in only if only else stored.has(c))]
    for learner in sorted(every, key=lambda c: FIRST.index(c.label) if c.label in FIRST else len(FIRST)):
        lr = stored.rate(learner)
        for seed in seeds:
            if results.find(f"{learner.label}, {task}", lr, seed) is None:
                again = again_of(stored.run(learner, lr, seed), bench, learner)
                results.add({"kind": "run", "label": f"{learner.label}, {task}", "lr": lr, "seed": seed, **again})
                print({"label": f"{learner.label}, {task}", "lr": lr, "seed": seed, **again}, flush=True)


def again_of(first: Record, bench: Bench, learner: Learner) -> Record:
    """A stored run, made again: passes, loss and metric on validation and untouched samples, what is stored, and
    whether it is the same run."""
    record = learn(bench, learner, first["lr"], first["seed"])
    end, then = record["points"][-1], first["points"][-1]
    validation = slice(VALIDATION - 1, VALIDATION + 1)
    return {
        "passes": end[PASSES] + record["fitting"],
        "validation": end[validation],
        "untouched": end[TEST - 1 : TEST + 1],
        "diverged": record["diverged"],
        "same": end[PASSES] == then[PASSES] and end[validation] == then[validation],
        "stored": {"validation": then[validation], "test": then[TEST - 1 : TEST + 1]},
    }


def table(results: Results, tasks: Sequence[str]) -> str:
    """Accuracy on untouched samples, and the test accuracy of the learning curves, in Markdown."""
    head = "".join(f" {task}: untouched | older test |" for task in tasks)
    lines = [f"| |{head}", "| --- " * (1 + 2 * len(tasks)) + "|"]
    cells: dict[str, dict[str, list[Record]]] = {}
    for row in results.runs.values():
        label, task = row["label"].rsplit(", ", 1)
        cells.setdefault(label, {}).setdefault(task, []).append(row)
    for label, of_tasks in cells.items():
        columns = []
        for rows in (of_tasks.get(task, []) for task in tasks):
            columns.append(_spread([row["untouched"][1] for row in rows]))
            columns.append(_spread([row["stored"]["test"][1] for row in rows if "stored" in row]))
        lines.append(f"| {label} | {' | '.join(columns)} |")
    again = [row["same"] for row in results.runs.values() if "same" in row]
    return "\n".join([*lines, "", f"{sum(again)} of {len(again)} runs are the stored ones, to the last digit."])


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--setting", choices=("prompts", "head"), default="prompts")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="all of the preset if left out")
    parser.add_argument("--only", nargs="+", metavar="LABEL", default=(), help="contenders; all if left out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="sum up what is there and run nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder, of both studies")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    preset = PRESETS[options.preset]
    tasks = options.tasks or list(preset.tasks)
    about = provenance(f"a process with {options.threads} thread(s)", str(list(preset.seeds)))
    columns = "validation, untouched, stored: loss, metric; passes: with those that fit offsets"
    which = options.preset + ("-head" if options.setting == "head" else "")
    results = Results(options.out / f"untouched-{which}.jsonl", {**about, "columns": columns})
    for task in () if options.report else tasks:
        stored = Stored(options.out, options.preset, options.setting, task)
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench.open(of_task(preset, task), options.setting, task, Path(folder))
            study(stored, bench, task, options.only, results)
    print(table(results, tasks))


if __name__ == "__main__":
    main()
