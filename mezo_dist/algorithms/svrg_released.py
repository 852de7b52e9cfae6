"""What the code released with MeZO-SVRG does (amazon-science/mezo_svrg, 2024-06-25), for comparison; not the method.

Every q-th step is a full-batch step, as in `mezo_dist.algorithms.svrg`. The others do, on a minibatch B:

    w <- w - lr p_B(w; z1) z1      then, at the weights that are there now,
    w <- w + lr p_B(w; z2) z2      then
    w <- w - lr p0 z0

What is wrong with that, all of which is reproduced here:

* The anchor is an alias: it is a shallow copy of a list of parameters, hence always the current weights.
* The two estimates have directions of their own, z1 and z2. With the alias, the "control variate" is noise of mean
  (nearly) zero on top of p0 z0: E|v - grad|^2 / |grad|^2 was twice that of MeZO on a logistic toy, and ten times that
  of the true method.
* The annealing rule has floors, 1e-6 for ``lr`` and 1e-5 for ``anchor_lr``, which *raise* a rate that is below them.
* It compares means of the losses of all steps, those of full batches and of minibatches together.
* Full-batch steps are counted from step 0, so one that has to be skipped is not made up for.

Not reproduced, since it changes no estimate: the loss for the annealing rule is the mean of the step's first two
forward passes here, and one more forward pass after the update there. Nor are in-place perturbations and their drift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from mezo_dist.algorithms.base import Batch, Evaluation, Losses, Problem, Update, Variant
from mezo_dist.algorithms.operations import update_operations
from mezo_dist.algorithms.ranges import MANY, check_ranges, check_types
from mezo_dist.algorithms.schedules import Annealing
from mezo_dist.algorithms.spsa import Probe, check_positive, typical, zero_share
from mezo_dist.directions.combination import ZERO, Combination

LR_FLOOR, ANCHOR_LR_FLOOR = 1e-6, 1e-5


@dataclass(frozen=True)
class MeZOSVRGReleased:
    """Settings of ``algorithm.name: mezo-svrg-released``."""

    name: Literal["mezo-svrg-released"] = "mezo-svrg-released"
    """The algorithm."""
    lr: float = 1e-6
    """Learning rate of minibatch steps."""
    anchor_lr: float = 5e-5
    """Learning rate of full-batch steps."""
    eps: float = 1e-3
    """Size of the perturbation."""
    q: int = 2
    """Every q-th step is a full-batch step."""
    annealing: Annealing = field(default_factory=Annealing)
    """The plateau rule, on the losses of all steps and with the released code's floors (``floor`` has no effect)."""

    def __post_init__(self) -> None:
        check_types(self, "algorithm.")
        check_positive(self, "lr", "anchor_lr", "eps")
        check_ranges(self, "algorithm.", q=(1, MANY))


@dataclass(frozen=True)
class SVRGReleasedState:
    """The last full-batch estimate, both rates, and the losses of the last three windows."""

    full_gradient: Combination = ZERO
    lr: float = 0.0
    anchor_lr: float = 0.0
    losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class SVRGReleasedPlanner:
    """Planner of what the released code does."""

    config: MeZOSVRGReleased
    problem: Problem
    State: ClassVar[type[SVRGReleasedState]] = SVRGReleasedState

    def init(self) -> SVRGReleasedState:
        return SVRGReleasedState(lr=self.config.lr, anchor_lr=self.config.anchor_lr)

    def _probe(self, step: int, index: int = 0, base: Combination = ZERO) -> Probe:
        """What is evaluated on both sides of some weights.

        Args:
            step: number of the step.
            index: number of the direction in the step.
            base: what has been added to the weights in this step.
        """
        seeds = (self.problem.direction_seed(step, index),)
        batch: Batch = "minibatch" if step % self.config.q else "full"
        return Probe(seeds, self.config.eps, batch, bases=(Variant(base),))

    def plan(self, state: SVRGReleasedState, step: int) -> Evaluation:
        return self._probe(step).evaluation()

    def update(
        self, state: SVRGReleasedState, step: int, rounds: Sequence[Losses]
    ) -> Update[SVRGReleasedState] | Evaluation:
        annealed, first = self._annealed(state, step), self._probe(step)
        ((projected,),) = first.projected(rounds[0])
        gradient = first.gradient([projected])
        metrics = {"loss": first.loss(rounds[0]), "projected_gradient": typical([projected])}
        metrics["zero_differences"] = zero_share([projected])
        if step % self.config.q == 0:
            lr, full_gradient = annealed.anchor_lr, gradient
            combination = -lr * gradient
        else:
            lr, full_gradient = annealed.lr, annealed.full_gradient
            second = self._probe(step, 1, base=-lr * gradient)  # the first estimate has been applied by then
            if len(rounds) == 1:
                return second.evaluation()
            ((back,),) = second.projected(rounds[1])
            combination = -lr * gradient + lr * second.gradient([back]) + -lr * full_gradient
        losses = (*annealed.losses, metrics["loss"])[-3 * self._window :]
        new = SVRGReleasedState(full_gradient, annealed.lr, annealed.anchor_lr, losses)
        return Update(new, update_operations(combination), metrics | {"lr": lr}, _note(state, annealed))

    @property
    def _window(self) -> int:
        return self.config.annealing.losses_per_window(self.problem.epoch)

    def _annealed(self, state: SVRGReleasedState, step: int) -> SVRGReleasedState:
        """Decided before the step, once per window, from the fifth on."""
        rule, window = self.config.annealing, self._window
        if not rule.is_on or step <= 4 * window or step % window:
            return state
        latest, earlier = sum(state.losses[-window:]), sum(state.losses[:window])
        if latest <= rule.threshold * earlier:
            return state
        lr, anchor_lr = max(state.lr / rule.divisor, LR_FLOOR), max(state.anchor_lr / rule.divisor, ANCHOR_LR_FLOOR)
        return SVRGReleasedState(state.full_gradient, lr, anchor_lr, state.losses)


def _note(before: SVRGReleasedState, now: SVRGReleasedState) -> tuple[str, ...]:
    """What to tell people of changed rates; nothing, if they are as before."""
    if (before.lr, before.anchor_lr) == (now.lr, now.anchor_lr):
        return ()
    return (f"the training loss has stopped falling: lr is {now.lr:.3g} from now on, anchor_lr {now.anchor_lr:.3g}",)
