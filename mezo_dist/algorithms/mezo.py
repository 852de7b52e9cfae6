"""MeZO: SGD along random directions with a two-point estimate (Malladi et al. 2023, arXiv 2305.17333).

    p_k = (L_B(w + eps z_k) - L_B(w - eps z_k)) / (2 eps)          projected gradient on minibatch B
    w  <- w - lr * mean_k p_k z_k

With ``per_sample`` the loss of sample i is probed along a direction z_i of its own: p_i = (L_i(w + eps z_i) -
L_i(w - eps z_i)) / (2 eps), and k runs over the samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from mezo_dist.algorithms.base import Evaluation, Losses, Problem, Update
from mezo_dist.algorithms.schedules import Annealing, Plateau, Schedule
from mezo_dist.algorithms.spsa import Probe, check_positive, typical


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
    per_sample: bool = False
    """Give every sample of the batch a direction of its own, at the price of one (needs ``law: lowrank``)."""
    schedule: Schedule = field(default_factory=Schedule)
    """Schedule of the learning rate."""
    annealing: Annealing = field(default_factory=lambda: Annealing(divisor=1.0))
    """Plateau rule on top of the schedule; off by default."""

    def __post_init__(self) -> None:
        check_positive(self, "lr", "eps", "directions")
        if self.per_sample and self.directions > 1:
            raise ValueError("algorithm.directions: must be 1 with per_sample, which has one direction per sample")


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

    def _probe(self, step: int) -> Probe:
        config = self.config
        number = self.problem.batch_size if config.per_sample else config.directions
        seeds = tuple(self.problem.direction_seed(step, k) for k in range(number))
        return Probe(seeds, config.eps, per_sample=config.per_sample)

    def plan(self, state: MezoState, step: int) -> Evaluation:
        return self._probe(step).evaluation()

    def update(self, state: MezoState, step: int, rounds: Sequence[Losses]) -> Update:
        probe, losses = self._probe(step), rounds[0]
        (projected,) = probe.projected(losses)
        lr = self.config.lr * self.config.schedule.factor(step, self.problem.num_steps) * state.plateau.factor
        loss = probe.loss(losses)
        return Update(
            MezoState(state.plateau.after(loss, self.config.annealing)),
            -lr * probe.gradient(projected),
            {"loss": loss, "projected_gradient": typical(projected), "lr": lr},
        )
