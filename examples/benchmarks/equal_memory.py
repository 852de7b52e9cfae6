"""In the memory that MeZO-SVRG takes on all weights, which first-order choice fits, and what does each reach?

    python examples/benchmarks/equal_memory.py [--contest movie] [--seconds 300] [--seeds 0] [--room 1.0]
                                               [--only LABEL ...] [--untuned] [--memory] [--out FILE]

Somebody with a machine in which back-propagation through a whole model does not fit has a choice: forward passes on
all weights, or gradients of less. The limit is the peak memory of a MeZO-SVRG cycle on all weights. Against it: AdamW
and SGD on all weights, with gradient checkpointing and batches of 1; AdamW on the last k blocks, of which the largest k
that fits counts; and AdamW on LoRA matrices with checkpointing. ``equal_choices.py`` has them, and the contests:
SmolLM2-135M with batches of 16 movie sentences (``movie``) or of 4 news articles of 256 tokens (``news``), and
MiniLM-L6 with a fresh head and batches of 16 movie sentences (``minilm``).

1. Memory. Every choice takes a few steps in a process of its own. What is measured is the largest resident memory from
   the first step on (Linux: VmHWM, reset when the model is loaded and, where a cache remembers frozen blocks, all
   training samples were seen once, so that what it remembers is there). Everything counts: weights, activations,
   optimiser, Python and torch (and peft). Of the last blocks, k grows until it does not fit. A whole run may take more,
   where longer texts come later: what it took is said beside what it reached. ``--memory`` stops here.
2. Learning. What fits learns for the same time of training, with as many steps as the seconds of a step in 1. allow, a
   linear schedule as in the studies, and a grid of three rates; it grows by one, and once more, where its best one lies
   at an edge. The rate with the best validation accuracy (among equals, loss) of seed 0 runs from ``--seeds``, and
   these are scored on the test split. Looks at data are not counted as training, nor is what fills the cache (``movie``
   alone has one). MeZO-SVRG learns with ``lr: auto``, too, for which nothing is chosen; ``--untuned`` chooses nothing
   for the others either, and takes the rates in the middle of the grids.

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
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import harness
import torch
from equal_choices import CONTESTS, LIMIT, ROOT, TINY, Choice, Contest, choices, merged
from memory import peak_bytes

from mezo_dist.algorithms.step import Progress
from mezo_dist.config import reader
from mezo_dist.config.schema import RunConfig
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.malloc import ask_for_huge_pages, tune_malloc
from mezo_dist.runs.build import Run, build_run, with_gradients
from mezo_dist.runs.training import apply_step, evaluate_step
from mezo_dist.testing import PRELOAD, write_tiny_config

FAST = {"seconds": 2.0, "contest": "tiny"}
GIB = 2**30
STEP_OF_RATES = 10**0.5
"""Ratio of neighbouring learning rates."""
EXTENSIONS = 2
LOOKS = ("task.splits.validation.size=256", "task.splits.test.size=512")
"""Sentences that are scored: looks take longer than training otherwise."""
Figures = dict[str, Any]


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


def config_of(settings: Sequence[str], folder: Path, tiny: str | None = None) -> RunConfig:
    """All settings of a run that writes to ``folder``; see `run_case` for the others."""
    if tiny:
        path = write_tiny_config(folder, tiny, "mezo", batch_size=4, micro_batch=4)
        sizes: list[str] = []
    else:
        path = ROOT / "configs/adamw.yaml"
        sizes = ["train.batch_size=16", "train.micro_batch=16", 'model.trainable=["*"]', *LOOKS]
    return reader.load(path, [*merged(sizes, list(settings)), f"output.dir={folder / 'run'}"])


def run_case(settings: Sequence[str], *, tiny: str | None, is_scored: bool) -> Figures:
    """Load model and data, see all training samples once, take the steps, and measure.

    Args:
        settings: of the choice.
        tiny: the kind of a tiny random model that takes the place of the settings' own; None: none does.
        is_scored: look at validation and test samples afterwards.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _measured(settings, Path(folder), tiny=tiny, is_scored=is_scored)


def _measured(settings: Sequence[str], folder: Path, *, tiny: str | None, is_scored: bool) -> Figures:
    """See `run_case`; what a run needs goes to ``folder``."""
    config = config_of(settings, folder, tiny)
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

    def __init__(self, out: Path | None, *, tiny: str | None = None) -> None:
        self._out, self._tiny = out, tiny
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        lines = out.read_text().splitlines() if out is not None and out.exists() else []
        self._known: dict[str, Figures | None] = {row["case"]: row["figures"] for row in map(json.loads, lines)}

    def run(self, settings: Sequence[str], *, is_scored: bool) -> Figures | None:
        """See `run_case`; None if it did not get to its end (out of memory, most likely)."""
        case = json.dumps({"settings": list(settings), "fast": self._tiny or False, "is_scored": is_scored})
        if case not in self._known:
            try:  # a process for each case, off one that has imported what takes long and done nothing else
                with ProcessPoolExecutor(1, self._context, initializer=prepare) as pool:
                    work = pool.submit(run_case, list(settings), tiny=self._tiny, is_scored=is_scored)
                    self._known[case] = work.result()
            except Exception as error:  # noqa: BLE001 (whatever it is, and if the process died, the others go on)
                print(f"{case}: {error!r}", file=sys.stderr)
                self._known[case] = None
            if self._out is not None:
                with self._out.open("a") as file:
                    file.write(json.dumps({"case": case, "figures": self._known[case]}) + "\n")
        return self._known[case]


def remembered(cases: Cases, contest: Contest, room: float, only: Sequence[str]) -> list[tuple[Choice, Figures | None]]:
    """The memory of every choice, MeZO-SVRG's first; of a family, up to the first that does not fit.

    Args:
        cases: what runs them.
        contest: the model and its batches.
        room: see `fitting`.
        only: labels of choices, beside MeZO-SVRG; empty: all.
    """
    rows: list[tuple[Choice, Figures | None]] = []
    full: set[str] = set()
    for choice in choices(contest):
        if choice.family in full or not (choice.is_limit or not only or choice.label in only):
            continue
        steps = contest.memory_steps
        settings = merged(contest.overrides, choice.settings(choice.rate, steps, 0))
        rows.append((choice, figures := cases.run(settings, is_scored=False)))
        print(choice.label, "failed" if figures is None else f"{figures['peak_gib']:.3f} GiB", flush=True)
        if choice.family and not any(fit is choice for fit in fitting(rows, room)):
            full.add(choice.family)
    return rows


def fitting(rows: Sequence[tuple[Choice, Figures | None]], room: float) -> list[Choice]:
    """The choices that take at most ``room`` times the memory of `LIMIT`; in a family, the last of them."""
    (limit,) = (figures["peak_gib"] for choice, figures in rows if choice.label == LIMIT and figures is not None)
    known = [(choice, figures) for choice, figures in rows if figures is not None]
    fit = [choice for choice, figures in known if choice.is_limit or figures["peak_gib"] <= room * limit]
    return [c for n, c in enumerate(fit) if not c.family or all(other.family != c.family for other in fit[n + 1 :])]


def learn(
    cases: Cases, contest: Contest, choice: Choice, steps: int, seeds: Sequence[int], *, untuned: bool = False
) -> Figures | None:
    """The best rate of a choice, by validation, and what it reaches from all seeds; None if nothing learnt.

    Args:
        cases: what runs them.
        contest: the model and its batches.
        choice: what learns.
        steps: of a run.
        seeds: of the runs that are scored.
        untuned: take the rate in the middle of the grid.
    """

    def tried(rate: float | None, seed: int = 0) -> Figures | None:
        return cases.run(merged(contest.overrides, choice.settings(rate, steps, seed)), is_scored=True)

    best = choice.rate
    if best is not None and not untuned:
        best = best_rate(best, tried)
        if best is None:
            return None
    sound = [figures for figures in (tried(best, seed) for seed in seeds) if figures is not None]
    if not sound:
        return None
    tests = [figures["test"] for figures in sound]
    return {
        "rate": best or "auto",
        "steps": sound[0]["steps"],
        "passes": sound[0]["passes"],
        "seconds": round(sound[0]["seconds"], 1),
        "peak_gib": round(max(figures["peak_gib"] for figures in sound), 3),
        "loss": round(statistics.fmean(loss for loss, _ in tests), 4),
        "accuracy": round(statistics.fmean(accuracy for _, accuracy in tests), 4),
        "accuracies": [round(accuracy, 4) for _, accuracy in tests],
    }


def best_rate(middle: float, tried: Callable[[float], Figures | None]) -> float | None:
    """The best rate by validation of a grid that grows at its edges; None if nothing learnt.

    Args:
        middle: of the grid.
        tried: what a rate reaches.
    """
    grid = [float(f"{middle * STEP_OF_RATES**k:.2g}") for k in (-1, 0, 1)]
    results = {rate: tried(rate) for rate in grid}
    while True:
        sound = {rate: figures for rate, figures in results.items() if figures is not None}
        if not sound:
            return None
        best = min(sound, key=lambda rate: (-sound[rate]["validation"][1], sound[rate]["validation"][0]))
        edge = {min(results): 1 / STEP_OF_RATES, max(results): STEP_OF_RATES}.get(best)
        if edge is None or len(results) == len(grid) + EXTENSIONS:
            return best
        results[further] = tried(further := float(f"{best * edge:.2g}"))


def main() -> None:
    """Measure memory, let what fits learn, print both tables and, with --json, one last line for machines."""
    parser = harness.parser(__doc__)
    parser.add_argument("--contest", choices=CONTESTS, default="movie", help="model, texts and batches")
    parser.add_argument("--seconds", type=float, default=300.0, help="of training, for every run")
    parser.add_argument("--room", type=float, default=1.0, help="memory that may be taken, in that of MeZO-SVRG")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--untuned", action="store_true", help="take the rates in the middle of the grids")
    parser.add_argument("--memory", action="store_true", help="measure memory alone")
    parser.add_argument("--out", type=Path, help="results, a line each; what is there is not run again")
    parser.add_argument("--only", nargs="+", default=[], help="labels of choices, beside MeZO-SVRG")
    arguments = harness.parse(parser, FAST)
    facts = harness.begin()
    contest, table = CONTESTS[arguments.contest], {}
    cases = Cases(arguments.out, tiny=TINY.get(arguments.contest))
    rows = remembered(cases, contest, arguments.room, arguments.only)
    if not arguments.memory:
        seconds = {c.label: f["seconds"] / f["steps"] for c, f in rows if f is not None}
        print(f"\nin the memory of {LIMIT}, {arguments.seconds:g} s each:", flush=True)
        for choice in fitting(rows, arguments.room):
            steps = max(1, round(arguments.seconds / seconds[choice.label]))
            table[choice.label] = learn(cases, contest, choice, steps, arguments.seeds, untuned=arguments.untuned)
            print(choice.label, table[choice.label], flush=True)
    peaks = {choice.label: figures and round(figures["peak_gib"], 4) for choice, figures in rows}
    harness.end(arguments, facts, {"contest": arguments.contest, "peaks_gib": peaks, "learnt": table})


if __name__ == "__main__":
    main()
