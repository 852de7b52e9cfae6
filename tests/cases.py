"""The runs that several tests train: every algorithm and option, on an architecture each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A run on tiny data."""

    model: str
    """Kind of `mezo_dist.testing.tiny_model`."""
    algorithm: str
    options: tuple[str, ...]
    """Settings, as on the command line."""


SVRG_RATES = ("algorithm.lr=1e-3", "algorithm.anchor_lr=1e-2")
PER_SAMPLE = ("law=lowrank", "algorithm.per_sample=true", "algorithm.lr=1e-3")
EVERY_OPTION = ("lr=1e-3", "directions=3", "one_sided=true", "scaling=normalised", "clip=9", "momentum.decay=0.7",
                "pool=8", "pull=0.1")  # fmt: skip
BF16 = ("algorithm.lr=1e-3", "model.weights=bfloat16", "law=rademacher")
STORED = ("algorithm.lr=1e-3", "algorithm.anchor=stored", "model.weights=bfloat16")
AUTO = ("algorithm.lr=auto", "algorithm.anchor_lr=auto")
CASES = {
    "mezo": Case("opt", "mezo", ("algorithm.lr=1e-3",)),
    "mezo-svrg": Case("llama-tied", "mezo-svrg", (*SVRG_RATES, "algorithm.q=3")),
    "per-sample": Case("bert", "mezo-svrg", PER_SAMPLE),
    "per-sample, causal": Case("opt", "mezo-svrg", PER_SAMPLE),
    "several per sample": Case(
        "opt", "mezo", (*PER_SAMPLE, "algorithm.directions=2", "algorithm.one_sided=true", "algorithm.scaling=ranks")
    ),
    "bf16": Case("llama", "mezo-svrg", (*BF16, "algorithm.anchor=replay", "algorithm.eps=auto")),
    "every option": Case("opt", "mezo", tuple(f"algorithm.{option}" for option in EVERY_OPTION)),
    "stored": Case("gpt2", "mezo-svrg", (*STORED, "algorithm.q=5")),
    # Its four variants are shared out, too; those of other runs where that leaves the busiest process less to do.
    "stored, shared out": Case(
        "gpt2", "mezo-svrg", (*STORED, "algorithm.q=4", "algorithm.weight_decay=0.9", "distributed.variant_groups=4")
    ),
    "decay": Case("gpt2", "mezo-svrg", (*SVRG_RATES, "algorithm.anchor=auto", "algorithm.weight_decay=0.2")),
    "auto rate": Case(  # it looks back after 4 steps
        "opt", "mezo", ("algorithm.lr=auto", "algorithm.directions=4", "algorithm.one_sided=true", "train.batch_size=2")
    ),
    "auto rates, calibrated": Case(
        "distilbert",
        "mezo-svrg",
        (
            *AUTO,
            *("algorithm.directions=2", "algorithm.anchor_directions=2", "train.calibrate=true", "train.batch_size=2"),
        ),
    ),
    "auto rates, per sample": Case(
        "llama", "mezo-svrg", ("law=lowrank", "algorithm.per_sample=true", *AUTO, "train.batch_size=2")
    ),
    "two rounds": Case("opt", "mezo-svrg-released", ("algorithm.lr=1e-3", "algorithm.q=3")),
}
WORLD_SIZES = ("mezo", "mezo-svrg", "per-sample", "stored, shared out", "auto rate", "auto rates, calibrated",
               "auto rates, per sample", "two rounds")  # fmt: skip
"""Run on one, two and three processes, and on every layout."""
RESUMED = ("mezo", "mezo-svrg", "bf16", "per-sample, causal", "several per sample", "every option", "stored", "decay",
           "auto rate", "auto rates, calibrated", "auto rates, per sample", "two rounds")  # fmt: skip
"""Killed, resumed, replayed and exported."""
