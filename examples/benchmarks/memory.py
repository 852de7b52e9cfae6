"""Peak memory of a MeZO-SVRG step, over the peak of the same forward pass alone and against first-order training.

    python examples/benchmarks/memory.py [--shape opt-1.3b] [--dtype float32] [--sizes 1x128 8x128 1x1024]
                                         [--methods forward mezo svrg sgd adamw]

Every case has a process of its own, on the same model with random weights: it loads the model, takes one step (svrg:
an anchor step and an inner step; sgd, adamw: forward, backward, update, and with AdamW a second step, for its state
comes with the first), and reports the largest resident memory since the model was loaded (Linux: VmHWM, reset through
/proc/self/clear_refs). Everything counts: weights, scratch, activations, Python and torch themselves (0.4 GiB).

First-order training keeps gradients, optimiser state and every layer's activations; a step of ours keeps the weights,
scratch for the variants of one layer and the hidden states of the forward passes that go in lock step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from shapes import SHAPES, make_batch, whole
from torch import nn

from mezo_dist.algorithms.base import Algorithm, Evaluation, Losses, Problem
from mezo_dist.algorithms.mezo import MeZO, MeZOPlanner
from mezo_dist.algorithms.step import Progress, take_step
from mezo_dist.algorithms.svrg import MeZOSVRG, SVRGPlanner
from mezo_dist.directions.law import Law
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.malloc import ask_for_huge_pages, tune_malloc
from mezo_dist.tasks.batches import MicroBatch
from mezo_dist.tasks.classification.label_words import LabelWords
from mezo_dist.tasks.kind import Forward

METHODS = ("forward", "mezo", "svrg", "sgd", "adamw")
FAST = {"shape": "opt-125m", "sizes": ["2x64"]}
GIB = 2**30


def forward_pass(model: nn.Module, objective: Forward, batch: MicroBatch) -> None:
    """The forward pass alone, as an evaluation runs it."""
    with torch.no_grad():
        objective(model, batch)


def zeroth_order(planner: Algorithm[Any], model: nn.Module, objective: Forward, batch: MicroBatch, steps: int) -> None:
    """``steps`` steps of a planner; its full batch is the same batch."""
    engine = Engine(model, Law("gaussian"), stochastic_rounding=model.dtype == torch.bfloat16)

    def evaluate(request: Evaluation, round_number: int) -> Losses:
        scores = engine.evaluate(request.variants, [batch], objective)[0]
        return Losses(tuple(float(score.loss.mean()) for score in scores))

    progress = Progress(planner.init())
    for _ in range(steps):
        take_step(planner, progress, evaluate, engine, 0)


def first_order(optimizer: torch.optim.Optimizer, model: nn.Module, objective: Forward, batch: MicroBatch) -> None:
    """Two steps by back-propagation."""
    for _ in range(2):
        objective(model, batch).loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def run_case(method: str, shape: str, dtype: torch.dtype, num_samples: int, length: int) -> dict[str, float]:
    """Load the model, take the step, measure. In this process."""
    model, batch = whole(shape, dtype), make_batch(num_samples, length)
    with torch.no_grad():
        objective = LabelWords(model, [100, 200], make_batch(1, 2))
    problem = Problem(seed=0, num_steps=1000, batch_size=num_samples, full_size=num_samples)
    steps: dict[str, Callable[[], None]] = {
        "forward": lambda: forward_pass(model, objective, batch),
        "mezo": lambda: zeroth_order(MeZOPlanner(MeZO(lr=1e-6), problem), model, objective, batch, 1),
        "svrg": lambda: zeroth_order(
            SVRGPlanner(MeZOSVRG(lr=1e-6, anchor_lr=1e-6), problem), model, objective, batch, 2
        ),
        "sgd": lambda: first_order(torch.optim.SGD(model.parameters(), lr=1e-6), model, objective, batch),
        "adamw": lambda: first_order(torch.optim.AdamW(model.parameters(), lr=1e-6), model, objective, batch),
    }
    Path("/proc/self/clear_refs").write_text("5")
    began = time.perf_counter()
    steps[method]()
    weights = sum(p.nbytes for p in model.parameters())
    return {"peak_gib": peak_bytes() / GIB, "weights_gib": weights / GIB, "seconds": time.perf_counter() - began}


def peak_bytes() -> int:
    """Largest resident memory of this process since the last reset (``ru_maxrss`` cannot be reset)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def in_own_process(case: list[str]) -> dict[str, float] | None:
    """What `run_case` found; None if it did not get to its end (out of memory, most likely)."""
    done = subprocess.run([sys.executable, __file__, "--case", *case], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{' '.join(case)}: exit status {done.returncode}\n{done.stderr[-2000:]}", file=sys.stderr)
        return None
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Measure all cases, print a table and, with --json, one last line for machines."""
    parser = harness.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="opt-1.3b")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--sizes", nargs="+", default=["4x128"], metavar="SAMPLESxTOKENS")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--case", nargs=5, help=argparse.SUPPRESS)
    arguments = harness.parse(parser, FAST)
    ask_for_huge_pages()  # as the command line does
    tune_malloc(is_sharded=False)
    if arguments.case:
        method, shape, dtype, num_samples, length = arguments.case
        print(json.dumps(run_case(method, shape, getattr(torch, dtype), int(num_samples), int(length))))
        return
    facts = harness.begin()
    rows = [measure(arguments, size) for size in arguments.sizes]
    ratios = [row["svrg_over_forward"] for row in rows if "svrg_over_forward" in row]
    harness.end(arguments, facts, {"svrg_over_forward": max(ratios, default=None), "rows": rows})


def measure(arguments: argparse.Namespace, size: str) -> dict[str, object]:
    """All methods at one size: peaks in GiB, and the ratios that matter."""
    num_samples, _, length = size.partition("x")
    row: dict[str, object] = {"shape": arguments.shape, "dtype": arguments.dtype, "size": size}
    peaks: dict[str, float] = {}
    for method in arguments.methods:
        figures = in_own_process([method, arguments.shape, arguments.dtype, num_samples, length])
        if figures is not None:
            peaks[method] = figures["peak_gib"]
            row["weights_gib"] = round(figures["weights_gib"], 3)
        row[f"{method}_gib"] = figures and round(figures["peak_gib"], 3)
    for name, above, below in (
        ("mezo_over_forward", "mezo", "forward"),
        ("svrg_over_forward", "svrg", "forward"),
        ("sgd_over_svrg", "sgd", "svrg"),
        ("adamw_over_svrg", "adamw", "svrg"),
    ):
        if above in peaks and below in peaks:
            row[name] = round(peaks[above] / peaks[below], 3)
    print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return row


if __name__ == "__main__":
    main()
