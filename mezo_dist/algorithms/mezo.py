"""MeZO: SGD along random directions with a two-point estimate (Malladi et al. 2023, arXiv 2305.17333).

    p_k = (L_B(w + eps z_k) - L_B(w - eps z_k)) / (2 eps)          projected gradient on minibatch B
    w  <- w - lr * mean_k p_k z_k
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from mezo_dist.algorithms.base import Evaluation, Losses, Problem, Update
from mezo_dist.algorithms.schedules import Annealing, Plateau, Schedule
from mezo_dist.algorithms.spsa import check_positive, gradient, pair, projected_gradients
from mezo_dist.directions.combination import Combination


@dataclass(frozen=True)
class MezoConfig:
    """Settings of ``algorithm.name: mezo``."""

    name: Literal["mezo"] = "mezo"
    """The algorithm."""
    lr: float = 1e-6
    """Learning rate."""
    eps: float = 1e-3
    """Size of the perturbation."""
    directions: int = 1
    """Directions per step; each costs two forward passes of the minibatch."""
    schedule: Schedule = field(default_factory=Schedule)
    """Schedule of the learning rate."""
    annealing: Annealing = field(default_factory=lambda: Annealing(divisor=1.0))
    """Plateau rule on top of the schedule; off by default."""

    def __post_init__(self) -> None:
        check_positive(self, "lr", "eps", "directions")


@dataclass(frozen=True)
class MezoState:
    """Only the plateau rule remembers anything."""

    plateau: Plateau = Plateau()


@dataclass(frozen=True)
class Mezo:
    """Planner of MeZO."""

    config: MezoConfig
    problem: Problem
    State = MezoState

    def init(self) -> MezoState:
        return MezoState()

    def _seeds(self, step: int) -> list[int]:
        return [self.problem.direction_seed(step, k) for k in range(self.config.directions)]

    def plan(self, state: MezoState, step: int) -> Evaluation:
        return Evaluation(tuple(v for seed in self._seeds(step) for v in pair(seed, self.config.eps)))

    def update(self, state: MezoState, step: int, rounds: Sequence[Losses]) -> Update:
        losses = rounds[0].mean
        projected = projected_gradients(losses, self.config.eps)
        lr = self.config.lr * self.config.schedule.factor(step, self.problem.num_steps) * state.plateau.factor
        loss = sum(losses) / len(losses)
        combination: Combination = -lr * gradient(self._seeds(step), projected)
        return Update(
            MezoState(state.plateau.after(loss, self.config.annealing)),
            combination,
            {"loss": loss, "projected_gradient": projected[0], "lr": lr},
        )
