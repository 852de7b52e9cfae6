"""First-order baselines: SGD and AdamW on the exact gradient, with the batches, schedules and logs of the others.

    g  = gradient of the minibatch's loss, by back-propagation
    w <- w - lr * (what torch.optim.SGD or torch.optim.AdamW makes of g)

They are what forward passes are held against, and nothing here is built on them. A planner says when the gradient is
wanted and how far to go; `mezo_dist.baselines` computes gradients and lets torch's optimisers take the steps. Weights
cannot be computed again from logged losses, as those of the other algorithms can: they come from snapshots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from mezo_dist.algorithms.base import Evaluation, Losses, Problem, Update, Variant
from mezo_dist.algorithms.decay import check_decay
from mezo_dist.algorithms.operations import OptimizerStep
from mezo_dist.algorithms.ranges import check_ranges, check_types
from mezo_dist.algorithms.schedules import Schedule
from mezo_dist.algorithms.spsa import check_positive


@dataclass(frozen=True)
class SGD:
    """Settings of ``algorithm.name: sgd``, the first-order baseline by torch.optim.SGD. Dropout is off, as it is for
    all algorithms."""

    name: Literal["sgd"] = "sgd"
    """The algorithm."""
    lr: float = 1e-3
    """Learning rate."""
    momentum: float = 0.0
    """Factor by which the sum of past gradients decays at each step (0: no momentum)."""
    weight_decay: float = 0.0
    """This times the weights is added to their gradient. Vectors, biases and norms are exempt."""
    weight_decay_all: bool = False
    """Let vectors, biases and norms decay as well."""
    clip: float | None = None
    """Largest norm of the gradient of all weights together; a longer one is shortened to it. Null: no limit."""
    schedule: Schedule = field(default_factory=Schedule)
    """Schedule of the learning rate."""

    def __post_init__(self) -> None:
        check_types(self, "algorithm.")
        check_positive(self, "lr", "clip")
        check_ranges(self, "algorithm.", momentum=(0, 1))
        check_decay(self.weight_decay, self.lr)


@dataclass(frozen=True)
class AdamW:
    """Settings of ``algorithm.name: adamw``, the first-order baseline by torch.optim.AdamW (Loshchilov and Hutter 2019,
    arXiv 1711.05101). Dropout is off, as it is for all algorithms."""

    name: Literal["adamw"] = "adamw"
    """The algorithm."""
    lr: float = 1e-5
    """Learning rate."""
    beta1: float = 0.9
    """Decay of the mean of past gradients (0..1)."""
    beta2: float = 0.999
    """Decay of the mean of their squares (0..1)."""
    epsilon: float = 1e-8
    """Added to the root of that mean, so that nothing is divided by zero."""
    weight_decay: float = 0.0
    """Decoupled decay towards zero: each step takes off lr * weight_decay * weights. Vectors, biases and norms are
    exempt."""
    weight_decay_all: bool = False
    """Let vectors, biases and norms decay as well."""
    clip: float | None = None
    """Largest norm of the gradient of all weights together; a longer one is shortened to it. Null: no limit."""
    schedule: Schedule = field(default_factory=Schedule)
    """Schedule of the learning rate."""

    def __post_init__(self) -> None:
        check_types(self, "algorithm.")
        check_positive(self, "lr", "clip", "epsilon")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"algorithm.{name}: must be at least 0 and below 1, not {getattr(self, name)!r}")
        check_decay(self.weight_decay, self.lr)


@dataclass(frozen=True)
class FirstOrderState:
    """Nothing: the statistics of an optimiser are as large as the weights, and are kept beside these."""


@dataclass(frozen=True)
class FirstOrderPlanner:
    """Planner of all first-order baselines."""

    config: SGD | AdamW
    problem: Problem
    State: ClassVar[type[FirstOrderState]] = FirstOrderState

    def init(self) -> FirstOrderState:
        return FirstOrderState()

    def plan(self, state: FirstOrderState, step: int) -> Evaluation:
        return Evaluation((Variant(),), gradient=True)

    def update(self, state: FirstOrderState, step: int, rounds: Sequence[Losses]) -> Update[FirstOrderState]:
        config, (losses,) = self.config, rounds
        norm = losses.gradient_norm
        if norm is None:
            raise ValueError("a first-order step needs the norm of the gradient")
        lr = config.lr * config.schedule.factor(step, self.problem.num_steps)
        scale = config.clip / norm if config.clip is not None and norm > config.clip else 1.0
        metrics = {"loss": losses.mean[0], "gradient_norm": norm, "lr": lr}
        return Update(state, (OptimizerStep(lr, scale),), metrics)
