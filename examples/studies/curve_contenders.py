"""What `learning_curves.py` compares: presets (settings, data sets, how much of everything) and contenders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mezo_dist.algorithms.first_order import SGD, AdamW
from mezo_dist.algorithms.mezo import MeZO
from mezo_dist.algorithms.schedules import Annealing, Schedule
from mezo_dist.algorithms.svrg import MeZOSVRG
from mezo_dist.algorithms.svrg_released import MeZOSVRGReleased

STEP_OF_RATES = 10**0.5
"""Ratio of neighbouring learning rates."""
EXTENSIONS = 2
"""So many rates may be added to a grid whose best one lies at its edge."""
FIRST_ORDER = {"sgd": SGD, "adamw": AdamW}
RATIOS = (50, 1000)
"""Ratios of anchor_lr and lr of MeZO-SVRG: the ends of what the paper uses (its eta1 over its eta2)."""


@dataclass(frozen=True)
class Setting:
    """A model, and which of its weights are trained."""

    overrides: tuple[str, ...]
    """Overrides of configs/quickstart.yaml."""
    zeroth_scale: float = 1.0
    """Factor on the learning rates of zeroth-order contenders, against those below."""
    first_scale: float = 1.0
    """The same for first-order contenders."""


@dataclass(frozen=True)
class CurvePreset:
    """Settings, data sets, how much of everything."""

    settings: Mapping[str, Setting]
    tasks: Mapping[str, str]
    """Task files, relative to the repository; ``tiny``: made-up sentences, and a tiny random model with them."""
    budget: int
    """Forward passes of one sample in a run."""
    eps: float
    rates: int = 4
    """Learning rates to begin with, the same number for every contender."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of the runs with the rate that was chosen; seed 0 is the one that it was chosen on."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Samples of splits; those of the task file if left out."""
    max_tokens: Mapping[str, int] = field(default_factory=dict)
    """By data set; the setting's if left out."""
    shares: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """Parts of the budget, by setting and data set; all of it if left out."""
    full_size: int = 256
    """Samples of the anchors of the per-sample MeZO-SVRG."""
    batch_size: int = 64
    looks: int = 9
    """A run is looked at when budget / 2^k of its passes are done, k = looks .. 0; 0: at the end alone."""
    untouched: Mapping[str, slice] = field(default_factory=dict)
    """By data set: rows of the task's last source, counted from the end of its permutation, in place of test samples.
    See `auto_rate.UNTOUCHED`."""
    contenders: str = "all"
    """``all``; ``recipe``: the product's, plain MeZO and AdamW; or ``per sample``: what a direction per sample is
    worth with other settings."""


@dataclass(frozen=True)
class Learner:
    """A contender: an algorithm, and what it costs."""

    label: str
    algorithm: str | Callable[[float, int, float], Any]
    """``sgd`` or ``adamw``; or from learning rate, number of steps and eps to the settings of an algorithm."""
    passes: float
    """Forward passes of one sample that a step takes, on average. A backward pass counts as two."""
    rate: Mapping[str, float]
    """Smallest learning rate of the grid, by setting."""
    batch_size: int
    law: str = "gaussian"
    full_size: int | None = None
    """Samples of an anchor; all if None."""
    share: float = 1.0
    """The part of the budget that it gets."""
    calibrated: bool = False
    """Losses and predictions; see `mezo_dist.objectives.calibration`."""

    def steps(self, budget: float) -> int:
        """That the budget allows."""
        return max(1, round(self.share * budget / self.passes))

    def rates(self, setting: str, preset: CurvePreset) -> list[float]:
        """The grid to begin with."""
        about = preset.settings[setting]
        scale = about.first_scale if self.algorithm in FIRST_ORDER else about.zeroth_scale
        return [rounded(self.rate[setting] * scale * STEP_OF_RATES**k) for k in range(preset.rates)]


def rounded(rate: float) -> float:
    """To two digits, so that it is the same number wherever it was computed or read."""
    return float(f"{rate:.2g}")


def schedule(num_steps: int) -> Schedule:
    """The schedule of all contenders: a rise over a twentieth of the steps, then a fall along a line to a fiftieth."""
    return Schedule("linear", warmup_steps=max(1, num_steps // 20), final=0.02)


def learners(preset: CurvePreset, num_train: int) -> list[Learner]:
    """The contenders of a preset."""
    if preset.contenders == "per sample":
        return _per_sample(preset)
    every = _all(preset, num_train)
    recipe = ("AdamW", f"MeZO, batch {preset.batch_size}", "MeZO, 7 one-sided, calibrated")
    return every if preset.contenders == "all" else [c for c in every if c.label in recipe]


def _all(preset: CurvePreset, num_train: int) -> list[Learner]:
    batch, few, off = preset.batch_size, preset.batch_size // 4, Annealing(divisor=1)
    full = min(preset.full_size, num_train)

    def mezo(label: str, size: int, passes: int, rates: tuple[float, float], **more: Any) -> Learner:
        share, law = more.pop("share", 1.0), more.pop("law", "gaussian")
        calibrated = more.pop("calibrated", False)

        def make(lr: float, steps: int, eps: float) -> MeZO:
            return MeZO(lr=lr, eps=eps, schedule=schedule(steps), **more)

        about = {"share": share, "calibrated": calibrated}
        return Learner(label, make, passes * size, _by_setting(*rates), size, law, **about)

    def svrg(lr: float, steps: int, eps: float) -> MeZOSVRG:
        return MeZOSVRG(lr=lr, anchor_lr=lr, eps=eps, q=2, schedule=schedule(steps), annealing=off)

    def svrg_per_sample(lr: float, steps: int, eps: float) -> MeZOSVRG:
        return dataclasses.replace(svrg(lr, steps, eps), per_sample=True)

    def svrg_several(lr: float, steps: int, eps: float) -> MeZOSVRG:
        several: dict[str, Any] = {"directions": 7, "anchor_directions": 7, "one_sided": True}
        return dataclasses.replace(svrg_per_sample(lr, steps, eps), **several)

    def released(lr: float, steps: int, eps: float) -> MeZOSVRGReleased:
        # Its own ratio of rates and its own plateau rule; it has no schedule.
        return MeZOSVRGReleased(lr=lr / 50, anchor_lr=lr, eps=eps, q=2)

    def faster_anchors(label: str, base: Learner) -> list[Learner]:
        """``base`` with inner steps at fractions of the anchor steps' rate, as in the paper."""
        return [
            dataclasses.replace(base, label=f"{label}, anchor rate {ratio} times", algorithm=_slower_inner(base, ratio))
            for ratio in RATIOS
        ]

    fzoo: dict[str, Any] = {"directions": 15, "one_sided": True, "scaling": "normalised", "law": "rademacher"}
    per_sample: dict[str, Any] = {"per_sample": True, "law": "lowrank"}
    seven: dict[str, Any] = {"directions": 7, "one_sided": True}
    calibrated: dict[str, Any] = {"calibrated": True}
    cycle, small_cycle = (2 * num_train + 4 * batch) / 2, (2 * full + 4 * batch) / 2
    seven_cycle = (8 * batch + 2 * 8 * few) / 2
    true_svrg = Learner("MeZO-SVRG", svrg, cycle, _by_setting(3e-4, 3e-3), batch)
    true_per_sample = Learner(
        "MeZO-SVRG, per sample", svrg_per_sample, small_cycle, _by_setting(1e-2, 3e-3), batch, "lowrank", full
    )
    true_calibrated = Learner("MeZO-SVRG, calibrated", svrg, cycle, _by_setting(1e-2, 3e-3), batch, **calibrated)
    return [
        Learner("AdamW", "adamw", 3 * batch, _by_setting(1e-3, 1e-3), batch),
        mezo(f"MeZO, batch {few}", few, 2, (3e-4, 1e-3)),
        mezo("MeZO, per sample", batch, 2, (1e-2, 3e-3), **per_sample),
        mezo("MeZO, per sample, a quarter of the passes", batch, 2, (1e-2, 3e-3), share=0.25, **per_sample),
        true_svrg,
        true_per_sample,
        Learner("MeZO-SVRG, released", released, cycle, _by_setting(3e-4, 3e-3), batch),
        Learner("SGD", "sgd", 3 * batch, _by_setting(3e-3, 3e-2), batch),
        mezo("normalised, 15 one-sided", few, 16, (3e-3, 1e-2), **fzoo),
        mezo(f"MeZO, batch {batch}", batch, 2, (3e-4, 1e-3)),
        mezo("MeZO, 16 directions", few, 32, (1e-3, 3e-3), directions=16),
        mezo("MeZO, 7 one-sided per sample", few, 8, (1e-2, 3e-3), **seven, **per_sample),
        mezo("MeZO, 7 one-sided", few, 8, (1e-2, 3e-3), **seven),
        Learner(
            "MeZO-SVRG, 7 one-sided per sample",
            svrg_several,
            seven_cycle,
            _by_setting(1e-2, 3e-3),
            few,
            "lowrank",
            batch,
        ),
        Learner("AdamW, calibrated", "adamw", 3 * batch, _by_setting(1e-3, 1e-3), batch, **calibrated),
        Learner("SGD, calibrated", "sgd", 3 * batch, _by_setting(3e-2, 3e-2), batch, **calibrated),
        mezo(f"MeZO, batch {few}, calibrated", few, 2, (1e-2, 1e-3), **calibrated),
        mezo("MeZO, 7 one-sided, calibrated", few, 8, (3e-2, 3e-3), **seven, **calibrated),
        mezo("MeZO, 7 one-sided, calibrated, a quarter", few, 8, (3e-2, 3e-3), share=0.25, **seven, **calibrated),
        mezo("normalised, 15 one-sided, calibrated", few, 16, (3e-2, 1e-2), **fzoo, **calibrated),
        true_calibrated,
        *faster_anchors("MeZO-SVRG", dataclasses.replace(true_svrg, rate=_by_setting(1e-3, 3e-3))),
        *faster_anchors("MeZO-SVRG, per sample", true_per_sample),
        *faster_anchors("MeZO-SVRG, calibrated", true_calibrated),
        Learner(f"AdamW, batch {few}", "adamw", 3 * few, _by_setting(1e-3, 1e-3), few),
        Learner(f"SGD, batch {few}", "sgd", 3 * few, _by_setting(3e-2, 3e-2), few),
        Learner(f"AdamW, batch {few}, calibrated", "adamw", 3 * few, _by_setting(1e-3, 1e-3), few, **calibrated),
        Learner(f"SGD, batch {few}, calibrated", "sgd", 3 * few, _by_setting(3e-2, 3e-2), few, **calibrated),
    ]


def _slower_inner(base: Learner, ratio: int) -> Callable[[float, int, float], Any]:
    """Settings of which the learning rate is that of anchor steps; inner steps have a fraction of it."""
    make = base.algorithm
    assert not isinstance(make, str)
    return lambda lr, steps, eps: dataclasses.replace(make(lr, steps, eps), lr=lr / ratio)


def _per_sample(preset: CurvePreset) -> list[Learner]:
    """Settings of a direction per sample, one changed at a time. (The rank is none: norms' directions have none.)"""

    def mezo(what: str, size: int = preset.batch_size, eps: float = preset.eps) -> Learner:
        def make(lr: float, steps: int, _: float) -> MeZO:
            return MeZO(lr=lr, eps=eps, per_sample=True, schedule=schedule(steps))

        return Learner(f"MeZO, {what}", make, 2 * size, _by_setting(1e-2, 3e-3), size, "lowrank")

    def svrg(what: str, q: int = 2, full: int = preset.full_size) -> Learner:
        def make(lr: float, steps: int, eps: float) -> MeZOSVRG:
            rule, off = schedule(steps), Annealing(divisor=1)
            return MeZOSVRG(lr=lr, anchor_lr=lr, eps=eps, q=q, per_sample=True, schedule=rule, annealing=off)

        size = preset.batch_size
        cost = (2 * full + 4 * (q - 1) * size) / q
        return Learner(f"MeZO-SVRG, {what}", make, cost, _by_setting(1e-2, 3e-3), size, "lowrank", full)

    batch, full, eps = preset.batch_size, preset.full_size, preset.eps
    return [
        mezo(f"batch {batch}, eps {eps:g}"),
        mezo(f"eps {eps / 10:g}", eps=eps / 10),
        mezo(f"eps {eps * 10:g}", eps=eps * 10),
        mezo(f"batch {batch // 4}", batch // 4),
        mezo(f"batch {batch * 4}", batch * 4),
        svrg(f"q = 2, anchors of {full}"),
        svrg(f"anchors of {full // 4}", full=full // 4),
        svrg(f"anchors of {full * 2}", full=full * 2),
        svrg("q = 5", q=5),
        svrg("q = 10", q=10),
    ]


def _by_setting(prompts: float, head: float) -> dict[str, float]:
    return {"prompts": prompts, "head": head}


TASKS = {
    "movie-sentences": "configs/tasks/movie-sentences.yaml",
    "tweets": "configs/tasks/tweets.yaml",
    "bbc-news": "configs/tasks/bbc-news.yaml",
}
MINILM = ("model.name=demo:minilm-l6", "model.head=classifier")
PRESETS = {
    # Norms alone, or the pooler and the head: what comes before is computed once per sample, and a run takes seconds.
    "cpu": CurvePreset(
        {
            "prompts": Setting(()),
            "head": Setting((*MINILM, 'model.trainable=["bert.pooler.*", "classifier.*"]')),
        },
        TASKS, budget=32768, eps=1e-2, sizes={"test": 512},
        max_tokens={"movie-sentences": 48, "tweets": 48, "bbc-news": 24},
        shares={("prompts", "bbc-news"): 0.25} | {("head", task): 0.25 for task in TASKS},
    ),
    # How far the recipe gets with more passes.
    "cpu-long": CurvePreset(
        {"prompts": Setting(())}, TASKS, budget=131072, eps=1e-2, rates=3, sizes={"test": 512}, contenders="recipe",
        max_tokens={"movie-sentences": 48, "tweets": 48, "bbc-news": 24},
    ),
    # A fresh head again, with fewer weights: the last norm and the head (1,538 to 2,693 weights).
    "cpu-few": CurvePreset(
        {"head": Setting((*MINILM, 'model.trainable=["bert.encoder.layer.5.output.LayerNorm.*", "classifier.*"]'))},
        TASKS, budget=8192, eps=1e-2, sizes={"test": 512}, contenders="recipe",
        max_tokens={"movie-sentences": 48, "tweets": 48, "bbc-news": 24},
    ),
    "cpu-per-sample": CurvePreset(
        {"prompts": Setting(())},
        {task: TASKS[task] for task in ("movie-sentences", "tweets")},
        budget=8192, eps=1e-2, sizes={"test": 512}, contenders="per sample",
        max_tokens={"movie-sentences": 48, "tweets": 48},
    ),
    # Never run: the one GPU that was there, was there for minutes.
    "gpu": CurvePreset(
        {
            "prompts": Setting(('model.trainable=["*"]', "train.micro_batch=64"), 1e-3, 3e-3),
            "head": Setting((*MINILM, 'model.trainable=["*"]', "train.micro_batch=64"), 1e-2, 1e-2),
        },
        TASKS, budget=1 << 20, eps=1e-3, full_size=512,
    ),
    "smoke": CurvePreset(
        {"prompts": Setting(()), "head": Setting(("model.head=classifier",))},
        {"tiny": "tiny"}, budget=384, eps=1e-2, rates=2, seeds=(1,), full_size=32, batch_size=16, looks=3,
    ),
}  # fmt: skip
