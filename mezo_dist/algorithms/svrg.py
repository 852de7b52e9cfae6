"""MeZO-SVRG: MeZO with full-batch anchors and variance reduction (Gautam et al. 2024, arXiv 2404.08080).

Every q-th step is an anchor step on all n training samples, with a fresh direction z0:

    anchor <- w;  p0 = (L_n(w + eps z0) - L_n(w - eps z0)) / (2 eps);  w <- w - anchor_lr * p0 z0

The others are inner steps on a minibatch B, with a fresh direction z:

    w <- w - lr * ((p_B(w; z) - p_B(anchor; z)) z + p0 z0)

Both estimates of an inner step use the same batch and the same direction: only then is their difference a control
variate. The anchor is no copy of the weights: it is ``w - displacement``, and the displacement is the sum of the
updates since the anchor step, a combination of as many directions as there were steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from mezo_dist.algorithms.base import Evaluation, Losses, Problem, Update
from mezo_dist.algorithms.schedules import Annealing, Plateau, Schedule
from mezo_dist.algorithms.spsa import check_positive, gradient, pair, projected_gradients
from mezo_dist.directions.combination import ZERO, Combination


@dataclass(frozen=True)
class SvrgConfig:
    """Settings of ``algorithm.name: mezo-svrg``."""

    name: Literal["mezo-svrg"] = "mezo-svrg"
    """The algorithm."""
    lr: float = 1e-6
    """Learning rate of inner steps (the paper's eta2)."""
    anchor_lr: float = 5e-5
    """Learning rate of anchor steps (the paper's eta1)."""
    eps: float = 1e-3
    """Size of the perturbation (the paper's mu)."""
    q: int = 2
    """Every q-th step is an anchor step; 1 means full-batch steps only."""
    anchor_directions: int = 1
    """Directions of an anchor step; each costs two forward passes of the full batch."""
    schedule: Schedule = field(default_factory=Schedule)
    """Schedule of both learning rates."""
    annealing: Annealing = field(default_factory=Annealing)
    """The paper's plateau rule, on both learning rates."""

    def __post_init__(self) -> None:
        check_positive(self, "lr", "anchor_lr", "eps", "q", "anchor_directions")


@dataclass(frozen=True)
class SvrgState:
    """The anchor as two combinations, and the plateau rule."""

    anchor_step: int = -1
    """Step of the last anchor; -1 before the first."""
    anchor_gradient: Combination = ZERO
    """mean_k p0_k z0_k, the full-batch estimate at the anchor."""
    displacement: Combination = ZERO
    """Current weights - anchor."""
    plateau: Plateau = Plateau()


@dataclass(frozen=True)
class Svrg:
    """Planner of MeZO-SVRG."""

    config: SvrgConfig
    problem: Problem
    State = SvrgState

    def init(self) -> SvrgState:
        return SvrgState()

    def _is_anchor(self, state: SvrgState, step: int) -> bool:
        # Counted from the last anchor, not from step 0: if an anchor step had to be skipped, the next one is it.
        return state.anchor_step < 0 or step - state.anchor_step >= self.config.q

    def _anchor_seeds(self, step: int) -> list[int]:
        return [self.problem.direction_seed(step, k) for k in range(self.config.anchor_directions)]

    def plan(self, state: SvrgState, step: int) -> Evaluation:
        eps = self.config.eps
        if self._is_anchor(state, step):
            return Evaluation(tuple(v for seed in self._anchor_seeds(step) for v in pair(seed, eps)), "full")
        seed = self.problem.direction_seed(step)
        return Evaluation(pair(seed, eps) + pair(seed, eps, base=-state.displacement))

    def update(self, state: SvrgState, step: int, rounds: Sequence[Losses]) -> Update:
        losses = rounds[0].mean
        projected = projected_gradients(losses, self.config.eps)
        factor = self.config.schedule.factor(step, self.problem.num_steps) * state.plateau.factor
        is_anchor = self._is_anchor(state, step)
        if is_anchor:
            lr, loss = self.config.anchor_lr * factor, sum(losses) / len(losses)
            anchor_step, before = step, ZERO
            anchor_gradient = estimate = gradient(self._anchor_seeds(step), projected)
        else:
            lr, loss = self.config.lr * factor, (losses[0] + losses[1]) / 2
            anchor_step, before, anchor_gradient = state.anchor_step, state.displacement, state.anchor_gradient
            difference = Combination.single(self.problem.direction_seed(step), projected[0] - projected[1])
            estimate = difference + anchor_gradient
        combination = -lr * estimate
        new = SvrgState(
            anchor_step, anchor_gradient, before + combination, state.plateau.after(loss, self.config.annealing)
        )
        metrics = {"loss": loss, "projected_gradient": projected[0], "lr": lr}
        return Update(new, combination, metrics if is_anchor else metrics | {"projected_anchor": projected[1]})
