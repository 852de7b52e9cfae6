"""Which learning rate should the recipes in configs/ have, and what do they give? Validation says, then test.

    python examples/studies/recipes.py accuracy choice completion reward

Runs of configs/NAME.yaml as it stands, with other rates. Every rate of a recipe's grid runs from its tuning seeds
(`--tuning-seeds`), and is scored on the validation split. The rate with the best mean figure there (and among equals
the lowest mean loss) runs from the seeds `SEEDS`; each of these runs is scored on the test split, and so is the model
before training. So is ``lr: auto`` from these seeds, for which nothing is chosen. Nothing is chosen on the test split.
All runs of a recipe share one process, and with it what is remembered of frozen blocks: ``cpu_s``, the processor time
of a run, holds the computing of that in the first run alone.

Writes one line per finished run to recipes.jsonl, headed by a line about machine and versions. What is there is not run
again, so the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from curve_contenders import rounded
from estimator_quality import ROOT, put, trainable
from learning_curves import Record, Results, provenance
from quickstart_rate import Study

from mezo_dist.config import reader
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.objectives.rewards.judge import judging
from mezo_dist.runs.build import build_run
from mezo_dist.testing import write_tiny_config

SEEDS = (0, 1, 2)
GRIDS = {
    "accuracy": (0.01, 0.03, 0.1),
    "choice": (0.03, 0.1, 0.3),
    "completion": (0.03, 0.1, 0.3),
    "reward": (0.15, 0.3, 0.6),
    "lora": (0.003, 0.01, 0.03),
    "tiny": (0.001, 0.01),
}
"""Recipe -> its rates. ``tiny`` is a tiny job, to try this script."""


def scores(study: Study, split: str) -> dict[str, float]:
    """Loss and main figure of the current weights."""
    run = study.run
    result = run.evaluator.score(run.split(split), run.kind.summarise, lambda _: None)
    return {name: round(result[name], 4) for name in ("loss", run.config.task.metric)}


AUTO = "auto"
"""Kind of the runs of ``lr: auto``."""


def record(study: Study, results: Results, label: str, lr: float, seed: int, split: str) -> Record:
    """One run with its scores, from the file if it is there.

    Args:
        study: model and data.
        results: the file.
        label: of the runs; it ends in `AUTO` for ``lr: auto``.
        lr: learning rate; 0: ``lr: auto``, or the model before training.
        seed: of the run.
        split: what is scored.
    """
    if (done := results.find(label, lr, seed)) is not None:
        return done
    started, is_auto = time.process_time(), label.endswith(AUTO)
    if lr or is_auto:
        steps = study.train(AUTO if is_auto else lr, seed)
    else:
        steps = 0
        put(study.run, study.start)
    seconds = round(time.process_time() - started, 1)
    row = {"kind": "run", "label": label, "lr": rounded(lr), "seed": seed, "steps": steps, "cpu_s": seconds}
    row |= {
        "diverged": (bool(lr) or is_auto) and steps < study.run.config.train.steps,
        "scores": {split: scores(study, split)},
    }
    results.add(row)
    print({name: row[name] for name in ("label", "lr", "seed", "cpu_s", "scores")}, flush=True)
    return row


def value(study: Study, rows: list[Record]) -> tuple[float, float]:
    """What a rate is chosen by: mean figure of merit and loss on validation; one that diverged comes last."""
    if any(row["diverged"] for row in rows):
        return (-float("inf"), 0.0)
    figures = [row["scores"]["validation"] for row in rows]
    merits, losses = ([one[name] for one in figures] for name in (study.run.config.task.metric, "loss"))
    return (statistics.mean(merits), -statistics.mean(losses))


def chosen(
    study: Study, results: Results, name: str, rates: list[float], tuning_seeds: list[int], seeds: list[int]
) -> list[Record]:
    """The runs of the rate that validation likes best.

    Args:
        study: model and data.
        results: the file.
        name: of the recipe.
        rates: the grid.
        tuning_seeds: to choose the rate.
        seeds: of the runs that are scored.
    """
    label = f"{name}, to choose"
    tried = {lr: [record(study, results, label, lr, seed, "validation") for seed in tuning_seeds] for lr in rates}
    best = max(tried, key=lambda lr: value(study, tried[lr]))
    print(f"{name}: validation chose {best:g}", flush=True)
    return [record(study, results, f"{name}, chosen", best, seed, "test") for seed in seeds]


def learn(
    name: str, results: Results, overrides: list[str], rates: list[float], tuning_seeds: list[int], seeds: list[int]
) -> None:
    """All runs of a recipe.

    Args:
        name: of the recipe.
        results: the file.
        overrides: settings other than the config's.
        rates: the grid; empty: ``lr: auto`` alone.
        tuning_seeds: to choose the rate.
        seeds: of the runs that are scored.
    """
    with tempfile.TemporaryDirectory() as folder:
        tiny = name == "tiny"
        path = write_tiny_config(Path(folder), algorithm="mezo") if tiny else ROOT / "configs" / f"{name}.yaml"
        config = reader.load(path, [f"output.dir={folder}/run", *overrides])
        comm = Communicator()
        with judging(config, comm) as judge:
            run = build_run(config, comm, judge=judge)
            study = Study(run, {name: p.detach().clone() for name, p in trainable(run)})
            record(study, results, f"{name}, before", 0.0, 0, "test")
            kinds = {AUTO: [record(study, results, f"{name}, {AUTO}", 0.0, seed, "test") for seed in seeds]}
            metric = run.config.task.metric
            if rates:
                kinds["chosen"] = chosen(study, results, name, rates, tuning_seeds, seeds)
    for kind, rows in kinds.items():
        for figure in dict.fromkeys(("loss", metric)):
            values = [row["scores"]["test"][figure] for row in rows]
            spread = f"{statistics.mean(values):.4f} +- {statistics.stdev(values):.4f}"
            print(f"{name}, {kind}: test {figure} {spread}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", choices=GRIDS, help="names of configs")
    parser.add_argument("--rates", nargs="+", type=float, help="in place of the recipe's grid")
    parser.add_argument("--auto-alone", action="store_true", help="runs of lr: auto, and no grid")
    parser.add_argument("--tuning-seeds", nargs="+", type=int, default=[3], help="seeds to choose the rate")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="of the runs that are scored on test")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings other than the config's")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    seeds = f"{options.tuning_seeds} to choose the rate, then {tuple(options.seeds)}"
    about = provenance(f"a process with {options.threads} thread(s)", seeds)
    results = Results(options.out / "recipes.jsonl", {**about, "scores": "loss and main figure of a split"})
    for name in options.recipes:
        rates = [] if options.auto_alone else options.rates or list(GRIDS[name])
        learn(name, results, options.set, rates, options.tuning_seeds, options.seeds)


if __name__ == "__main__":
    main()
