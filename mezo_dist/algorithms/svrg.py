"""MeZO-SVRG: MeZO with full-batch anchors and variance reduction (Gautam et al. 2024, arXiv 2404.08080).

Every q-th step is an anchor step on all n training samples, with a fresh direction z0:

    anchor <- w;  p0 = (L_n(w + eps z0) - L_n(w - eps z0)) / (2 eps);  w <- w - anchor_lr * p0 z0

The others are inner steps on a minibatch B, with a fresh direction z:

    w <- w - lr * ((p_B(w; z) - p_B(anchor; z)) z + p0 z0)

Both estimates of an inner step use the same batch and the same direction: only then is their difference a control
variate. With several directions, each estimate is the mean over its directions.

The setting ``anchor`` says where the anchor comes from. ``replay``: it is ``w - displacement``, no copy of the weights;
the displacement is the sum of the updates since the anchor step, a combination of all their directions. ``stored``: it
is a copy, kept before the anchor step's update. They differ where adding to weights rounds, most of all in 16 bits:
there the way back along the displacement ends beside the anchor, by more than the weights have moved (relative distance
1.5e-3 against 8.8e-4), and a copy is exact.

What differs from the paper, or is left open there:

* An anchor step skips its minibatch: that of step t is drawn for step t alone, and a step that evaluates the full batch
  does not use it. With q = 2, half of all minibatches are never seen.
* q counts from the last anchor. If an anchor step has to be skipped (a loss that is not finite), the next step becomes
  the anchor step.
* With ``train.full_size`` below the number of training samples, every anchor step draws that many samples afresh.
* ``momentum`` is a normalised mean over a window, see `mezo_dist.algorithms.momentum`.
* The plateau rule compares the losses of anchor steps alone, see `mezo_dist.algorithms.schedules.Annealing`.
"""

from __future__ import annotations

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
from mezo_dist.algorithms.base import Evaluation, Losses, Problem, Update, Variant
from mezo_dist.algorithms.decay import Decay, check_decay
from mezo_dist.algorithms.look_back import LookBack
from mezo_dist.algorithms.momentum import Momentum, Past
from mezo_dist.algorithms.operations import update_operations
from mezo_dist.algorithms.ranges import MANY, check_ranges, check_types
from mezo_dist.algorithms.schedules import Annealing, Plateau, Schedule
from mezo_dist.algorithms.spsa import Probe, check_positive, clipped, typical, zero_share
from mezo_dist.directions.combination import ZERO, Combination

DIRECTIONS_TO_REPLAY = 8
"""Up to this number, ``anchor: auto`` generates them again in every inner step rather than keep a copy of the
weights."""


@dataclass(frozen=True)
class MeZOSVRG:
    """Settings of ``algorithm.name: mezo-svrg``."""

    name: Literal["mezo-svrg"] = "mezo-svrg"
    """The algorithm."""
    lr: float | Literal["auto"] = field(default=1e-6, metadata=AUTO_IN_CONFIGS)
    """Learning rate of inner steps (the paper's eta2). ``auto``: both rates are found, step by step, from the curvature
    of the loss along the steps' directions, which their forward passes tell; schedules and `annealing` come on top. A
    config that gives neither rate means ``auto``; one that gives a number for one of them means it for both."""
    anchor_lr: float | Literal["auto"] = field(default=5e-5, metadata=AUTO_IN_CONFIGS)
    """Learning rate of anchor steps (the paper's eta1). ``auto`` together with ``lr``."""
    eta: float | None = None
    """For ``lr: auto``: the share of the best step, anchor_directions / curvature, that the q steps of a cycle take
    together, for they all go along the anchor's estimate. Null: 0.8 / sqrt(train.steps), and at most 0.1, at the start,
    and then what looking back at the last steps says was best, every 8 steps or more; a look takes two forward passes
    of a minibatch (no looks at metrics and rewards, whose share stays). A number stays what it is. Unless `schedule`
    has a warm-up, the first 8 steps of both kinds are one."""
    eps: float | Literal["auto"] = 1e-3
    """Size of the perturbation (the paper's mu). ``auto``: of 1e-3, 2e-3, 5e-3, 1e-2, 2e-2 and 5e-2, those that are not
    lost in the rounding of any trainable weight (in 16 bits 1e-3 is, on weights around 1, as those of norms are), and
    of these the one at which projected gradients of the first minibatch are least wrong, by the rounding of losses and
    by their bend. The first step takes the smallest; further rounds of it, of at least four directions for every size
    (once, and no larger than those of any step), decide for the steps after it. The log says what was chosen."""
    q: int = 2
    """The q-th step after an anchor step is the next one; 1 means full-batch steps only. An anchor step evaluates the
    full batch in place of its minibatch. One that is skipped is made up for by the next step."""
    directions: int = 1
    """Directions of an inner step (with ``per_sample``, per sample); each costs four forward passes of the minibatch,
    two if ``one_sided``."""
    anchor_directions: int = 1
    """Directions of an anchor step (with ``per_sample``, per sample); each costs two forward passes of the full batch,
    one if ``one_sided``."""
    one_sided: bool = False
    """Probe w + eps z and, once for all directions, w: cheaper for several of them, with an error of order eps."""
    per_sample: bool = False
    """Give every sample of a batch directions of its own, at the price of one sample's (needs ``law: lowrank``): an
    anchor then averages as many directions as there are training samples."""
    clip: float | None = None
    """Largest size of a projected gradient of an anchor, and of the difference of two in an inner step; what is beyond
    is cut off. Null: no limit."""
    momentum: Momentum = field(default_factory=Momentum)
    """Momentum over past estimates, a normalised mean over a window; off by default."""
    weight_decay: float = 0.0
    """Decoupled decay towards zero: each step takes off its learning rate * weight_decay * weights. Small amounts are
    saved up, and taken off when they are 2^-12 of the weights. Vectors, biases and norms are exempt. Not with
    ``anchor: replay``: no combination leads back to the anchor."""
    weight_decay_all: bool = False
    """Let vectors, biases and norms decay as well."""
    schedule: Schedule = field(default_factory=Schedule)
    """Schedule of both learning rates."""
    eps_schedule: Schedule = field(default_factory=Schedule)
    """Schedule of ``eps``."""
    annealing: Annealing = field(default_factory=Annealing)
    """The paper's plateau rule, on both learning rates, for the losses of anchor steps; on by default."""
    anchor: Literal["replay", "stored", "auto"] = "auto"
    """``replay``: the anchor is the current weights minus the updates since; no copy, but an inner step makes all their
    directions, and 16-bit weights end beside the anchor, by more than they have moved. ``stored``: each process keeps a
    copy of its shards of the trainable weights, in their dtype; exact, but sharded layouts gather twice in an inner
    step. ``auto``: stored where weights have 16 bits or decay, or where the updates of q steps have more than 8
    directions; else replay."""

    def __post_init__(self) -> None:
        check_types(self, "algorithm.")
        check_positive(self, "lr", "anchor_lr", "eta", "eps", "clip")
        check_ranges(self, "algorithm.", q=(1, MANY), directions=(1, 10_000), anchor_directions=(1, 10_000))
        self.eps_schedule.check_never_zero("eps_schedule")
        check_auto_rate(self, "lr", "anchor_lr")
        if self.lr != "auto" and self.anchor_lr != "auto":
            check_decay(self.weight_decay, self.lr, self.anchor_lr)
        if self.weight_decay and self.anchor == "replay":
            raise ValueError("algorithm.anchor: must be auto (or stored) with weight_decay: there is no way back to it")


@dataclass(frozen=True)
class SVRGState:
    """The anchor as two combinations, and the state of the plateau rule, momentum, weight decay and ``lr: auto``."""

    anchor_step: int = -1
    """Step of the last anchor; -1 before the first."""
    anchor_gradient: Combination = ZERO
    """mean_k p0_k z0_k, the full-batch estimate at the anchor."""
    displacement: Combination = ZERO
    """Current weights - anchor, where that is replayed; zero where it is stored."""
    plateau: Plateau = Plateau()
    past: Past = Past()
    decay: Decay = Decay()
    auto: AutoRate = AutoRate()
    anchor_auto: AutoRate = AutoRate()
    look_back: LookBack = LookBack()
    eps: float = 0.0
    """For ``eps: auto``, what was chosen; 0 before the first step."""


@dataclass(frozen=True)
class SVRGPlanner:
    """Planner of MeZO-SVRG."""

    config: MeZOSVRG
    problem: Problem
    rate: float = 1.0
    """Factor on both learning rates at this step, from outside of the settings: see `mezo_dist.algorithms.groups`."""
    State: ClassVar[type[SVRGState]] = SVRGState

    def init(self) -> SVRGState:
        return SVRGState()

    def _is_anchor(self, state: SVRGState, step: int) -> bool:
        # Steps are counted from the last anchor, not from step 0: the step after a skipped anchor step becomes the
        # anchor step.
        return state.anchor_step < 0 or step - state.anchor_step >= self.config.q

    def _is_stored(self) -> bool:
        """Whether the anchor is a copy: a function of the settings alone, so the same on all ranks and after any
        restart."""
        config, problem = self.config, self.problem
        if config.anchor != "auto" or config.q == 1:
            return config.anchor == "stored" and config.q > 1  # with q = 1 no step uses an anchor
        first, others = (self._number_of_seeds(is_anchor) for is_anchor in (True, False))
        remembered = config.momentum.window - 1 if config.momentum.decay else 0
        is_inexact = problem.has_16bit_weights or bool(config.weight_decay)
        return is_inexact or first + (config.q - 2 + remembered) * others > DIRECTIONS_TO_REPLAY

    def _samples(self, is_anchor: bool) -> int:
        """Number of samples with a direction each; 0: all samples share their directions."""
        if not self.config.per_sample:
            return 0
        return self.problem.full_size if is_anchor else self.problem.batch_size

    def _number_of_seeds(self, is_anchor: bool) -> int:
        directions = self.config.anchor_directions if is_anchor else self.config.directions
        return directions * max(self._samples(is_anchor), 1)

    def _probe(self, state: SVRGState, step: int) -> Probe:
        config, problem, is_anchor = self.config, self.problem, self._is_anchor(state, step)
        anchor = Variant(base="anchor") if self._is_stored() else Variant(-state.displacement)
        return Probe(
            tuple(problem.direction_seed(step, k) for k in range(self._number_of_seeds(is_anchor))),
            (state.eps or problem.perturbation(config.eps)) * config.eps_schedule.factor(step, problem.num_steps),
            "full" if is_anchor else "minibatch",
            self._samples(is_anchor),
            config.one_sided,
            bases=(Variant(),) if is_anchor else (Variant(), anchor),
            curvature=config.lr == "auto" and not problem.is_discrete,
        )

    def plan(self, state: SVRGState, step: int) -> Evaluation:
        return self._probe(state, step).evaluation()

    def update(self, state: SVRGState, step: int, rounds: Sequence[Losses]) -> Update[SVRGState] | Evaluation:
        config, probe, losses = self.config, self._probe(state, step), rounds[0]
        eta = config.eta if probe.curvature else share(config.eta, self.problem.num_steps)
        worth = equal_directions(config.anchor_directions, self._samples(True)) / config.q
        look_back = state.look_back.at_step(
            step, rounds, self.problem, self._number_of_seeds(True), worth, state.anchor_auto.recent, eta
        )
        if isinstance(look_back, Evaluation):
            return look_back
        choice = chosen_eps(config, self.problem, state.eps, rounds)
        if isinstance(choice, Evaluation):
            return choice
        is_anchor = self._is_anchor(state, step)
        projected = probe.projected(losses)
        plateau, rule = state.plateau, config.annealing
        metrics = {"loss": probe.loss(losses), "projected_gradient": typical(projected[0])}
        metrics["zero_differences"] = zero_share([p for row in projected for p in row])
        auto, anchor_auto = state.auto, state.anchor_auto
        curvature = losses.curvature
        if self.problem.is_discrete:
            curvature, worth = of_few_values(projected[0], probe.eps, self._number_of_seeds(True))
            worth /= config.q
        if is_anchor:
            base_lr, anchor_auto = settle(config.anchor_lr, anchor_auto, curvature, look_back.share, worth)
            metrics |= anchor_auto.metrics(base_lr, look_back.share)
            anchor_step = step
            plateau = plateau.after(metrics["loss"], rule, rule.losses_per_window(self.problem.epoch, config.q))
            estimate = anchor_gradient = probe.gradient(clipped(projected[0], config.clip))
        else:
            base_lr, auto = settle(config.lr, auto, curvature, look_back.share, worth)
            metrics |= auto.metrics(base_lr, look_back.share)
            anchor_step, anchor_gradient = state.anchor_step, state.anchor_gradient
            differences = [p - p0 for p, p0 in zip(*projected, strict=True)]
            estimate = probe.gradient(clipped(differences, config.clip)) + anchor_gradient
            metrics["projected_difference"] = typical(differences)
        gradient, past = state.past.with_now(estimate, config.momentum)
        schedule = config.schedule.factor(step, self.problem.num_steps)
        schedule *= (anchor_auto if is_anchor else auto).warm_up(config.schedule)
        lr = base_lr * schedule * state.plateau.factor * self.rate
        combination = -lr * gradient
        if eta is None:
            look_back = look_back.after_step(combination, schedule * state.plateau.factor * self.rate)
        is_stored = self._is_stored()
        before = ZERO if is_anchor else state.displacement
        displacement = ZERO if is_stored else before + combination
        scale, decay = state.decay.after(lr * config.weight_decay)
        eps = choice.eps if choice else state.eps
        new = SVRGState(
            anchor_step, anchor_gradient, displacement, plateau, past, decay, auto, anchor_auto, look_back, eps
        )
        exempt = not config.weight_decay_all
        copies = is_stored and is_anchor
        operations = update_operations(combination, scale=scale, exempt_vectors=exempt, copy_anchor=copies)
        notes = (*plateau.note_on(state.plateau), *([choice.note] if choice else []))
        return Update(new, operations, metrics | {"lr": lr} | plateau.metrics(rule), notes)
