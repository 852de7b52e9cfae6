"""The share of the best step that ``lr: auto`` takes, adapted by looking back at what the last steps were worth.

The curvature along single directions (`mezo_dist.algorithms.auto_rate`) tells how far a step may go if its estimate
were exact. How much of that distance is right depends on how far the gradients of samples differ, and on how much is
left to learn: both are unknown before a run, and change in it. But they can be seen afterwards. Let D be the sum of the
updates of the last T steps. On samples that these steps did not use, the loss at the weights of T steps ago and at
the current ones, with the curvature c = D' G D from the same passes, gives the parabola along D, and on it

    best length of D, in lengths of D:     (L(w - D) - L(w) + c / 2) / c

It is above one where the steps were too small, and below one, or negative, where they were mostly noise. With D's
share s of the best step per direction, that length times s is the share that would have been best (for loss after these
steps; the idea of hypergradients, Baydin et al. 2018, with a whole window in place of the last step, for the noise of
which most of a single step consists). A single look is imprecise, so the share is a ratio of two decaying sums over
looks, to which the share at the start belongs with the weight of `TRUST` looks:

    share = sum(s * (gain of D)) / sum(c),      each look divided by the c that its directions have on average

Where gradients lie along what is curved most, single steps may overshoot though all of them together are too short:
with k = g' G g / (|g|^2 tr G), a step along K directions is best at the share 1 / (1 + (K + 1) k) without noise, and D,
with T steps in it, is 1 + T K k times as curved as its directions are on average. So looks tell k, and the share stays
below that; before the first look, below 1 / (K + 2), which is right for any k.

A look takes two forward passes of a minibatch after 8 steps or more. It is the one that the step uses anyway, which
the steps before have not seen in the first epoch. Later, the steps seem better than they are by a part r / N, with N
training samples, and r the variance of single samples' gradients over the square of their mean: little with `MANY`
samples, and too much with few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mezo_dist.algorithms.auto_rate import share
from mezo_dist.algorithms.base import Evaluation, Losses, Pair, Problem, Variant
from mezo_dist.directions.combination import ZERO, Combination

WINDOW = 8
"""Steps between looks, at least."""
DIRECTIONS = 16
"""Directions between looks, at least: what a window is worth rises with their number."""
EARLY = 2
"""Looks whose windows are half as long, for the share at the start may be far off."""
MEMORY = 0.9
"""Weight of a look against that of the next one."""
TRUST = 4.0
"""Looks that the share at the start counts for."""
CHANGE = 2.0
"""The most by which a look multiplies the share."""
MOST = 0.5
"""The largest share."""
MANY = 256
"""Training samples from which on they may have been seen in an epoch before."""
LEAST = 0.25
"""The smallest share, as a part of that at the start: where looks say nothing but noise, their mean is near zero."""


@dataclass(frozen=True)
class LookBack:
    """What is remembered of the steps since the last look, and of the looks before."""

    displacement: Combination = ZERO
    """The sum of the updates since the last look."""
    steps: int = 0
    """Their number."""
    shares: float = 0.0
    """The sum of the shares that they took, schedules among them."""
    gain: float = 0.0
    """Decaying sum over looks of share times gain."""
    curvature: float = 0.0
    """Decaying sum over looks of curvatures."""
    looks: int = 0
    """Looks so far."""
    alignment: float = 1.0
    """The k above: decaying mean over looks; 1, as much as it can be, before the first one."""
    share: float = 0.0
    """The share that the steps take; 0 before the first one."""

    def starting_at(self, share: float) -> LookBack:
        """With this share, before the first step; later, as it is."""
        return self if self.share else replace(self, share=share)

    def most(self, directions: float) -> float:
        """The largest share at which steps along so many directions do not overshoot, by the looks so far."""
        return min(MOST, 1 / (1 + (directions + 1) * self.alignment))

    def at_step(
        self,
        step: int,
        rounds: Sequence[Losses],
        problem: Problem,
        directions: int,
        worth: float,
        typical: float,
        eta: float | None,
    ) -> LookBack | Evaluation:
        """The state that a step goes on with; or the passes of a look, if it is time for one and they are not there.

        Args:
            step: number of the step.
            rounds: losses of the step so far: of its own evaluation, and then of the look.
            problem: what is known of the run.
            directions: of a step, those of all samples together.
            worth: the number of them that the rate is a share of.
            typical: see `after_look`.
            eta: the setting; a number is a share that stays.
        """
        start = share(eta, problem.num_steps)
        if eta is not None:
            return self.starting_at(start)
        start = min(start, LookBack().most(worth))
        state = self.starting_at(start)
        if not state.is_due(step, problem, directions):
            return state
        return state.after_look(rounds[1], typical, start, worth) if len(rounds) > 1 else state.evaluation()

    def is_due(self, step: int, problem: Problem, directions: int) -> bool:
        """Whether ``step`` has a look: not at the end of a run, for which it would come too late, and not where its
        minibatch has been seen in an epoch before, unless samples are many.

        Args:
            step: number of the step.
            problem: the number of steps, and of those in an epoch.
            directions: of a step.
        """
        window = max(WINDOW, math.ceil(DIRECTIONS / directions))
        is_new = problem.num_train is None or problem.num_train >= MANY or step < problem.epoch
        is_known = problem.num_steps > 1
        if not is_new or (is_known and problem.num_steps - step < window // 4):
            return False
        return self.steps >= (window // 2 if self.looks < EARLY else window)

    def evaluation(self) -> Evaluation:
        """The passes of a look: the weights as they were, and as they are."""
        return Evaluation((Variant(-self.displacement), Variant()), pairs=(Pair(1, 0, 1.0),))

    def after_look(self, losses: Losses, typical: float, start: float, directions: float) -> LookBack:
        """The state after a look.

        Args:
            losses: what came of `evaluation`.
            typical: curvature along one direction of length 1, the mean over recent steps.
            start: the share at the start.
            directions: the number that the rate is a share of.

        Raises:
            ValueError: the losses have no curvature.
        """
        if losses.curvature is None:
            raise ValueError("lr: auto: losses without a curvature")
        then, now = losses.mean
        expected = typical * sum(c * c for _, c in self.displacement.terms)
        first = TRUST if self.looks == 0 else 0.0
        gain, curvature = MEMORY * self.gain + first * self.share, MEMORY * self.curvature + first
        if expected > 0:
            taken = self.shares / self.steps
            gain += taken * (then - now + losses.curvature / 2) / expected
            curvature += losses.curvature / expected
        seen = replace(
            self, alignment=self._alignment(losses.curvature / expected, directions) if expected > 0 else 1.0
        )
        best = gain / curvature if curvature > 0 else self.share
        share = min(max(best, LEAST * start), self.share * CHANGE, seen.most(directions))
        return LookBack(gain=gain, curvature=curvature, looks=self.looks + 1, share=share, alignment=seen.alignment)

    def _alignment(self, ratio: float, directions: float) -> float:
        """`alignment` after a look whose D is so many times as curved as its directions are on average."""
        now = min(max((ratio - 1) / (self.steps * directions), 0.0), 1.0)
        return now if self.looks == 0 else MEMORY * self.alignment + (1 - MEMORY) * now

    def after_step(self, update: Combination, schedule: float) -> LookBack:
        """The state after a step.

        Args:
            update: what it added to the weights.
            schedule: factor on its rate.
        """
        shares = self.shares + self.share * schedule
        return replace(self, displacement=self.displacement + update, steps=self.steps + 1, shares=shares)
