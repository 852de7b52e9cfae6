"""What grows with work, and how: start-up with samples, loading with the model, a trajectory with steps, and the rest.

    python examples/benchmarks/growth.py [--parts samples model trajectory evaluation directions]

Every part does the same work at several sizes and divides what it took by the size. Of the last column, `cost of a unit
of work at the largest size over that at the smallest`, 1 is what grows in step with work, and less is what has a fixed
part; much more grows faster than it should. Seconds are those of processors (all threads of the process), so that a
busy machine disturbs them less; `--fast` takes small sizes. Starts are processes of their own (`one_start.py`): their
imports count, and their memory after these.

* `samples`: a start on so many short rows, first with an empty cache of samples, then with a full one, and then with
  blocks that are frozen.
* `model`: a checkpoint of so many blocks is read.
* `trajectory`: so many steps of MeZO with seven directions are appended, read, replayed on a tiny model, and reported.
* `evaluation`: so many samples are scored.
* `directions`: a step with a direction per sample on batches of so many.
"""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import harness
import torch
import yaml

from mezo_dist.algorithms.base import Evaluation, Losses, Problem
from mezo_dist.algorithms.mezo import MeZO, MeZOPlanner
from mezo_dist.algorithms.step import Progress, run_step
from mezo_dist.config import reader
from mezo_dist.config.schema import digest_of
from mezo_dist.directions.law import Law
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.layouts.replicated import Replicated
from mezo_dist.monitoring import html_report
from mezo_dist.runs.build import Run, build_run
from mezo_dist.storage import trajectory
from mezo_dist.storage.replay import logged_step, replay_steps
from mezo_dist.storage.trajectory_writer import TrajectoryWriter
from mezo_dist.testing import WORDS, tiny_tokenizer, write_tiny_config

Figures = dict[str, float]
SIZES = {
    "samples": ([1_000, 10_000], [1_000, 10_000, 100_000, 1_000_000]),
    "model": ([4, 8], [8, 16, 32, 64]),
    "trajectory": ([200, 1_000], [1_000, 10_000, 100_000]),
    "evaluation": ([64, 256], [256, 1_024, 4_096]),
    "directions": ([4, 8], [4, 8, 16, 32]),
}
"""Part -> sizes of ``--fast``, and the usual ones."""
LAST_BLOCK = 'model.trainable=["*layers.1.*"]'
"""What is trained where blocks are frozen: the other one of the tiny model's is."""
DIRECTIONS, EARLY = 7, 100
"""Directions of a step of the trajectory; the step whose neighbours are timed against the last ones."""


def processor_seconds(work: Callable[[], object]) -> float:
    """Seconds of processors that ``work()`` took, all threads of this process and the processes that it ended."""

    def so_far() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime

    began = so_far()
    work()
    return so_far() - began


def config_in(folder: Path, num_rows: int, **algorithm: object) -> Path:
    """A tiny model and so many short rows; returns the config."""
    path, draw = write_tiny_config(folder, "llama-tied", "mezo"), random.Random(0)
    with (folder / "data.jsonl").open("w") as file:
        for number in range(num_rows):
            text = " ".join(draw.choices(WORDS, k=draw.randint(6, 12)))
            file.write(json.dumps({"text": text, "label": number % 2}) + "\n")
    config = yaml.safe_load(path.read_text())
    config["task"]["splits"]["train"]["size"] = num_rows - 40
    config["algorithm"] |= algorithm
    path.write_text(yaml.safe_dump(config))
    return path


# Start-up


def samples(size: int, folder: Path) -> Figures:
    """See above."""
    path = config_in(folder, size)
    environment = {**os.environ, "MEZO_DIST_CACHE": str(folder / "cache")}
    figures: Figures = {}
    for name, overrides in (("first", []), ("again", []), ("frozen", [LAST_BLOCK])):
        command = [sys.executable, str(Path(__file__).with_name("one_start.py")), str(path), *overrides]
        began = time.perf_counter()
        output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        took = json.loads(output.splitlines()[-1])
        figures |= {f"{name}_s": took["seconds"], f"{name}_mib": took["mib"]}
        figures[f"{name}_elapsed_s"] = time.perf_counter() - began
    return figures


def model(size: int, folder: Path) -> Figures:
    """See above."""
    import transformers

    from mezo_dist.config.schema import ModelConfig
    from mezo_dist.models.load import load_model

    shape = {"vocab_size": 256, "hidden_size": 512, "intermediate_size": 2_048, "num_attention_heads": 8}
    config = transformers.LlamaConfig(**shape, num_hidden_layers=size)
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="64MB")
    tiny_tokenizer().save_pretrained(folder)
    settings = ModelConfig(name=str(folder))
    return {"load_s": processor_seconds(lambda: load_model(settings, num_labels=2, seed=0))}


# The trajectory


def tiny_engine() -> Engine:
    """A few weights that steps are replayed on."""
    torch.manual_seed(0)
    weights = torch.nn.Linear(8, 8)
    return Engine(weights, Law("gaussian"), Replicated(weights))


def trajectory_of(size: int, folder: Path) -> Figures:
    """See above: `trajectory`."""
    planner = MeZOPlanner(MeZO(lr=1e-4, directions=DIRECTIONS), Problem(0, size, 8, 8, num_train=8))
    path, seconds = folder / trajectory.FILE, write_steps(folder, planner, size)
    early, late = (statistics.median(some) for some in (seconds[:EARLY], seconds[-EARLY:]))
    recorded: list[trajectory.Log] = []
    read_s = processor_seconds(lambda: recorded.append(trajectory.read(path)))
    replay_s = processor_seconds(lambda: replay_steps(tiny_engine(), 0, planner, recorded[0], size))
    report_s = processor_seconds(lambda: html_report.write([folder], folder / "report.html"))
    return {
        "append_early_us": 1e6 * early,
        "append_late_us": 1e6 * late,
        "read_s": read_s,
        "replay_s": replay_s,
        "report_s": report_s,
        "bytes": path.stat().st_size,
    }


def write_steps(folder: Path, planner: MeZOPlanner, size: int) -> list[float]:
    """A run folder with so many steps. Returns the seconds that each append took, without waiting for the disk."""
    config = {"seed": 0, "train": {"steps": size}}
    header = trajectory.Header(
        config=config,
        config_digest=digest_of(config),
        model_config="c" * 32,
        tokenizer="t" * 32,
        base_model="a model",
        base_fingerprint="0" * 16,
        data={"train": "a" * 32},
        law_version="law/v1",
        weights="float32, to nearest",
        seed=0,
        full_size=8,
        version="0",
    )
    writer = TrajectoryWriter.begin(folder / trajectory.FILE, header, sync_s=None)
    progress, draw, seconds = Progress(planner.init()), random.Random(0), []

    def evaluate(request: Evaluation, _: int) -> Losses:
        return Losses(tuple(draw.uniform(0.6, 0.7) for _ in request.variants))

    with (folder / "metrics.jsonl").open("w") as metrics:
        for step in range(size):
            result = run_step(planner, progress.state, step, evaluate)
            line = logged_step(result)
            began = time.perf_counter()
            writer.append(line)
            seconds.append(time.perf_counter() - began)
            progress.after(result.update)
            scalars = {"train/loss": result.rounds[0].mean[0], "lr": 1e-4, "projected_gradient": draw.gauss(0, 1)}
            metrics.write(json.dumps({"step": step + 1, "scalars": scalars}) + "\n")
    writer.close()
    return seconds


# Passes


def built(folder: Path, num_rows: int, overrides: Sequence[str] = (), **algorithm: object) -> Run:
    """A run on a tiny model."""
    return build_run(reader.load(config_in(folder, num_rows, **algorithm), list(overrides)), Communicator())


def evaluation(size: int, folder: Path) -> Figures:
    """See above."""
    run = built(folder, size + 40)
    batch = run.split("train")
    run.evaluator.score(run.split("validation"), run.kind.summarise, lambda _: None)
    score = processor_seconds(lambda: run.evaluator.score(batch, run.kind.summarise, lambda _: None))
    return {"score_s": score}


def directions(size: int, folder: Path) -> Figures:
    """See above."""
    settings = [f"--train.batch_size={size}", f"--train.micro_batch={size}", "--law=lowrank"]
    run = built(folder, 200, settings, per_sample=True)

    def step(number: int) -> None:
        batch = run.batch("minibatch", number)
        run_step(
            run.algorithm, run.algorithm.init(), number, lambda e, _: run.evaluator.losses(e, batch, ("step", number))
        )

    step(0)
    return {"step_s": statistics.median(processor_seconds(lambda n=n: step(n)) for n in range(1, 8))}  # type: ignore[misc]


PARTS: Mapping[str, Callable[[int, Path], Figures]] = {
    "samples": samples,
    "model": model,
    "trajectory": trajectory_of,
    "evaluation": evaluation,
    "directions": directions,
}


def growth(sizes: Sequence[int], rows: Sequence[Figures]) -> Figures:
    """Cost of a unit of work at the largest size over that at the smallest; an append is a unit by itself."""
    first, last, times = rows[0], rows[-1], sizes[-1] / sizes[0]
    return {
        name: last[name] / first[name] / (1.0 if name.endswith("_us") else times) for name in first if first[name] > 0
    }


def main() -> None:
    """Run the parts one after another; with --json one last line for machines."""
    parser = harness.parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sizes", nargs="+", type=int, help="instead of those of the parts")
    arguments = harness.parse(parser, {})
    logging.getLogger("mezo_dist").setLevel(logging.WARNING)
    facts = harness.begin()
    figures: dict[str, object] = {}
    for part in arguments.parts:
        sizes = arguments.sizes or SIZES[part][0 if arguments.fast else 1]
        rows = []
        for size in sizes:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(PARTS[part](size, Path(folder)))
            shown = "  ".join(f"{name} {value:.4g}" for name, value in rows[-1].items())
            print(f"{part:12}{size:>10,}  {shown}", flush=True)
        ratios = growth(sizes, rows)
        print(f"{part:12}{'of a unit':>10}  " + "  ".join(f"{name} {value:.3g}" for name, value in ratios.items()))
        figures[part] = {"sizes": sizes, "rows": rows, "growth": ratios}
    harness.end(arguments, facts, figures)


if __name__ == "__main__":
    main()
