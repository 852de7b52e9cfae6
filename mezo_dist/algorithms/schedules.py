"""How step sizes change over a run: schedules fixed in advance, and annealing on a plateau of the training loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from mezo_dist.algorithms.ranges import MANY, check_ranges, check_types

FIRST_DECISION = 5
"""The window after which the plateau rule decides for the first time, as in the code released with MeZO-SVRG."""


@dataclass(frozen=True)
class Schedule:
    """Factor on learning rates, or on eps, as a function of the step."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up: constant 1, or falling to `final` along a line or half a cosine."""
    warmup_steps: int = 0
    """Steps over which the factor rises linearly from 1 / warmup_steps to 1."""
    final: float = 0.0
    """Factor at the last step of a linear or cosine schedule (0..1)."""

    def __post_init__(self) -> None:
        check_types(self)
        check_ranges(self, warmup_steps=(0, MANY), final=(0, 1))

    def check_never_zero(self, name: str) -> None:
        """Raises ValueError for the setting ``name`` if the factor falls to 0, as that of a perturbation must not."""
        if self.kind != "constant" and self.final == 0:
            raise ValueError(f"algorithm.{name}.final: must be above 0, where eps would end")

    def factor(self, step: int, num_steps: int) -> float:
        """The factor at ``step`` (0-based) of ``num_steps``."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        progress = min(1.0, (step - self.warmup_steps) / max(1, num_steps - 1 - self.warmup_steps))
        shape = 1 - progress if self.kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.final + (1 - self.final) * shape

    def smallest(self) -> float:
        """The smallest factor that any step can have."""
        return min(1 / max(1, self.warmup_steps), 1.0 if self.kind == "constant" else self.final)


@dataclass(frozen=True)
class Annealing:
    """The plateau rule of MeZO-SVRG (arXiv 2404.08080): divide the learning rates when the training loss stops falling.

    At the end of every window, from the fifth on, the mean loss of that window is compared with the mean of the window
    two before it. If it is above ``threshold`` times that, all learning rates are divided by ``divisor``, but never to
    less than ``floor`` of what they were at the start. Every division is shown in the log, and the factor is the curve
    ``annealing/factor``.

    MeZO-SVRG compares the losses of its anchor steps alone, which are losses of the full batch: minibatch losses differ
    by more than the loss falls. MeZO has nothing but minibatch losses; over a window of an epoch each training sample
    counts once, so that their mean is that of all samples.
    """

    divisor: float = 5.0
    """What the learning rates are divided by on a plateau; 1 switches annealing off."""
    window: int | None = None
    """Length of a window in steps. Null: one epoch, the steps in which minibatches go through all training samples (as
    in the paper). A shorter one takes the noise of minibatches for a plateau. `mezo_dist.Optimizer` and
    `mezo_dist.minimize` know of no epochs: 8 steps there."""
    threshold: float = 1.05
    """Ratio of mean losses above which the loss counts as no longer falling."""
    floor: float = 0.01
    """The least that annealing makes of the learning rates, as a part of what they were at the start (0..1).
    ``mezo-svrg-released`` has fixed floors in its place."""

    def __post_init__(self) -> None:
        check_types(self)
        check_ranges(self, divisor=(1, 10**6), window=(1, 10**6), threshold=(1e-6, 10**6), floor=(0, 1))

    @property
    def is_on(self) -> bool:
        """The rule can change a learning rate."""
        return self.divisor > 1

    def losses_per_window(self, epoch: int, every: int = 1) -> int:
        """How many losses make a window.

        Args:
            epoch: steps of an epoch, the window where none is set.
            every: steps from one loss that counts to the next; a window holds at least one.
        """
        return math.ceil((self.window or epoch) / every)


@dataclass(frozen=True)
class Plateau:
    """State of `Annealing`: the factor on the learning rates, and sums of the losses of windows."""

    factor: float = 1.0
    total: float = 0.0
    """Sum of the losses of the window that is going on."""
    count: int = 0
    """Number of those losses."""
    windows: tuple[float, ...] = ()
    """Sums of the last three complete windows, the newest last."""
    num_windows: int = 0
    """Windows that are complete."""

    def after(self, loss: float, rule: Annealing, window: int) -> Plateau:
        """The state after one more loss that counts; ``window`` of them make a window.

        Args:
            loss: training loss of the step.
            rule: the plateau rule.
            window: number of losses in a window.
        """
        if not rule.is_on:
            return self
        total, count = self.total + loss, self.count + 1
        if count < window:
            return replace(self, total=total, count=count)
        windows = (*self.windows, total)[-3:]
        done = Plateau(self.factor, windows=windows, num_windows=self.num_windows + 1)
        earlier, latest = windows[0], windows[-1]
        # For positive sums this is latest > threshold * earlier; a reward with its sign turned may be negative.
        has_stopped = latest > earlier + (rule.threshold - 1) * abs(earlier)
        if done.num_windows < FIRST_DECISION or not has_stopped:
            return done
        return replace(done, factor=min(self.factor, max(self.factor / rule.divisor, rule.floor)))

    def metrics(self, rule: Annealing) -> dict[str, float]:
        """What to draw a curve of; nothing, if annealing is off."""
        return {"annealing/factor": self.factor} if rule.is_on else {}

    def note_on(self, before: Plateau) -> tuple[str, ...]:
        """What to tell people of a change since ``before``; nothing, if there was none."""
        if self.factor == before.factor:
            return ()
        return (
            f"the training loss has stopped falling: learning rates are {self.factor:.3g} of what they were at the "
            "start from now on (algorithm.annealing)",
        )
