"""Does a model that learnt without calibrated losses gain from offsets of the classes when it predicts?

    python examples/studies/offsets_at_prediction.py [--tasks NAME ...] [--only LABEL ...]

Contenders of `learning_curves.py` (preset `cpu`, prompts) with plain losses run again, with the rates that they were
given there and from the same seeds. At the end each is scored twice: as it is, and with the offsets that minimise the
loss of the training samples, as a calibrated run is scored (`mezo_dist.objectives.calibration`), on validation samples
and on `auto_rate.UNTOUCHED`, which no choice was held against. Nothing is chosen.

Writes one line per finished run to offsets_at_prediction.jsonl, headed by a line about machine and versions: loss and
metric, without and with offsets, and the validation metric that the run had in `learning_curves.py`. What is there is
not run again.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from curve_contenders import PRESETS, learners
from curve_report import VALIDATION
from curve_runs import Bench, learn
from learning_curves import Record, Results, provenance
from untouched import of_task

LABELS = ("AdamW", "MeZO, 7 one-sided", "MeZO, batch 64", "MeZO, 16 directions")
SETTING = "prompts"


def final_runs(folder: Path, preset: str, task: str, label: str) -> list[Record]:
    """What `learning_curves.py` has stored: the runs of a contender with the rate that was chosen."""
    stored = Results(folder / f"learning_curves-{preset}-{SETTING}-{task}.jsonl", {})
    return [run for (name, _, seed), run in stored.runs.items() if name == label and seed in PRESETS[preset].seeds]


def study(out: Path, preset: str, task: str, labels: list[str], results: Results) -> None:
    """All runs on one data set that are not done yet; ``out``: where those of `learning_curves.py` are."""
    chosen = PRESETS[preset]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench.open(of_task(chosen, task), SETTING, task, Path(folder))
        for learner in (c for c in learners(chosen, bench.num_train) if c.label in labels):
            for stored in final_runs(out, preset, task, learner.label):
                key = f"{learner.label}, {task}", stored["lr"], stored["seed"]
                if results.find(*key) is not None:
                    continue
                learn(bench, learner, stored["lr"], stored["seed"])
                row = dict(zip(("label", "lr", "seed"), key, strict=True))
                row |= {"kind": "run", "stored": stored["points"][-1][VALIDATION]}
                row |= {
                    name: [round(value, 4) for value in bench.scores(calibrated=calibrated)]
                    for name, calibrated in {"plain": False, "offsets": True}.items()
                }
                results.add(row)
                print({**row, "plain": row["plain"][-1], "offsets": row["offsets"][-1]}, flush=True)


def table(results: Results) -> str:
    """Means and standard deviations of accuracy over seeds: of validation samples, then and now; of untouched ones."""
    lines = ["| | validation: stored | again | untouched: plain | with offsets |", "| --- | --- | --- | --- | --- |"]
    for label in dict.fromkeys(row["label"] for row in results.runs.values()):
        rows = [row for row in results.runs.values() if row["label"] == label]
        untouched = ([row[name][-1] for row in rows] for name in ("plain", "offsets"))
        columns = ([row["stored"] for row in rows], [row["plain"][1] for row in rows], *untouched)
        lines.append(f"| {label} | {' | '.join(_spread(column) for column in columns)} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * deviation:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="all of the preset if left out")
    parser.add_argument("--only", nargs="+", metavar="LABEL", default=LABELS, help="contenders")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    preset = PRESETS[options.preset]
    about = provenance(f"a process with {options.threads} thread(s)", str(list(preset.seeds)))
    columns = "plain and offsets: validation loss and metric, the same of untouched samples; stored: validation metric"
    results = Results(options.out / "offsets_at_prediction.jsonl", {**about, "columns": columns})
    for task in options.tasks or preset.tasks:
        study(options.out, options.preset, task, list(options.only), results)
    print(table(results))


if __name__ == "__main__":
    main()
