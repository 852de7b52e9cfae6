"""Tasks, contenders and runs of `rewards.py`."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from estimator_quality import ROOT, Vector, put, trainable
from learning_curves import Record
from reinforce import Known, Prompts, Written, reinforce, writer

from mezo_dist import algorithms
from mezo_dist.algorithms import AdamW
from mezo_dist.algorithms.step import Progress
from mezo_dist.baselines.optimizer import WeightOptimizer
from mezo_dist.config import reader
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.objectives.rewards.judge import judging
from mezo_dist.runs.build import Run, build_run, problem_of
from mezo_dist.runs.evaluation import Evaluator, Writer
from mezo_dist.runs.gradients import Gradients
from mezo_dist.runs.training import apply_step, evaluate_step
from mezo_dist.tasks.batches import BatchOrder
from mezo_dist.testing import WORDS, write_tiny_data, write_tiny_model

TUNING_SEED, SEEDS = 3, (0, 1, 2)
TEXTS, REPEATS = 32, 4
"""Texts of a step, and for REINFORCE how many of them are of one prompt."""
PLACES = {
    "two norms": ("model.layers.{last}.post_attention_layernorm.*", "model.norm.*"),
    "last MLP": ("model.layers.{last}.post_attention_layernorm.*", "model.norm.*", "model.layers.{last}.mlp.*"),
    "all weights": ("*",),
}
"""Weights that are trained."""


@dataclass(frozen=True)
class Contender:
    """A way to learn."""

    method: str
    place: str
    rates: tuple[float, ...]
    """The grid to begin with; 0 alone: ``lr: auto``."""
    eps: float = 0.2
    """Size of MeZO's perturbation."""

    @property
    def label(self) -> str:
        """Its name."""
        return f"{self.method}, {self.place}"


CONTENDERS = (
    Contender("MeZO", "two norms", (0.15, 0.3, 0.6)),
    Contender("MeZO with lr: auto", "two norms", (0.0,)),
    Contender("REINFORCE", "two norms", (0.003, 0.01, 0.03)),
    Contender("supervised", "two norms", (0.003, 0.01, 0.03)),
    Contender("MeZO", "last MLP", (0.003, 0.01, 0.03), eps=0.01),
    Contender("REINFORCE", "last MLP", (1e-4, 3e-4, 1e-3)),
    Contender("supervised", "last MLP", (1e-4, 3e-4, 1e-3)),
)
MEASURED = (Contender("writing", "two norms", ()), *CONTENDERS, Contender("REINFORCE", "all weights", (1e-5,)))
"""Of which memory is measured."""


@dataclass(frozen=True)
class Task:
    """What is asked for, as overrides of configs/reward.yaml."""

    overrides: tuple[str, ...]
    has_labels: bool = False
    last: int = 29
    """The last block."""
    faster: float = 1.0
    """Factor on all rates, and on eps."""


def sizes(train: int, validation: int, test: int) -> tuple[str, ...]:
    """Overrides that give splits these sizes."""
    pairs = {"train": train, "validation": validation, "test": test}
    return tuple(f"task.splits.{name}.size={size}" for name, size in pairs.items())


TASKS = {
    "keywords": Task(
        (
            *sizes(192, 64, 128),
            "task.prompt=Headline: Rain stops play\nKeywords: rain, play\nHeadline: {{ headline }}\nKeywords:",
            'task.stop=["\\n"]',
            "task.max_new_tokens=4",
            f"reward.function={ROOT}/examples/rewards.py:two_keywords",
            "train.steps=20",
        )
    ),
    "topics": Task(
        (
            *sizes(320, 96, 320),
            "task.completion={{ topic }}",
            "task.end=)",
            "task.stop=[')']",
            "task.metric=exact-match",
            "train.objective=metric",
            "reward.function=null",
            "train.steps=48",
        ),
        has_labels=True,
    ),
    "tiny": Task(("train.steps=4",), has_labels=True, last=1, faster=30.0),
}
"""``tiny``: made-up sentences and a tiny random model, to try this script."""


@dataclass
class Bench:
    """A model with its data, on which run after run begins from the same weights."""

    run: Run
    start: Vector
    prompts: Prompts
    scorer: Evaluator
    """That of ``run``, which counts the texts that it writes."""
    faster: float = 1.0
    """See `Task`."""
    written: Written = field(default_factory=Written)

    def score(self, split: str) -> float:
        """Mean reward of the likeliest texts."""
        result = self.scorer.score(self.run.split(split), lambda *_: {}, lambda _: None)
        return round(-result["loss"], 4)

    def reset(self) -> None:
        """Back to the weights that all runs begin with."""
        put(self.run, self.start)
        self.written.texts = self.written.tokens = 0


@contextmanager
def opened(task: str, place: str, known: Known | None) -> Iterator[Bench]:
    """Model, data and judge of a task, with these weights trainable.

    Args:
        task: its name.
        place: a name in `PLACES`.
        known: prompts that were computed; None: neither they nor what is frozen are remembered.
    """
    about, comm = TASKS[task], Communicator()
    weights = json.dumps([pattern.format(last=about.last) for pattern in PLACES[place]])
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny(Path(folder)) if task == "tiny" else ROOT / "configs/reward.yaml"
        given = [f"model.trainable={weights}", f"train.micro_batch={TEXTS}", f"output.dir={folder}/run"]
        config = reader.load(
            path, [*about.overrides, *given, *(("train.frozen_cache_gib=0",) if known is None else ())]
        )
        with judging(config, comm) as judge:
            run = build_run(config, comm, judge=judge)
            start = {name: p.detach().clone() for name, p in trainable(run)}
            prompts, written, product = Prompts(run.pretrained.model, known), Written(), run.evaluator
            assert product.writer is not None
            evaluators = [
                dataclasses.replace(product, writer=Writer(writer(run, prompts, counter), product.writer.way))
                for counter in (written, Written())
            ]
            yield Bench(
                dataclasses.replace(run, evaluator=evaluators[0]), start, prompts, evaluators[1], about.faster, written
            )


def write_tiny(folder: Path) -> Path:
    """A config of a tiny job: half of all words are right."""
    rows = [json.loads(line) for line in write_tiny_data(folder / "rows.jsonl").read_text().splitlines()]
    lines = [json.dumps({**row, "right": list(WORDS[row["label"] :: 2])}) for row in rows]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    task = {
        "name": "tiny",
        "kind": "generation",
        "data": str(folder / "data.jsonl"),
        "splits": {
            "train": {"size": 48},
            "validation": {"source": "train", "size": 16},
            "test": {"source": "train", "size": 16},
        },
        "prompt": "{{ text }} . It was",
        "completion": " {{ right[0] }}",
        "references": "right",
        "max_new_tokens": 1,
    }
    config = {
        "model": {"name": str(write_tiny_model(folder / "model", "llama"))},
        "task": task,
        "law": "lowrank",
        "algorithm": {"name": "mezo", "per_sample": True, "scaling": "normalised", "eps": 0.2, "lr": 0.1},
        "train": {"objective": "metric", "batch_size": 16},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


def steps_of(bench: Bench, contender: Contender, lr: float, seed: int) -> Iterator[object]:
    """The steps of a run, one after another."""
    run, given = bench.run, bench.run.config
    if contender.method == "REINFORCE":
        order = BatchOrder(len(run.splits["train"]), TEXTS // REPEATS, seed)
        run = dataclasses.replace(run, config=dataclasses.replace(given, seed=seed), order=order)
        return reinforce(run, bench.prompts, bench.written, lr, seed, REPEATS)
    size = TEXTS if contender.method == "supervised" else TEXTS // 2
    rate: dict[str, Any] = {"lr": lr, "scaling": "normalised"} if lr else {"lr": "auto", "scaling": "plain"}
    settings: Any = dataclasses.replace(given.algorithm, eps=contender.eps * bench.faster, **rate)
    train = dataclasses.replace(given.train, batch_size=size)
    config = dataclasses.replace(given, algorithm=settings, train=train, seed=seed)
    if contender.method == "supervised":
        settings = AdamW(lr=lr, schedule=given.algorithm.schedule)
        train = dataclasses.replace(train, objective="loss")
        config = dataclasses.replace(given, algorithm=settings, train=train, seed=seed, law="gaussian")
        run.engine.optimizer = WeightOptimizer(run.engine, settings)
        evaluator = dataclasses.replace(run.evaluator, joint=None)
        gradients = Gradients(evaluator, run.engine.optimizer, calibrated=False, recompute=False)
        run = dataclasses.replace(run, evaluator=evaluator, gradients=gradients)
    problem = problem_of(config, run.problem.full_size, len(run.splits["train"]), run.problem.eps)
    algorithm = algorithms.build(settings.name, settings, problem)
    order = BatchOrder(len(run.splits["train"]), size, seed)
    return taken(dataclasses.replace(run, config=config, problem=problem, algorithm=algorithm, order=order))


def taken(run: Run) -> Iterator[None]:
    """Steps of the package."""
    progress: Progress[Any] = Progress(run.algorithm.init())
    while progress.step < run.config.train.steps:
        result, _ = evaluate_step(run, progress.state, progress.step)
        apply_step(run, result)
        progress.after(result.update)
        yield


def learn(bench: Bench, contender: Contender, lr: float, seed: int) -> Record:
    """One run: ``texts`` and ``tokens`` that it wrote, ``cpu_s``, and its scores."""
    bench.reset()
    seconds, is_final, scores, num_steps = 0.0, seed != TUNING_SEED, {}, bench.run.config.train.steps
    steps = steps_of(bench, contender, lr, seed)
    for step in range(1, num_steps + 1):
        began = time.process_time()
        next(steps)
        seconds += time.process_time() - began
        if step == num_steps // 4:
            scores["validation, a quarter"] = bench.score("validation")
    scores |= {split: bench.score(split) for split in (("validation", "test") if is_final else ("validation",))}
    return {"texts": bench.written.texts, "tokens": bench.written.tokens, "cpu_s": round(seconds, 1), "scores": scores}
