"""MeZO: SGD along random directions with a two-point estimate (Malladi et al. 2023, arXiv 2305.17333).

    p_k = (L_B(w + eps z_k) - L_B(w - eps z_k)) / (2 eps)          projected gradient on minibatch B
    w  <- w - lr * mean_k p_k z_k

With ``per_sample`` the loss of sample i is probed along a direction z_i of its own: p_i = (L_i(w + eps z_i) -
L_i(w - eps z_i)) / (2 eps), and k runs over the samples (and over the directions of each, if they have several).

Its settings, which can be combined:

* ``directions``: SPSA with n directions (Spall 1992); ``one_sided``: n + 1 forward passes for them instead of 2 n.
* ``scaling: sign``: the sign of p_k in its place. Under ``law: rademacher``, with one direction, that is the sign of
  every coordinate of the estimate (ZO-signSGD, Liu et al. 2019).
* ``scaling: normalised``: p_k over the standard deviation of all p_k of the step. With ``one_sided``, directions: 8 and
  ``law: rademacher``, this is the step of FZOO (Dang et al. 2025, arXiv 2506.09034) up to a constant in the learning
  rate, which becomes a length: steps are as long where the loss is flat as where it is steep.
* ``scaling: ranks``: the centred rank of p_k among all p_k of the step (`mezo_dist.algorithms.scaling`).
* ``clip``: a bound on the size of every p_k, so that one outlier batch cannot move the weights far.
* ``momentum``: a decaying mean of the last estimates, normalised (`mezo_dist.algorithms.momentum`).
* ``pool``: the directions come from a pool of K seeds, as in FedKSeed (Qin et al. 2023, arXiv 2312.06353). The model is
  then its base and K numbers, however many steps it took. Only so can weights be pulled back to their base
  (``pull``), as the way from there is a short combination.
* ``weight_decay``: decoupled decay towards zero (Loshchilov and Hutter 2019), on matrices, as in MeZO's code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from mezo_dist.algorithms.auto_eps import chosen_eps
from mezo_dist.algorithms.auto_rate import (
    AUTO_IN_CONFIGS,
    AutoRate,
    check_auto_rate,
    equal_directions,
    of_few_values,
    settle,
    share,
)
from mezo_dist.algorithms.base import Evaluation, Losses, Problem, Update
from mezo_dist.algorithms.decay import Decay, check_decay
from mezo_dist.algorithms.look_back import LookBack
from mezo_dist.algorithms.momentum import Momentum, Past
from mezo_dist.algorithms.operations import update_operations
from mezo_dist.algorithms.ranges import check_ranges, check_types
from mezo_dist.algorithms.scaling import Scaling, check_group, scaled
from mezo_dist.algorithms.schedules import Annealing, Plateau, Schedule
from mezo_dist.algorithms.spsa import Probe, check_positive, clipped, typical, zero_share
from mezo_dist.directions.combination import ZERO, Combination


@dataclass(frozen=True)
class MeZO:
    """Settings of ``algorithm.name: mezo``."""

    name: Literal["mezo"] = "mezo"
    """The algorithm."""
    lr: float | Literal["auto"] = field(default=1e-6, metadata=AUTO_IN_CONFIGS)
    """Learning rate. ``auto``: it is found, step by step, from the curvature of the loss along the step's directions,
    which their forward passes tell (`algorithm.eta` says how); schedules and `annealing` come on top. A config that
    gives none means ``auto``; the class, which also serves losses of which nothing is known, has 1e-6."""
    eta: float | None = None
    """For ``lr: auto``: the share of the best step, directions / curvature, that is taken (from 1 on steps go too far,
    however precise the estimates are). Null: 0.8 / sqrt(train.steps), and at most 0.1, at the start, and then what
    looking back at the last steps says was best, every 8 steps or more; a look takes two forward passes of the
    minibatch (no looks at metrics and rewards, whose share stays). A number stays what it is. Unless `schedule` has a
    warm-up, the first 8 steps are one."""
    eps: float | Literal["auto"] = 1e-3
    """Size of the perturbation. ``auto``: of 1e-3, 2e-3, 5e-3, 1e-2, 2e-2 and 5e-2, those that are not lost in the
    rounding of any trainable weight (in 16 bits 1e-3 is, on weights around 1, as those of norms are), and of these the
    one at which projected gradients of the first minibatch are least wrong, by the rounding of losses and by their
    bend. The first step takes the smallest; further rounds of it, of at least four directions for every size (once, and
    no larger than those of any step), decide for the steps after it. The log says what was chosen."""
    directions: int = 1
    """Directions per step (with ``per_sample``, per sample); each costs two forward passes of the minibatch (one, if
    ``one_sided``)."""
    one_sided: bool = False
    """Probe w + eps z and, once for all directions, w: cheaper for several of them, with an error of order eps."""
    per_sample: bool = False
    """Give every sample of the batch directions of its own, at the price of one sample's (needs ``law: lowrank``)."""
    scaling: Scaling = "plain"
    """How far to go along a direction: ``plain``, by the projected gradient; ``sign``, by its sign; ``normalised``, by
    it over the standard deviation of those of the step (the z-score); ``ranks``, by its centred rank among those of the
    step. With all but the first, the learning rate is the length of a step, whatever the loss is multiplied by. It
    helps where the loss is a reward or a metric: its differences come in a few sizes, or in sizes that mean little, and
    change theirs while the model learns; ``ranks`` is for rewards with outliers. The last two need two directions or
    more (with ``per_sample``, every sample's count). MeZO-SVRG has no such setting: its control variate is a difference
    of two estimates, which must both be measured in the same unit."""
    clip: float | None = None
    """Largest size of a projected gradient; what is beyond is cut off. Null: no limit."""
    momentum: Momentum = field(default_factory=Momentum)
    """Momentum over past estimates, a normalised mean over a window; off by default."""
    pool: int | None = None
    """Draw directions from a fixed pool of so many: all steps together then add that many numbers to the base model.
    Null: every step has directions of its own."""
    pull: float = 0.0
    """Decoupled decay towards the base model: each step takes off lr * pull * (weights - base). Needs ``pool``; an
    update generates every direction that was used so far."""
    weight_decay: float = 0.0
    """Decoupled decay towards zero: each step takes off lr * weight_decay * weights. Small amounts are saved up, and
    taken off when they are 2^-12 of the weights: fp32 factors hold little less. Vectors, biases and norms are exempt.
    """
    weight_decay_all: bool = False
    """Let vectors, biases and norms decay as well."""
    schedule: Schedule = field(default_factory=Schedule)
    """Schedule of the learning rate."""
    eps_schedule: Schedule = field(default_factory=Schedule)
    """Schedule of ``eps``."""
    annealing: Annealing = field(default_factory=lambda: Annealing(divisor=1.0))
    """Plateau rule on top of the schedule, on minibatch losses; off by default."""

    def __post_init__(self) -> None:
        check_types(self, "algorithm.")
        check_positive(self, "lr", "eta", "eps", "clip")
        check_ranges(self, "algorithm.", directions=(1, 10_000), pool=(1, 10**6))
        self.eps_schedule.check_never_zero("eps_schedule")
        if not self.per_sample:
            self.check_members()
        if not 0 <= self.pull < math.inf or (self.pull and self.pool is None):
            raise ValueError("algorithm.pull: must be at least 0, and needs algorithm.pool if it is above")
        check_auto_rate(self, "lr")
        if self.lr != "auto":
            check_decay(self.weight_decay, self.lr)
        if self.pull and self.weight_decay:
            raise ValueError("algorithm.weight_decay: does not go together with pull, which is decay towards the base")

    def check_members(self, samples: int = 1) -> None:
        """Raises ValueError, with a message that names the setting, if ``scaling`` compares more projected gradients
        than a step has: with ``per_sample``, ``samples`` times as many as there are directions."""
        members = self.directions * (samples if self.per_sample else 1)
        check_group(self.scaling, members, one_sided=self.one_sided)


@dataclass(frozen=True)
class MeZOState:
    """State of the plateau rule, momentum, ``pull``, weight decay and ``lr: auto``."""

    plateau: Plateau = Plateau()
    past: Past = Past()
    total: Combination = ZERO
    """Current weights - base; only kept for ``pull``."""
    decay: Decay = Decay()
    auto: AutoRate = AutoRate()
    look_back: LookBack = LookBack()
    eps: float = 0.0
    """For ``eps: auto``, what was chosen; 0 before the first step."""


@dataclass(frozen=True)
class MeZOPlanner:
    """Planner of MeZO."""

    config: MeZO
    problem: Problem
    rate: float = 1.0
    """Factor on the learning rate at this step, from outside of the settings: see `mezo_dist.algorithms.groups`."""
    State: ClassVar[type[MeZOState]] = MeZOState

    def __post_init__(self) -> None:
        self.config.check_members(self.problem.batch_size)

    def init(self) -> MeZOState:
        return MeZOState()

    def _probe(self, state: MeZOState, step: int) -> Probe:
        config, problem = self.config, self.problem
        samples = problem.batch_size if config.per_sample else 0
        number = config.directions * max(samples, 1)
        seeds = tuple(problem.direction_seed(step, k, config.pool) for k in range(number))
        eps = (state.eps or problem.perturbation(config.eps)) * config.eps_schedule.factor(step, problem.num_steps)
        curvature = config.lr == "auto" and not problem.is_discrete
        return Probe(seeds, eps, per_sample=samples, one_sided=config.one_sided, curvature=curvature)

    def plan(self, state: MeZOState, step: int) -> Evaluation:
        return self._probe(state, step).evaluation()

    def update(self, state: MeZOState, step: int, rounds: Sequence[Losses]) -> Update[MeZOState] | Evaluation:
        config, probe, losses = self.config, self._probe(state, step), rounds[0]
        eta = config.eta if probe.curvature else share(config.eta, self.problem.num_steps)
        worth = equal_directions(config.directions, probe.per_sample)
        look_back = state.look_back.at_step(step, rounds, self.problem, len(probe.seeds), worth, state.auto.recent, eta)
        if isinstance(look_back, Evaluation):
            return look_back
        choice = chosen_eps(config, self.problem, state.eps, rounds)
        if isinstance(choice, Evaluation):
            return choice
        (projected,) = probe.projected(losses)
        estimate = probe.gradient(scaled(clipped(projected, config.clip), config.scaling, one_sided=config.one_sided))
        gradient, past = state.past.with_now(estimate, config.momentum)
        curvature = losses.curvature
        if self.problem.is_discrete:
            curvature, worth = of_few_values(projected, probe.eps, len(probe.seeds))
        base_lr, auto = settle(config.lr, state.auto, curvature, look_back.share, worth)
        schedule = config.schedule.factor(step, self.problem.num_steps) * auto.warm_up(config.schedule)
        lr = base_lr * schedule * state.plateau.factor * self.rate
        combination = -lr * (gradient + config.pull * state.total)
        total = state.total + combination if config.pull else ZERO
        loss, rule = probe.loss(losses), config.annealing
        plateau = state.plateau.after(loss, rule, rule.losses_per_window(self.problem.epoch))
        scale, decay = state.decay.after(lr * config.weight_decay)
        metrics = {"loss": loss, "projected_gradient": typical(projected), "lr": lr}
        metrics["zero_differences"] = zero_share(projected)
        if eta is None:
            look_back = look_back.after_step(combination, schedule * state.plateau.factor * self.rate)
        return Update(
            MeZOState(plateau, past, total, decay, auto, look_back, choice.eps if choice else state.eps),
            update_operations(combination, scale=scale, exempt_vectors=not config.weight_decay_all),
            metrics | plateau.metrics(rule) | auto.metrics(base_lr, look_back.share),
            (*plateau.note_on(state.plateau), *([choice.note] if choice else [])),
        )
