"""What `equal_memory.py` compares, on which models and texts: settings alone.

A `Contest` is a model with a task and batches, a `Choice` one way to spend the memory that is there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT = "MeZO-SVRG, all weights"
AUTO = "MeZO-SVRG, all weights, lr: auto"
LEAST = ("AdamW, all weights, checkpointing, batch 1", "SGD, all weights, checkpointing, batch 1")
"""What needs least of all that train every weight by gradients."""


def merged(*groups: tuple[str, ...] | list[str]) -> list[str]:
    """Settings ``name=value`` of all groups; of two with the same name, the later one."""
    by_name = {item.partition("=")[0]: item for group in groups for item in group}
    return list(by_name.values())


@dataclass(frozen=True)
class Contest:
    """A model, its texts and the batches of all choices."""

    overrides: tuple[str, ...] = ()
    """Settings on top of configs/adamw.yaml (SmolLM2-135M, prompts, movie sentences cut to 48 tokens)."""
    num_blocks: int = 30
    block: str = "model.layers.{}.*"
    """Names of the weights of a block."""
    beyond: tuple[str, ...] = ("model.norm.*",)
    """Weights that are trained with the last blocks, whichever these are."""
    full_size: int = 128
    """Samples of an anchor."""
    lora: tuple[str, ...] = ()
    """Where adapters are; where peft has them, if left out."""
    rates: tuple[tuple[str, float], ...] = ()
    """Label or family -> the rate in the middle of the grid, where it is not that of SmolLM2 and movie sentences."""
    memory_steps: int = 4
    """Steps in which memory and seconds are measured; two are a cycle of MeZO-SVRG."""
    is_short: bool = False
    """Leave out those that train all weights by gradients and need more than `LEAST`."""


CONTESTS = {
    "movie": Contest(),
    # Frozen blocks are computed anew for every sample: what the cache remembered would count as memory, and filling it
    # as time.
    "minilm": Contest(
        (
            "model.name=demo:minilm-l6",
            "model.head=classifier",
            "train.max_tokens=128",
            "train.frozen_cache_gib=0",
        ),
        num_blocks=6,
        block="bert.encoder.layer.{}.*",
        beyond=("bert.pooler.*", "classifier.*"),
        lora=("query", "key", "value", "intermediate.dense", "output.dense"),
        rates=((LIMIT, 1e-3), (LEAST[0], 3.2e-5), (LEAST[1], 3.2e-3), ("LoRA", 3.2e-3)),
        is_short=True,
    ),
    "news": Contest(
        (
            f"task={ROOT / 'configs/tasks/bbc-news.yaml'}",
            "train.max_tokens=256",
            "train.batch_size=4",
            "train.micro_batch=4",
            "train.frozen_cache_gib=0",
            "task.splits.validation.size=32",
            "task.splits.test.size=64",
        ),
        full_size=16,
        rates=(("last blocks", 1e-3),),
        memory_steps=2,
        is_short=True,
    ),
    "tiny": Contest((), num_blocks=2, full_size=8),
    "tiny-bert": Contest(
        ("model.head=classifier", "train.frozen_cache_gib=0"),
        num_blocks=2,
        block="bert.encoder.layer.{}.*",
        beyond=("classifier.*",),
        full_size=8,
        lora=("query", "key", "value", "intermediate.dense", "output.dense"),
        is_short=True,
    ),
}
"""By name. The tiny ones are random models on made-up sentences."""
TINY = {"tiny": "llama-tied", "tiny-bert": "bert"}
"""Contests of tiny models -> the kind of model (`mezo_dist.testing.tiny_model`)."""


@dataclass(frozen=True)
class Choice:
    """One way to spend the memory."""

    label: str
    overrides: tuple[str, ...]
    rate: float | None
    """The rate in the middle of the grid; None: ``auto``, and no grid."""
    family: str = ""
    """Among choices of one family only the last one that fits learns."""

    @property
    def is_limit(self) -> bool:
        """Trains all weights by forward passes, so that it fits by definition."""
        return self.label in (LIMIT, AUTO)

    def settings(self, rate: float | None, steps: int, seed: int) -> list[str]:
        """All settings of a run but the data's.

        Args:
            rate: None: ``auto``.
            steps: of the run.
            seed: of the run.
        """
        schedule = ("kind=linear", f"warmup_steps={max(1, steps // 20)}", "final=0.02")
        value = "auto" if rate is None else rate
        rates = [f"algorithm.{name}={value}" for name in (("lr", "anchor_lr") if self.is_limit else ("lr",))]
        scheduled = [f"algorithm.schedule.{item}" for item in schedule]
        return [*self.overrides, *rates, *scheduled, f"train.steps={steps}", f"seed={seed}"]


def choices(contest: Contest) -> list[Choice]:
    """What is compared; the last blocks in the order of their number."""
    adamw, sgd = "algorithm.name=adamw", "algorithm.name=sgd"
    again, single = "train.gradient_checkpointing=true", ("train.batch_size=1", "train.micro_batch=1")
    svrg = ("algorithm.name=mezo-svrg", "algorithm.q=2", "algorithm.eps=1e-3", f"train.full_size={contest.full_size}")
    svrg = (*svrg, "algorithm.annealing.divisor=1", "train.calibrate=true")
    lora = ("model.peft.method=lora",)
    if contest.lora:
        lora = (*lora, f"model.peft.target_modules={json.dumps(contest.lora)}")
    rates = dict(contest.rates)

    def choice(label: str, overrides: tuple[str, ...], rate: float, family: str = "") -> Choice:
        return Choice(label, overrides, rates.get(family or label, rate), family)

    last = [
        choice(
            f"AdamW, last {k} of {contest.num_blocks} blocks",
            (adamw, f"model.trainable={_last_blocks(k, contest)}"),
            3.2e-4,
            "last blocks",
        )
        for k in sorted({1, 2, 4, min(8, contest.num_blocks), 16})
        if k <= contest.num_blocks
    ]
    every = [
        choice(LIMIT, svrg, 3.2e-4),
        Choice(AUTO, svrg, None),
        choice("AdamW, all weights", (adamw,), 3.2e-5),
        choice(LEAST[0], (adamw, again, *single), 1e-5),
        choice("SGD, all weights", (sgd,), 3.2e-3),
        choice("SGD, all weights, checkpointing", (sgd, again), 3.2e-3),
        choice(LEAST[1], (sgd, again, *single), 1e-3),
        *last,
        choice("AdamW, LoRA, checkpointing", (adamw, again, *lora), 1e-3, "LoRA"),
    ]
    by_gradients = ("AdamW, all weights", "SGD, all weights", "SGD, all weights, checkpointing")
    return [c for c in every if not (contest.is_short and c.label in by_gradients)]


def _last_blocks(k: int, contest: Contest) -> str:
    """Patterns of weights, as JSON."""
    patterns = [contest.block.format(block) for block in range(contest.num_blocks - k, contest.num_blocks)]
    return json.dumps([*patterns, *contest.beyond])
