"""In the memory that MeZO-SVRG takes on all weights, which first-order choice fits, and what does each reach?

    python examples/benchmarks/equal_memory.py [--seconds 300] [--seeds 0] [--room 1.0] [--only LABEL ...]
                                               [--out FILE]

Somebody with a machine in which back-propagation through a whole model does not fit has a choice: forward passes on all
weights, or gradients of less. The limit is the peak memory of a MeZO-SVRG cycle on all weights of SmolLM2-135M, with
batches of 16 movie sentences. Against it: AdamW and SGD on all weights, with gradient checkpointing and batches of 1;
AdamW on the last k blocks, of which the largest k that fits counts; and AdamW on LoRA matrices with checkpointing.

1. Memory. Every choice takes a few steps in a process of its own. What is measured is the largest resident memory from
   the first step on (Linux: VmHWM, reset when the model is loaded and all training samples were seen once, so that what
   the frozen cache remembers is there). Everything counts: weights, activations, optimiser, Python and torch.
2. Learning. What fits learns for the same time of training, with as many steps as the seconds of a step in 1. allow, a
   linear schedule as in the studies, and a grid of three rates; it grows by one, and once more, where its best one lies
   at an edge. The rate with the best validation accuracy (among equals, loss) of seed 0 runs from ``--seeds``, and
   these are scored on the test split. Looks at data are not counted as training.

MeZO-SVRG's losses are calibrated, for that is how it learns most (examples/studies/README.md); gradients gain nothing
from it. One thread per process, and seconds are the processor's, so that other work disturbs them little. What is in
``--out`` is not run again. ``--fast`` is a tiny random model on made-up sentences, which says nothing about either
question.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from memory import peak_bytes

from mezo_dist.algorithms.step import Progress
from mezo_dist.config import reader
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.malloc import ask_for_huge_pages, tune_malloc
from mezo_dist.runs.build import Run, build_run, with_gradients
from mezo_dist.runs.training import apply_step, evaluate_step
from mezo_dist.testing import PRELOAD, write_tiny_config

ROOT = Path(__file__).resolve().parents[2]
FAST = {"seconds": 2.0}
GIB = 2**30
STEP_OF_RATES = 10**0.5
"""Ratio of neighbouring learning rates."""
EXTENSIONS = 2
MEMORY_STEPS = 4
"""Steps in which memory and seconds are measured: two cycles of MeZO-SVRG."""
LOOKS = ("task.splits.validation.size=256", "task.splits.test.size=512")
"""Sentences that are scored: looks take longer than training otherwise."""
LIMIT = "MeZO-SVRG, all weights"
Figures = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """One way to spend the memory."""

    label: str
    overrides: tuple[str, ...]
    rate: float
    """The rate in the middle of the grid."""
    family: str = ""
    """Among choices of one family only the last one that fits learns."""

    def settings(self, rate: float, steps: int, seed: int) -> list[str]:
        """All settings of a run but the data's."""
        schedule = ("kind=linear", f"warmup_steps={max(1, steps // 20)}", "final=0.02")
        rates = [f"algorithm.{name}={rate}" for name in (("lr", "anchor_lr") if self.label == LIMIT else ("lr",))]
        scheduled = [f"algorithm.schedule.{item}" for item in schedule]
        return [*self.overrides, *rates, *scheduled, f"train.steps={steps}", f"seed={seed}"]


def choices(num_blocks: int) -> list[Choice]:
    """What is compared, for a model of so many blocks (whose weights are named as Llama's are)."""
    adamw, sgd = "algorithm.name=adamw", "algorithm.name=sgd"
    again, single = "train.gradient_checkpointing=true", ("train.batch_size=1", "train.micro_batch=1")
    svrg = ("algorithm.name=mezo-svrg", "algorithm.q=2", "algorithm.eps=1e-3", "train.full_size=128")
    last = [
        Choice(
            f"AdamW, last {k} of {num_blocks} blocks",
            (adamw, f"model.trainable={_last_blocks(k, num_blocks)}"),
            3.2e-4,
            "last blocks",
        )
        for k in (1, 2, 4, 8, 16)
        if k <= num_blocks
    ]
    return [
        Choice(LIMIT, (*svrg, "algorithm.annealing.divisor=1", "train.calibrate=true"), 3.2e-4),
        Choice("AdamW, all weights", (adamw,), 3.2e-5),
        Choice("AdamW, all weights, checkpointing, batch 1", (adamw, again, *single), 1e-5),
        Choice("SGD, all weights", (sgd,), 3.2e-3),
        Choice("SGD, all weights, checkpointing", (sgd, again), 3.2e-3),
        Choice("SGD, all weights, checkpointing, batch 1", (sgd, again, *single), 1e-3),
        *last,
        Choice("AdamW, LoRA, checkpointing", (adamw, again, "model.peft.method=lora"), 1e-3),
    ]


def _last_blocks(k: int, num_blocks: int) -> str:
    patterns = [f"model.layers.{block}.*" for block in range(num_blocks - k, num_blocks)]
    return json.dumps([*patterns, "model.norm.*"])


# In a process of its own


def prepare() -> None:
    """Set a process up as the command line does, with one thread."""
    torch.set_num_threads(1)
    ask_for_huge_pages()
    tune_malloc(is_sharded=False)


def give_back() -> None:
    """Give memory that is free in this process back to the system: the check of the engine against the model, before
    training, changes copies of the trainable weights, which malloc would keep. (A run does without these copies where
    memory is short.)"""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def run_case(settings: Sequence[str], *, fast: bool, is_scored: bool) -> Figures:
    """Load model and data, see all training samples once, take the steps, and measure.

    Args:
        settings: of the choice.
        fast: a tiny model.
        is_scored: look at validation and test samples afterwards.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _measured(settings, Path(folder), fast=fast, is_scored=is_scored)


def _measured(settings: Sequence[str], folder: Path, *, fast: bool, is_scored: bool) -> Figures:
    """See `run_case`; what a run needs goes to ``folder``."""
    if fast:
        path = write_tiny_config(folder, "llama-tied", "mezo", batch_size=4, micro_batch=4)
        settings = [item.replace("full_size=128", "full_size=8") for item in settings]
        sizes: list[str] = []
    else:
        path = ROOT / "configs/adamw.yaml"
        sizes = ["train.batch_size=16", "train.micro_batch=16", 'model.trainable=["*"]', *LOOKS]
    given = [item for item in sizes if item.partition("=")[0] not in {s.partition("=")[0] for s in settings}]
    config = reader.load(path, [*given, *settings, f"output.dir={folder / 'run'}"])
    run = with_gradients(build_run(config, Communicator()))
    is_partial = not all(p.requires_grad for p in run.pretrained.model.parameters())
    if is_partial and config.train.frozen_cache_gib:  # or there is nothing to remember
        run.evaluator.score(run.split("train"), run.kind.summarise, lambda _: None)
    weights = sum(p.nbytes for p in run.pretrained.model.parameters())
    give_back()
    Path("/proc/self/clear_refs").write_text("5")
    began, passes, done, skipped = time.process_time(), 0, 0, 0
    progress: Progress[Any] = Progress(run.algorithm.init())
    while progress.step < config.train.steps and progress.skipped_in_a_row < config.train.max_skipped:
        result, forwards = evaluate_step(run, progress.state, progress.step)
        apply_step(run, result)
        progress.after(result.update)
        passes, done, skipped = passes + forwards, progress.step, progress.skipped
    figures: Figures = {
        "peak_gib": peak_bytes() / GIB,
        "weights_gib": weights / GIB,
        "seconds": time.process_time() - began,
        "steps": done,
        "skipped": skipped,
        "passes": passes,
    }
    return figures | (scores(run) if is_scored else {})


def scores(run: Run) -> Figures:
    """Loss and accuracy on validation and test samples; the worst there is where they are not finite."""
    calibration = run.calibration()
    adjust = calibration.adjusted if calibration else None
    figures: Figures = {}
    for split in ("validation", "test"):
        result = run.evaluator.score(run.split(split), run.kind.summarise, lambda _: None, adjust)
        sound = math.isfinite(result["loss"])
        figures[split] = [result["loss"] if sound else 1e9, result[run.config.task.metric] if sound else 0.0]
    return figures


# What is made of them


class Cases:
    """Runs cases in processes of their own, and remembers them in a file."""

    def __init__(self, out: Path | None, *, fast: bool) -> None:
        self._out, self._fast = out, fast
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        lines = out.read_text().splitlines() if out is not None and out.exists() else []
        self._known: dict[str, Figures | None] = {row["case"]: row["figures"] for row in map(json.loads, lines)}

    def run(self, settings: Sequence[str], *, is_scored: bool) -> Figures | None:
        """See `run_case`; None if it did not get to its end (out of memory, most likely)."""
        case = json.dumps({"settings": list(settings), "fast": self._fast, "is_scored": is_scored})
        if case not in self._known:
            try:  # a process for each case, off one that has imported what takes long and done nothing else
                with ProcessPoolExecutor(1, self._context, initializer=prepare) as pool:
                    work = pool.submit(run_case, list(settings), fast=self._fast, is_scored=is_scored)
                    self._known[case] = work.result()
            except Exception as error:  # noqa: BLE001 (whatever it is, and if the process died, the others go on)
                print(f"{case}: {error!r}", file=sys.stderr)
                self._known[case] = None
            if self._out is not None:
                with self._out.open("a") as file:
                    file.write(json.dumps({"case": case, "figures": self._known[case]}) + "\n")
        return self._known[case]


def fitting(rows: Sequence[tuple[Choice, Figures | None]], room: float) -> list[Choice]:
    """The choices that take at most ``room`` times the memory of `LIMIT`; in a family, the last of them."""
    (limit,) = (figures["peak_gib"] for choice, figures in rows if choice.label == LIMIT and figures is not None)
    fit = [choice for choice, figures in rows if figures is not None and figures["peak_gib"] <= room * limit]
    return [c for n, c in enumerate(fit) if not c.family or all(other.family != c.family for other in fit[n + 1 :])]


def learn(cases: Cases, choice: Choice, steps: int, seeds: Sequence[int]) -> Figures | None:
    """The best rate of a choice, by validation, and what it reaches from all seeds; None if nothing learnt."""

    def tried(rate: float) -> Figures | None:
        return cases.run(choice.settings(rate, steps, 0), is_scored=True)

    grid = [float(f"{choice.rate * STEP_OF_RATES**k:.2g}") for k in (-1, 0, 1)]
    results = {rate: tried(rate) for rate in grid}
    for _ in range(EXTENSIONS + 1):
        sound = {rate: figures for rate, figures in results.items() if figures is not None}
        if not sound:
            return None
        best = min(sound, key=lambda rate: (-sound[rate]["validation"][1], sound[rate]["validation"][0]))
        edge = {min(results): 1 / STEP_OF_RATES, max(results): STEP_OF_RATES}.get(best)
        if edge is None or len(results) == len(grid) + EXTENSIONS:
            break
        results[further] = tried(further := float(f"{best * edge:.2g}"))
    runs = [cases.run(choice.settings(best, steps, seed), is_scored=True) for seed in seeds]
    tests = [figures["test"] for figures in runs if figures is not None]
    return {
        "rate": best,
        "steps": sound[best]["steps"],
        "passes": sound[best]["passes"],
        "seconds": round(sound[best]["seconds"], 1),
        "peak_gib": round(max(f["peak_gib"] for f in runs if f is not None), 3),
        "loss": round(statistics.fmean(loss for loss, _ in tests), 4),
        "accuracy": round(statistics.fmean(accuracy for _, accuracy in tests), 4),
    }


def main() -> None:
    """Measure memory, let what fits learn, print both tables and, with --json, one last line for machines."""
    parser = harness.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="of training, for every run")
    parser.add_argument("--room", type=float, default=1.0, help="memory that may be taken, in that of MeZO-SVRG")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, help="results, a line each; what is there is not run again")
    parser.add_argument("--only", nargs="+", default=[], help="labels of choices, beside MeZO-SVRG")
    arguments = harness.parse(parser, FAST)
    facts = harness.begin()
    cases, rows, table = Cases(arguments.out, fast=arguments.fast), [], {}
    for choice in choices(2 if arguments.fast else 30):
        if choice.label == LIMIT or not arguments.only or choice.label in arguments.only:
            figures = cases.run(choice.settings(choice.rate, MEMORY_STEPS, 0), is_scored=False)
            rows.append((choice, figures))
            print(choice.label, "failed" if figures is None else f"{figures['peak_gib']:.3f} GiB", flush=True)
    seconds = {c.label: f["seconds"] / f["steps"] for c, f in rows if f is not None}
    print(f"\nin the memory of {LIMIT}, {arguments.seconds:g} s each:", flush=True)
    for choice in fitting(rows, arguments.room):
        steps = max(1, round(arguments.seconds / seconds[choice.label]))
        table[choice.label] = learn(cases, choice, steps, arguments.seeds)
        print(choice.label, table[choice.label], flush=True)
    peaks = {choice.label: figures and round(figures["peak_gib"], 4) for choice, figures in rows}
    harness.end(arguments, facts, {"peaks_gib": peaks, "learnt": table})


if __name__ == "__main__":
    main()
