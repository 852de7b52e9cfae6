"""What `estimator_quality.py` compares: presets (a model, data, how much of everything) and contenders."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from mezo_dist.algorithms.mezo import MeZO
from mezo_dist.algorithms.momentum import Momentum
from mezo_dist.algorithms.schedules import Annealing
from mezo_dist.algorithms.svrg import MeZOSVRG
from mezo_dist.algorithms.svrg_released import MeZOSVRGReleased

LEAST_CYCLES = 8


@dataclass(frozen=True)
class Preset:
    """A model, data, and how much of everything."""

    config: str
    """A config file; ``tiny``: a random model and made-up sentences."""
    overrides: tuple[str, ...]
    num_samples: int
    """Training samples, which are the full batch."""
    estimates: int
    """Estimates of each contender at each point, about; but at least `LEAST_CYCLES` cycles."""
    adamw_lr: float
    points: tuple[int, ...]
    """Steps of AdamW after which estimates are made."""
    lr: float
    """Learning rate of the steps within a cycle; as large as in training, for an anchor is as good as it is near."""
    eps: float = 1e-3
    ranks: tuple[int, ...] = ()
    """Ranks of low-rank directions, beside 1; for presets that train matrices."""


PRESETS = {
    "small": Preset("tiny", ("train.micro_batch=64",), 128, 64, 1e-3, (6,), 1e-5, ranks=(4, 16)),
    "smollm2-norms": Preset("configs/quickstart.yaml", ("train.micro_batch=32",), 256, 64, 1e-2, (0, 20), 1e-3, 1e-2),
    "minilm": Preset(
        "configs/quickstart.yaml",
        ("model.name=demo:minilm-l6", "model.head=classifier", 'model.trainable=["*"]', "train.max_tokens=64",
         "train.micro_batch=32"),
        128, 64, 2e-5, (0, 8, 24), 1e-5,
    ),
    "smollm2": Preset(
        "configs/quickstart.yaml", ('model.trainable=["*"]', "train.micro_batch=32"),
        512, 128, 1e-5, (0, 8, 24), 1e-6,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Contender:
    """An algorithm, and its share of the budget."""

    label: str
    algorithm: Any
    batch_size: int
    cycle: int = 1
    """Steps of which the estimates are taken."""
    before: int = 0
    """Steps before them."""
    law: str = "gaussian"
    rank: int = 1
    """Rank of low-rank directions."""
    calibrated: bool = False
    """Losses, and the gradient that they are held against; see `mezo_dist.objectives.calibration`."""

    def draws(self, estimates: int) -> int:
        """How many times a cycle is run."""
        return max(LEAST_CYCLES, math.ceil(estimates / (self.before + self.cycle)))


def contenders(preset: Preset, budget: float) -> list[Contender]:
    """All that can spend ``budget`` * (number of samples) sample passes on a step."""
    n, lr, eps = preset.num_samples, preset.lr, preset.eps
    off = Annealing(divisor=1)

    def mezo(label: str, passes: int, law: str = "gaussian", *, calibrated: bool = False, **settings: Any) -> Contender:
        config = MeZO(lr=lr, eps=eps, **settings)
        return Contender(label, config, int(budget * n / passes), law=law, calibrated=calibrated)

    def svrg(label: str, q: int, law: str = "gaussian", anchors: int = 1, **settings: Any) -> Contender:
        config = MeZOSVRG(lr=lr, anchor_lr=lr, eps=eps, q=q, anchor_directions=anchors, annealing=off, **settings)
        return Contender(label, config, inner_batch(q, anchors), q, law=law)

    def inner_batch(q: int, anchors: int = 1) -> int:
        """What is left for each inner step, which takes 4 batches, when the anchor has had its 2 n per direction."""
        return int((budget * q - 2 * anchors) * n / (4 * (q - 1)))

    momentum = MeZO(lr=lr, eps=eps, momentum=Momentum(0.9, 10))
    released = MeZOSVRGReleased(lr=lr, anchor_lr=lr, eps=eps, q=2, annealing=off)
    fzoo = {"directions": 15, "one_sided": True, "scaling": "normalised"}
    every = [
        mezo("MeZO", 2),
        mezo("MeZO, 4 directions", 8, directions=4),
        mezo("MeZO, 16 directions", 32, directions=16),
        mezo("MeZO, 7 one-sided", 8, directions=7, one_sided=True),
        mezo("MeZO, 15 one-sided, rademacher", 16, "rademacher", directions=15, one_sided=True),
        mezo("sign, 4 directions", 8, directions=4, scaling="sign"),
        mezo("normalised, 15 one-sided, rademacher", 16, "rademacher", **fzoo),
        Contender("MeZO, momentum 0.9 over 10", momentum, int(budget * n / 2), cycle=10, before=9),
        mezo("MeZO, low-rank", 2, "lowrank"),
        mezo("MeZO, per sample", 2, "lowrank", per_sample=True),
        *(
            dataclasses.replace(mezo(f"MeZO, per sample, rank {rank}", 2, "lowrank", per_sample=True), rank=rank)
            for rank in preset.ranks
        ),
        mezo("MeZO, 4 per sample", 8, "lowrank", per_sample=True, directions=4),
        mezo("MeZO, 7 one-sided per sample", 8, "lowrank", per_sample=True, directions=7, one_sided=True),
        mezo("MeZO, calibrated", 2, calibrated=True),
        mezo("MeZO, 7 one-sided, calibrated", 8, directions=7, one_sided=True, calibrated=True),
        mezo("MeZO, 16 directions, calibrated", 32, directions=16, calibrated=True),
        dataclasses.replace(svrg("MeZO-SVRG, q = 2, calibrated", 2), calibrated=True),
        Contender("MeZO-SVRG, released, q = 2", released, inner_batch(2), 2),
        svrg("MeZO-SVRG, q = 2", 2),
        svrg("MeZO-SVRG, q = 5", 5),
        svrg("MeZO-SVRG, q = 10, 4 anchor directions", 10, anchors=4),
        svrg("MeZO-SVRG, per sample, q = 2", 2, "lowrank", per_sample=True),
        svrg("MeZO-SVRG, per sample, q = 5", 5, "lowrank", per_sample=True),
        svrg("MeZO-SVRG, per sample, q = 10", 10, "lowrank", per_sample=True),
    ]
    return [c for c in every if 1 <= c.batch_size <= n]
