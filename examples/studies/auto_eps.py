"""What does ``eps: auto`` choose, and how wrong are projected gradients at each eps?

    python examples/studies/auto_eps.py [--kinds NAME ...] [--batches 4]

For every kind of weights (`KINDS`), minibatches of training samples and `DIRECTIONS` directions each, the projected
gradients at every eps of the ladder are held against the exact ones: those of the gradient by back-propagation in
float32, at the same weights. (The checkpoint has bfloat16 weights, so float32 holds the same.) The error is the root
mean square of the difference over that of the exact ones. What the rule of `mezo_dist.algorithms.auto_eps` would
choose, it chooses from the same losses, by the first four directions (all, if one-sided), without the exact ones.

Writes one line per kind and minibatch to auto_eps.jsonl, after a line about machine and versions, and prints a table.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from auto_rate import ALL, LORA
from estimator_quality import ROOT, trainable
from learning_curves import provenance

from mezo_dist.algorithms import auto_eps
from mezo_dist.algorithms.base import Evaluation, Losses, Variant
from mezo_dist.algorithms.first_order import SGD
from mezo_dist.algorithms.spsa import Probe
from mezo_dist.baselines.optimizer import WeightOptimizer
from mezo_dist.config import reader
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.seeds import derive_seed, param_ids
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.runs.build import Run, build_run
from mezo_dist.runs.gradients import Gradients
from mezo_dist.tasks.batches import MicroBatch
from mezo_dist.testing import write_tiny_config

DIRECTIONS = 7
BF16 = ("model.weights=bfloat16",)
PLAIN = ("train.calibrate=false",)
KINDS: dict[str, tuple[str, ...]] = {
    "tiny": (),
    "norms": (),
    "norms, plain losses": PLAIN,
    "norms, bfloat16": BF16,
    "norms, plain losses, bfloat16": (*PLAIN, *BF16),
    "LoRA": LORA,
    "LoRA, bfloat16": (*LORA, *BF16),
    "all weights": ALL,
    "all weights, bfloat16": (*ALL, *BF16),
}
"""Overrides of configs/quickstart.yaml. The first one: a tiny random model, to try this script."""


def opened(kind: str, folder: Path, overrides: Sequence[str]) -> Run:
    """Model, data and engine."""
    if kind == "tiny":
        return build_run(reader.load(write_tiny_config(folder), [*overrides]), Communicator())
    sizes = ("task.splits.train.size=128", "task.splits.validation.size=16", "task.splits.test.size=16")
    few = ("train.max_tokens=48", "train.batch_size=16", f"output.dir={folder / 'run'}")
    config = reader.load(ROOT / "configs/quickstart.yaml", ["algorithm.lr=1e-3", *sizes, *few, *overrides])
    return build_run(config, Communicator())


def exact(run: Run, batch: Sequence[MicroBatch], seeds: Sequence[int]) -> list[float]:
    """The gradient's projections on directions, by back-propagation."""
    run.engine.optimizer = optimizer = WeightOptimizer(run.engine, SGD())
    gradients = Gradients(run.evaluator, optimizer, run.config.train.calibrate, recompute=False)
    gradients.losses(batch, ("exact",))
    weights = dict(trainable(run))
    ids, projections = param_ids(weights), [0.0] * len(seeds)
    for name, weight in weights.items():
        if weight.grad is None:
            continue
        for k, seed in enumerate(seeds):
            z = torch.zeros(weight.shape)
            run.engine.law.add(z, [Combination.single(seed, 1.0)], [z], param_id=ids[name], shape=z.shape)
            projections[k] += float((z.double() * weight.grad.double()).sum())
    optimizer.forget_gradients()
    return projections


def error(projected: Sequence[float], right: Sequence[float]) -> float:
    """Root mean square of the difference, over that of the right ones."""
    return math.dist(projected, right) / math.hypot(*right)


def measure(run: Run, reference: Run, place: int) -> dict[str, Any]:
    """One minibatch."""
    batch = run.batch("minibatch", place)
    seeds = tuple(derive_seed(0, "auto_eps", place, k) for k in range(DIRECTIONS))
    right = exact(reference, reference.batch("minibatch", place), seeds)
    base = run.evaluator.losses(Evaluation((Variant(),)), batch, ("base", place))
    assert base is not None
    rows: dict[bool, list[list[float]]] = {False: [], True: []}
    for eps in auto_eps.LADDER:
        losses = run.evaluator.losses(Probe(seeds, eps).evaluation(), batch, (place, eps))
        assert losses is not None
        rows[False] += Probe(seeds, eps).projected(losses)
        one_sided = Losses((*losses.mean[0::2], base.mean[0]))
        rows[True] += Probe(seeds, eps, one_sided=True).projected(one_sided)
    record: dict[str, Any] = {"exact": right}
    smallest = run.problem.eps or auto_eps.LADDER[0]
    for is_one_sided, name in ((False, "two-sided"), (True, "one-sided")):
        judged = [row if is_one_sided else row[: auto_eps.DIRECTIONS] for row in rows[is_one_sided]]
        sizes = [eps for eps in auto_eps.LADDER if eps >= smallest]
        judged = judged[-len(sizes) :]
        number = next((n for n in range(1, len(sizes)) if auto_eps.is_too_bent(judged[:n])), len(sizes))
        choice = auto_eps.choose_eps(sizes[:number], judged[:number], one_sided=is_one_sided)
        errors = [float(f"{error(row, right):.3g}") for row in rows[is_one_sided]]
        record[name] = {
            "climbed": number,
            "errors": errors,
            "smallest": smallest,
            **vars(choice),
            "projected": rows[is_one_sided],
        }
    return record


def table(records: Sequence[dict[str, Any]]) -> str:
    """Errors at each eps, as means over minibatches, and what was chosen, in Markdown."""
    head = f"| weights, estimates | {' | '.join(f'{eps:g}' for eps in auto_eps.LADDER)} | rounding allows | chosen |"
    lines = [head, "|---" * (len(auto_eps.LADDER) + 3) + "|"]
    for kind in dict.fromkeys(record["label"] for record in records):
        for name in ("two-sided", "one-sided"):
            some = [record[name] for record in records if record["label"] == kind]
            means = [sum(column) / len(some) for column in zip(*(one["errors"] for one in some), strict=True)]
            chosen = ", ".join(f"{one['eps']:g}" for one in some)
            cells = " | ".join(f"{100 * mean:.2g}" for mean in means)
            lines.append(f"| {kind}, {name} | {cells} | {some[0]['smallest']:g} | {chosen} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[kind for kind in KINDS if kind != "tiny"])
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path, records = options.out / "auto_eps.jsonl", list[dict[str, Any]]()
    head = {"kind": "about", **provenance("a process with 1 thread", "0; minibatches and directions by number")}
    with path.open("a") as sink:
        sink.write(json.dumps(head) + "\n")
        for kind in options.kinds:
            with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
                run = opened(kind, Path(one), [*KINDS[kind], "algorithm.eps=auto"])
                in_fp32 = [*KINDS[kind], "model.weights=float32", "algorithm.eps=auto"]
                reference = opened(kind, Path(other), in_fp32)
                for number in range(options.batches):
                    record = {"kind": "batch", "label": kind, "batch": number, **measure(run, reference, number)}
                    sink.write(json.dumps(record) + "\n")
                    sink.flush()
                    records.append(record)
    print(table(records))


if __name__ == "__main__":
    main()
