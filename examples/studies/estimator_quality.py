"""How far from the gradient are the estimates of each algorithm, at equal numbers of forward passes?

    python examples/studies/estimator_quality.py [--preset small] [--budget 1.25] [--estimates N] [--only LABEL ...]

At a few points on the way of AdamW (full batch, by back-propagation), the gradient g of the mean loss of all n training
samples is computed; then every contender takes steps from that point, many times over, with other directions and other
batches. Batch sizes are chosen so that all contenders spend the same on a step: --budget times n forward passes of one
sample, on average over a cycle (an anchor step and its inner steps). 1.25 is what the paper spends with q = 2, 512
samples and batches of 64. Contenders that a budget does not allow are left out.

For the estimates v of all steps of a cycle, against the gradients g where they were made:

    error       E|v - g|^2 / |g|^2
    best_error  E|v|^2 |g|^2 / E[v.g]^2 - 1     the same for the best multiple of v, for learning rates are tuned; equal
                                                to `error` where v is unbiased
    run_error   best_error of the sum of a cycle's estimates, times their number. Independent estimates average out over
                a run, and have run_error = best_error; those that share an anchor err alike, and do not. This is what
                counts for many small steps.

Writes estimator_quality-PRESET-BUDGET.json and .png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from contenders import PRESETS, Contender, Preset, contenders
from torch import Tensor
from torch.nn.functional import cross_entropy

import mezo_dist
from mezo_dist import algorithms
from mezo_dist.algorithms.base import Problem
from mezo_dist.config import reader
from mezo_dist.config.schema import RunConfig
from mezo_dist.directions.combination import ZERO, Combination
from mezo_dist.directions.seeds import param_id
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.runs.build import Run, build_run
from mezo_dist.runs.training import apply_step, evaluate_step
from mezo_dist.tasks.batches import BatchOrder
from mezo_dist.testing import write_tiny_config, write_tiny_data

ROOT = Path(__file__).parents[2]
Vector = dict[str, Tensor]


def open_run(preset: Preset, law: str, folder: Path, *, rank: int = 1, calibrated: bool = False) -> Run:
    """Model, data and engine of a preset, under one law, with such losses."""
    sizes = [f"task.splits.train.size={preset.num_samples}", "task.splits.validation.size=8", "task.splits.test.size=8"]
    overrides = [*preset.overrides, *sizes, f"law={law}", f"output.dir={folder / 'run'}", "train.full_size=null"]
    if preset.config == "tiny":
        path = write_tiny_config(folder / law, algorithm="mezo")
        write_tiny_data(folder / law / "data.jsonl", num_rows=preset.num_samples + 16)
    else:
        path = ROOT / preset.config
        # Settings of the config's own algorithm must not stand in the way; ours are made below.
        overrides += ["algorithm.per_sample=false"]
    overrides += [f"train.calibrate={str(calibrated).lower()}", f"direction_rank={rank}"]
    config: RunConfig = reader.load(path, overrides)
    return build_run(config, Communicator())


def trainable(run: Run) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Name and parameter."""
    return ((name, p) for name, p in run.pretrained.model.named_parameters() if p.requires_grad)


def put(run: Run, weights: Vector) -> None:
    """Make these the model's weights. (A study may: in the package, `Engine.apply` alone writes to them.)"""
    with torch.no_grad():
        for name, parameter in trainable(run):
            parameter.copy_(weights[name])


def gradient(run: Run) -> Vector:
    """The gradient of the loss of all training samples, by back-propagation."""
    names, parameters = zip(*trainable(run), strict=True)
    total = [torch.zeros_like(p) for p in parameters]
    batch = run.split("train")
    # By the envelope theorem, the gradient of a calibrated loss is that at its offsets.
    offsets = run.fitted_offsets(batch).offsets if run.config.train.calibrate else 0.0
    for item in batch:
        logits = run.evaluator.forward(run.pretrained.model, item).payload
        loss = cross_entropy(logits + offsets, item.targets["label"], reduction="sum")
        for sum_, part in zip(total, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if part is not None:
                sum_ += part
    num_samples = sum(len(item.slots) for item in batch)
    return {name: part / num_samples for name, part in zip(names, total, strict=True)}


def way_of_adamw(run: Run, lr: float, points: tuple[int, ...]) -> dict[int, Vector]:
    """Weights after so many full-batch steps."""
    optimiser = torch.optim.AdamW([p for _, p in trainable(run)], lr=lr, weight_decay=0.0)
    weights_at = {}
    for step in range(max(points) + 1):
        g = gradient(run)
        if step in points:
            weights_at[step] = {name: p.detach().clone() for name, p in trainable(run)}
        for name, parameter in trainable(run):
            parameter.grad = g[name]
        optimiser.step()
    return weights_at


def dot(a: Vector, b: Vector) -> float:
    """Inner product, summed in fp64."""
    return sum(float(a[name].double().flatten() @ b[name].double().flatten()) for name in a)


def vector(run: Run, combination: Combination) -> Vector:
    """A combination as weights."""
    total = {name: torch.zeros_like(p) for name, p in trainable(run)}
    for name, tensor in total.items():
        run.engine.law.add(tensor, [combination], [tensor], param_id=param_id(name), shape=tensor.shape)
    return total


@dataclass
class Moments:
    """Sums over estimates v of gradients g, in units of |g|^2."""

    number: int = 0
    vv: float = 0.0
    vg: float = 0.0

    def add(self, v: Vector, g: Vector) -> None:
        """Count one more."""
        gg = dot(g, g)
        self.number, self.vv, self.vg = self.number + 1, self.vv + dot(v, v) / gg, self.vg + dot(v, g) / gg

    @property
    def error(self) -> float:
        """E|v - g|^2 / |g|^2."""
        return (self.vv - 2 * self.vg) / self.number + 1

    @property
    def best_error(self) -> float:
        """The least of the errors of all multiples of v."""
        return self.vv * self.number / self.vg**2 - 1


def measure(run: Run, contender: Contender, start: Vector, draws: int) -> dict[str, float]:
    """Errors of a contender's estimates around one point; see the head of this file."""
    began, passes, n = time.perf_counter(), 0, len(run.splits["train"])
    single, cycle = Moments(), Moments()
    put(run, start)
    at_start = gradient(run)
    for draw in range(draws):
        problem = Problem(draw, contender.before + contender.cycle, contender.batch_size, n)
        planner = algorithms.build(contender.algorithm.name, contender.algorithm, problem)
        order, full_order = BatchOrder(n, contender.batch_size, draw), BatchOrder(n, n, draw)
        mine = dataclasses.replace(run, algorithm=planner, order=order, full_order=full_order)
        put(run, start)
        state, sum_v, sum_g = planner.init(), vector(run, ZERO), vector(run, ZERO)
        for step in range(problem.num_steps):
            result, forwards = evaluate_step(mine, state, step)
            update = result.update
            assert update is not None, result.skipped
            if step >= contender.before:
                g = gradient(run) if step else at_start
                v = vector(run, update.combination * (-1 / update.metrics["lr"]))
                single.add(v, g)
                for name in v:
                    sum_v[name] += v[name]
                    sum_g[name] += g[name]
            passes += forwards
            apply_step(mine, result)
            state = update.state
        cycle.add(sum_v, sum_g)
    return {
        "error": single.error,
        "best_error": single.best_error,
        "run_error": contender.cycle * cycle.best_error,
        "passes_per_step": passes / draws / problem.num_steps,
        "batch_size": contender.batch_size,
        "cycles": draws,
        "seconds": round(time.perf_counter() - began, 1),
    }


def study(preset: Preset, chosen: list[Contender], estimates: int, folder: Path) -> tuple[list[dict[str, Any]], int]:
    """All contenders at all points, and the number of weights."""
    rows: list[dict[str, Any]] = []
    points: dict[int, Vector] = {}
    size = 0
    for law, rank, calibrated in dict.fromkeys((c.law, c.rank, c.calibrated) for c in chosen):
        run = open_run(preset, law, folder, rank=rank, calibrated=calibrated)
        size = sum(p.numel() for _, p in trainable(run))
        points = points or way_of_adamw(run, preset.adamw_lr, preset.points)
        for point, weights in points.items():
            put(run, weights)
            norm = dot(g := gradient(run), g) ** 0.5
            for contender in (c for c in chosen if (c.law, c.rank, c.calibrated) == (law, rank, calibrated)):
                measured = measure(run, contender, weights, contender.draws(estimates))
                rows.append({"label": contender.label, "law": law, "point": point, "gradient_norm": norm, **measured})
                figures = "  ".join(f"{name} {measured[name]:9.4g}" for name in ("error", "best_error", "run_error"))
                passes = f"{measured['passes_per_step']:6.1f} passes a step"
                print(
                    f"AdamW {point:3}  {contender.label:38} {figures}  {passes}  {measured['seconds']:5.1f} s",
                    flush=True,
                )
    return rows, size


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars: run error of every contender at every point."""
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(row["label"] for row in result["rows"]))[::-1]
    points = list(dict.fromkeys(row["point"] for row in result["rows"]))
    figure = Figure(figsize=(9, 1 + 0.4 * len(labels)), layout="constrained")
    axes = figure.subplots()
    for k, point in enumerate(points):
        errors = {row["label"]: row["run_error"] for row in result["rows"] if row["point"] == point}
        height = 0.8 / len(points)
        places = [y + 0.4 - height * (k + 0.5) for y in range(len(labels))]
        axes.barh(places, [errors[label] for label in labels], height, label=f"after {point} steps of AdamW")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xscale("log")
    axes.set_xlabel("run_error: squared error over the gradient's square, per step (less is better)")
    axes.set_title(
        f"{result['preset']}: {result['weights']:,} weights, {result['samples']} samples, equal forward passes"
    )
    axes.legend()
    figure.savefig(path, dpi=120)


def processor() -> str:
    """Its name, where Linux says it."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--budget", type=float, default=1.25, help="forward passes per step, over the training samples")
    parser.add_argument("--estimates", type=int, help="of every contender at every point; the preset's if left out")
    parser.add_argument("--only", nargs="+", metavar="LABEL", help="contenders; all if left out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    options = parser.parse_args()
    preset = PRESETS[options.preset]
    every = contenders(preset, options.budget)
    chosen = [c for c in every if options.only is None or c.label in options.only]
    estimates = options.estimates or preset.estimates
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows, size = study(preset, chosen, estimates, Path(folder))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit.stdout.strip(),
        "machine": f"{processor()}, threads: {torch.get_num_threads()}",
        "versions": f"mezo_dist {mezo_dist.__version__}, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
        "seeds": "0, 1, ..., one per cycle",
        "seconds": round(time.perf_counter() - began),
        "preset": options.preset,
        "weights": size,
        "samples": preset.num_samples,
        "budget": options.budget,
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"estimator_quality-{options.preset}-{options.budget:g}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, path.with_suffix(".png"))
    print(f"{path} and .png, {result['seconds']} s")


if __name__ == "__main__":
    main()
