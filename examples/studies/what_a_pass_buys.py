"""What does a forward pass buy, for which weights? Theory from four measured numbers, held against short runs.

    python examples/studies/what_a_pass_buys.py [--tasks NAME ...] [--kinds NAME ...]

The best step along the mean of K one-sided directions lowers the loss by (docs/why.md)

    |g|^2 K / (2 h (1 + noise)),     noise = E|g_B - g|^2 / |g|^2 of batches of B,  h = the mean curvature z'Hz

at the rate K / (h (1 + noise)), for B (K + 1) forward passes of one sample. Measured before any training, for several
kinds of weights: the gradient g of the loss of all training samples and those of `BATCHES` batches, by
back-propagation, and h along directions, as `lr: auto` measures it. Then `STEPS` steps with this very rate and the
schedule of all studies, from `SEEDS`: what they did to the loss of the training samples stands beside what was
predicted for them.

Writes one line per kind and data set to what_a_pass_buys.jsonl; what is there is not run again, `--report` prints it.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from curve_contenders import MINILM, TASKS, CurvePreset, Learner, Setting, rounded, schedule
from curve_runs import Bench, learn
from estimator_quality import trainable
from learning_curves import Record, Results, provenance
from torch import Tensor
from torch.nn.functional import cross_entropy

from mezo_dist.algorithms import build
from mezo_dist.algorithms.base import Problem
from mezo_dist.algorithms.mezo import MeZO
from mezo_dist.objectives.calibration import best_offsets
from mezo_dist.runs.build import Run
from mezo_dist.runs.training import evaluate_step
from mezo_dist.tasks.batches import MicroBatch

BATCH, DIRECTIONS, BATCHES, STEPS, SEEDS = 16, 7, 60, 64, (1, 2, 3)
EPS, CURVATURES = 1e-2, 10
SETTINGS = {
    "prompt: two norms": Setting(()),
    "prompt: last MLP": Setting(('model.trainable=["model.layers.29.mlp.*"]',)),
    "head: classifier alone": Setting((*MINILM, 'model.trainable=["classifier.*"]')),
    "head: last norm and classifier": Setting(
        (*MINILM, 'model.trainable=["bert.encoder.layer.5.output.LayerNorm.*", "classifier.*"]')
    ),
    "head: pooler and classifier": Setting((*MINILM, 'model.trainable=["bert.pooler.*", "classifier.*"]')),
    "head: all weights": Setting((*MINILM, 'model.trainable=["*"]')),
}
PRESET = CurvePreset(
    SETTINGS,
    TASKS,
    budget=STEPS * BATCH * (DIRECTIONS + 1),
    eps=EPS,
    sizes={"validation": 8, "test": 512},
    max_tokens={"movie-sentences": 48, "tweets": 48, "bbc-news": 24},
    batch_size=BATCH,
    looks=1,
)
TINY = CurvePreset(SETTINGS, {"tiny": "tiny"}, budget=0, eps=EPS, batch_size=BATCH, looks=1)
"""Made-up sentences and a tiny random model, to try this script."""


def gradient(run: Run, batch: Sequence[MicroBatch]) -> Tensor:
    """fp32 [weights]: the gradient of the mean calibrated loss of a batch, at the offsets that fit it best (they
    minimise the loss, so that they do not count)."""
    parameters = [p for _, p in trainable(run)]
    with torch.no_grad():
        payloads = [run.evaluator.forward(run.pretrained.model, item).payload for item in batch]
    labels = [item.targets["label"] for item in batch]
    offsets = best_offsets(torch.cat(payloads).double(), torch.cat(labels)).float()
    total, n = torch.zeros(sum(p.numel() for p in parameters)), sum(map(len, labels))
    for item, label in zip(batch, labels, strict=True):
        logits = run.evaluator.forward(run.pretrained.model, item).payload
        loss = cross_entropy(logits + offsets, label, reduction="sum") / n
        parts = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        total += torch.cat([part.flatten() for part in parts])
    return total


def measured(bench: Bench) -> dict[str, float]:
    """The numbers that the theory asks for, at the weights that runs begin with."""
    bench.reset(SEEDS[0])
    run = bench.under("gaussian", calibrated=True)
    g = gradient(run, run.split("train"))
    square = float(g.double().square().sum())
    errors = [float((gradient(run, run.batch("minibatch", k)) - g).double().square().sum()) for k in range(BATCHES)]
    settings = MeZO(lr="auto", eps=EPS, directions=DIRECTIONS, one_sided=True)
    curvatures = []
    for seed in range(CURVATURES):
        planner = build("mezo", settings, Problem(seed, CURVATURES, BATCH, bench.num_train))
        result, _ = evaluate_step(dataclasses.replace(run, algorithm=planner), planner.init(), seed)
        assert result.update is not None
        curvatures.append(result.update.metrics["rate/curvature"])
    return {
        "weights": g.numel(),
        "g2": square,
        "noise": statistics.mean(errors) / square,
        "curvature": statistics.mean(curvatures),
    }


def work(kind: str, task: str, folder: Path) -> Record:
    """The numbers, what they predict, and what runs did."""
    preset = TINY if task in TINY.tasks else PRESET
    bench = Bench.open(preset, kind, task, folder)
    bench.splits = {name: bench.run.split(name) for name in ("train", "test")}
    numbers = measured(bench)
    rate = DIRECTIONS / numbers["curvature"] / (1 + numbers["noise"])
    gain = numbers["g2"] * rate / 2
    parts = [schedule(STEPS).factor(step, STEPS) for step in range(STEPS)]
    predicted = gain * sum(2 * part - part**2 for part in parts)  # a step at a part of the best rate

    def mezo(lr: float, steps: int, eps: float) -> MeZO:
        return MeZO(lr=lr, eps=eps, directions=DIRECTIONS, one_sided=True, schedule=schedule(steps))

    learner = Learner(kind, mezo, BATCH * (DIRECTIONS + 1), {}, BATCH, calibrated=True)
    bench.budget = STEPS * learner.passes
    falls, tests = [], []
    for seed in SEEDS:
        first, *_, last = learn(bench, learner, rate, seed)["points"]
        falls.append(first[2] - last[2])
        tests.append(last[5])
    return numbers | {
        "rate": rounded(rate),
        "passes for 0.1": 0.1 / gain * learner.passes,
        "predicted": predicted,
        "falls": falls,
        "test": tests,
    }


def table(rows: Sequence[Record]) -> str:
    """In Markdown."""
    head = "| weights | data | number | gradient^2 | curvature | r | rate | passes for 0.1 of loss | predicted fall "
    lines = [head + f"| fall in {STEPS} steps | test accuracy |", "|---" * 11 + "|"]
    for row in rows:
        kind, task = row["label"].rsplit(", ", 1)
        falls, tests = ([scale * v for v in row[name]] for name, scale in (("falls", 1), ("test", 100)))
        columns = [
            *(kind, task, f"{row['weights']:,}", f"{row['g2']:.2g}", f"{row['curvature']:.2g}"),
            *(f"{BATCH * row['noise']:.0f}", f"{row['rate']:g}", f"{row['passes for 0.1']:,.0f}"),
            f"{row['predicted']:.3f}",
            *(f"{statistics.mean(v):.{d}f} ± {statistics.stdev(v):.{d}f}" for v, d in ((falls, 3), (tests, 1))),
        ]
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=[*TASKS, *TINY.tasks], default=list(TASKS))
    parser.add_argument("--kinds", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="sum up what is there and run nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    about = provenance(f"{options.threads} thread(s)", f"{list(SEEDS)}")
    results, rows = Results(options.out / "what_a_pass_buys.jsonl", about), []
    for kind in options.kinds:
        for task in options.tasks:
            label = f"{kind}, {task}"
            if (row := results.find(label, 0, 0)) is None and not options.report:
                with tempfile.TemporaryDirectory() as folder:
                    row = {"kind": "run", "label": label, "lr": 0, "seed": 0, **work(kind, task, Path(folder))}
                results.add(row)
                print(row, flush=True)
            rows += [row] if row is not None else []
    print(table(rows))


if __name__ == "__main__":
    main()
