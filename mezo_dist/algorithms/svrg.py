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
from mezo_dist.algorithms.spsa import Probe, check_positive, typical
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
    per_sample: bool = False
    """Give every sample of a batch a direction of its own, at the price of one (needs ``law: lowrank``): an anchor
    then averages as many directions as there are training samples."""
    schedule: Schedule = field(default_factory=Schedule)
    """Schedule of both learning rates."""
    annealing: Annealing = field(default_factory=Annealing)
    """The paper's plateau rule, on both learning rates."""

    def __post_init__(self) -> None:
        check_positive(self, "lr", "anchor_lr", "eps", "q", "anchor_directions")
        if self.per_sample and self.anchor_directions > 1:
            raise ValueError("algorithm.anchor_directions: must be 1 with per_sample, which has one per sample")


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

    def _probe(self, state: SvrgState, step: int) -> Probe:
        config, is_anchor = self.config, self._is_anchor(state, step)
        if config.per_sample:
            number = self.problem.full_size if is_anchor else self.problem.batch_size
        else:
            number = config.anchor_directions if is_anchor else 1
        seeds = tuple(self.problem.direction_seed(step, k) for k in range(number))
        if is_anchor:
            return Probe(seeds, config.eps, "full", config.per_sample)
        return Probe(seeds, config.eps, per_sample=config.per_sample, bases=(ZERO, -state.displacement))

    def plan(self, state: SvrgState, step: int) -> Evaluation:
        return self._probe(state, step).evaluation()

    def update(self, state: SvrgState, step: int, rounds: Sequence[Losses]) -> Update:
        probe, losses = self._probe(state, step), rounds[0]
        projected = probe.projected(losses)
        factor = self.config.schedule.factor(step, self.problem.num_steps) * state.plateau.factor
        metrics = {"loss": probe.loss(losses), "projected_gradient": typical(projected[0])}
        plateau = state.plateau.after(metrics["loss"], self.config.annealing)
        if self._is_anchor(state, step):
            lr = self.config.anchor_lr * factor
            gradient = probe.gradient(projected[0])
            combination = -lr * gradient
            new = SvrgState(step, gradient, combination, plateau)
        else:
            lr = self.config.lr * factor
            here, at_anchor = projected
            difference = probe.gradient([p - p0 for p, p0 in zip(here, at_anchor, strict=True)])
            combination = -lr * (difference + state.anchor_gradient)
            new = SvrgState(state.anchor_step, state.anchor_gradient, state.displacement + combination, plateau)
            metrics["projected_difference"] = typical([p - p0 for p, p0 in zip(here, at_anchor, strict=True)])
        return Update(new, combination, metrics | {"lr": lr})
