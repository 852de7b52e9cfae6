"""OPT-6.7B's real shape in bf16 on two processes of one 24 GiB machine: a whole cycle of MeZO-SVRG.

    python examples/benchmarks/seven_billion.py [--shape opt-6.7b] [--engines fsdp zero] [--ranks 2]

Weights are random, made shard by shard, so nobody ever holds the model; the texts are real (movie sentences, cut by
SmolLM2's tokeniser). A cycle is an anchor step on a full batch and an inner step on a minibatch. Reported: the peaks
of resident memory of all ranks added up (Linux: VmHWM, from the start of the processes, so loading counts too), and
where the time of rank 0 goes: gathering weights, materialising variants, the forward passes' own work, the update.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness
import torch
from shapes import SHAPES, make_batch, without_data

from mezo_dist.algorithms.base import Evaluation, Losses, Problem, Variant
from mezo_dist.algorithms.operations import apply_updates
from mezo_dist.algorithms.step import Progress, run_step
from mezo_dist.algorithms.svrg import MeZOSVRG, SVRGPlanner
from mezo_dist.assets import registry
from mezo_dist.directions.law import Law
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.distributed.connect import connect
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.layouts.base import Layout
from mezo_dist.engines.malloc import ask_for_huge_pages, tune_malloc
from mezo_dist.engines.units import Unit
from mezo_dist.models.sliced_checkpoint import fill
from mezo_dist.runs.evaluation import Evaluator
from mezo_dist.tasks.batches import MicroBatch, cut
from mezo_dist.tasks.classification.label_words import LabelWords
from mezo_dist.tasks.classification.prompts import Sample

GIB = 2**30
FAST = {"shape": "opt-125m", "engines": ["fsdp"], "text": "random"}
FULL, MINI, MICRO = 8, 4, 2
"""Samples of a full batch, of a minibatch, of a micro-batch."""


class Clock:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - began


class TimedLayout:
    """A layout whose gathers are timed."""

    def __init__(self, layout: Layout, clock: Clock) -> None:
        self._layout, self._clock = layout, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layout, name)

    def synchronize(self, what: str) -> None:
        """Waiting for the other ranks has a line of its own: on a machine with fewer cores than threads it is long."""
        with self._clock("wait"):
            self._layout.synchronize(what)

    def start(self, unit: Unit) -> None:
        """See `Layout.start`."""
        with self._clock("gather"):
            self._layout.start(unit)

    def finish(self, unit: Unit) -> None:
        """See `Layout.finish`."""
        with self._clock("gather"):
            self._layout.finish(unit)

    def release(self, unit: Unit) -> None:
        """See `Layout.release`."""
        with self._clock("gather"):
            self._layout.release(unit)


class TimedLaw:
    """Directions whose making is timed."""

    def __init__(self, law: Law, clock: Clock) -> None:
        self._law, self._clock = law, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._law, name)

    def add_parts(self, *args: Any, **kwargs: Any) -> None:
        """See `Law.add_parts`."""
        with self._clock("materialise"):
            self._law.add_parts(*args, **kwargs)


def real_texts(count: int) -> list[Sample]:
    """Movie sentences, the answer to be read at their end."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(registry.resolve_model("demo:smollm2-135m"))
    lines = registry.resolve_data("demo:movie-sentences")["all"].read_text(encoding="utf-8").splitlines()[:count]
    rows = [json.loads(line) for line in lines]
    ids = [tuple(tokenizer(f"{row['text']} It was")["input_ids"]) for row in rows]
    return [Sample(text, number % 2, len(text) - 1) for number, text in enumerate(ids)]


def batches(text: str) -> tuple[list[MicroBatch], list[MicroBatch]]:
    """Micro-batches of the full batch and of the minibatch."""
    if text == "random":
        return [make_batch(MICRO, 8)] * (FULL // MICRO), [make_batch(MICRO, 8)] * (MINI // MICRO)
    samples = real_texts(FULL)
    return cut(samples, MICRO, 2), cut(samples[:MINI], MICRO, 2)


def make_layout(name: str, model: torch.nn.Module, connection: Communicator) -> Layout:
    """Shard the model, which has no data yet."""
    if name == "fsdp":
        from mezo_dist.engines.layouts.fsdp import Fsdp

        return Fsdp(model, connection)
    from mezo_dist.engines.layouts.zero import Zero

    return Zero(model, connection, {})


def run_rank(name: str, shape: str, text: str, threads: int) -> None:
    """One rank: load, take a cycle, and let rank 0 print what all of them found."""
    torch.set_num_threads(threads)
    connection = connect(timeout_s=900.0)
    clock = Clock()
    with clock("load"):
        model, source = without_data(shape, torch.bfloat16)
        layout: Any = TimedLayout(make_layout(name, model, connection), clock)
        law: Any = TimedLaw(Law("gaussian"), clock)
        engine = Engine(model, law, layout, stochastic_rounding=True)
        fill(source, engine.shards())
    loaded = peak_bytes()
    full, mini = batches(text)
    objective = LabelWords(
        model, [100, 200], full[0], once=lambda forward: engine.evaluate([Variant()], full[:1], forward)[0][0]
    )
    evaluator = Evaluator(engine, objective, connection)
    planner = SVRGPlanner(
        MeZOSVRG(lr=1e-6, anchor_lr=1e-6), Problem(seed=0, num_steps=1000, batch_size=MINI, full_size=FULL)
    )
    connection.barrier()
    load_s, gathered = clock.seconds["load"], engine.gathered_bytes
    clock.seconds.clear()
    progress, began = Progress(planner.init()), time.perf_counter()
    for step, batch in enumerate((full, mini)):

        def evaluate(request: Evaluation, _: int, batch: list[MicroBatch] = batch, step: int = step) -> Losses | None:
            with clock("evaluate"):
                return evaluator.losses(request, batch, ("step", step))

        result = run_step(planner, progress.state, step, evaluate)
        assert result.update is not None, result.skipped
        inside = clock.seconds["materialise"]
        with clock("update"):
            apply_updates(engine, 0, [(step, result.update.operations)])
        clock.seconds["materialise"] = inside
        progress.after(result.update)
    figures = {"cycle_s": time.perf_counter() - began, "load_s": load_s, **clock.seconds}
    figures["forward"] = figures.pop("evaluate") - sum(figures[part] for part in ("gather", "wait", "materialise"))
    peaks = connection.collect(lambda: [loaded, peak_bytes()])
    if connection.rank == 0:
        weights = sum(shard.shape.numel() for shard in engine.shards()) * 2
        figures |= {
            "weights_gib": weights / GIB,
            "loading_peak_rss_gib": sum(peak for peak, _ in peaks) / GIB,
            "peak_rss_gib": sum(peak for _, peak in peaks) / GIB,
            "gathered_over_weights": (engine.gathered_bytes - gathered) / weights,
        }
        print(json.dumps({key: round(value, 3) for key, value in figures.items()}), flush=True)
    connection.close()


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Run each engine in turn; with --json one last line for machines."""
    parser = harness.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="opt-6.7b")
    parser.add_argument("--engines", nargs="+", choices=["fsdp", "zero"], default=["fsdp", "zero"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="per rank")
    parser.add_argument("--text", choices=["demo", "random"], default="demo")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    arguments = harness.parse(parser, FAST)
    ask_for_huge_pages()  # as the command line does
    tune_malloc(is_sharded=True)
    if arguments.rank_of:
        run_rank(arguments.rank_of, arguments.shape, arguments.text, arguments.threads)
        return
    facts = harness.begin()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.ranks)]
    same = ["--shape", arguments.shape, "--text", arguments.text, "--threads", str(arguments.threads)]
    by_engine = {}
    for engine in arguments.engines:
        done = subprocess.run(
            [*torchrun, __file__, "--rank-of", engine, *same], stdout=subprocess.PIPE, text=True, check=True
        )
        by_engine[engine] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
        print(engine, "  ".join(f"{name} {value}" for name, value in by_engine[engine].items()), flush=True)
    harness.end(arguments, facts, by_engine)


if __name__ == "__main__":
    main()
