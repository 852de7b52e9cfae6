"""How step sizes change over a run: schedules fixed in advance, and annealing on a plateau of the training loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from mezo_dist.algorithms.ranges import MANY, check_ranges


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


@dataclass(frozen=True)
class Annealing:
    """The paper's plateau rule (arXiv 2404.08080): divide the learning rates when the training loss stops falling.

    Once per window of `window` steps, the mean loss of the last window is compared with that of the window two
    before it; if the ratio exceeds `threshold`, all learning rates are divided by `divisor`.
    """

    divisor: float = 5.0
    """What the learning rates are divided by on a plateau; 1 switches annealing off."""
    window: int = 8
    """Length of a window in steps (the released code: one epoch of minibatches)."""
    threshold: float = 1.05
    """Ratio of mean losses above which the loss counts as no longer falling."""

    def __post_init__(self) -> None:
        check_ranges(self, divisor=(1, 10**6), window=(1, 10**6), threshold=(1e-6, 10**6))


@dataclass(frozen=True)
class Plateau:
    """State of `Annealing`: the current factor on the learning rates and the losses of the last three windows."""

    factor: float = 1.0
    losses: tuple[float, ...] = ()
    num_seen: int = 0

    def after(self, loss: float, rule: Annealing) -> Plateau:
        """The state after one more step with training loss ``loss``."""
        span = 3 * rule.window
        losses = (*self.losses, loss)[-span:]
        seen = replace(self, losses=losses, num_seen=self.num_seen + 1)
        if rule.divisor == 1 or seen.num_seen % rule.window or len(losses) < span:
            return seen
        earlier, latest = sum(losses[: rule.window]), sum(losses[-rule.window :])
        return replace(seen, factor=self.factor / rule.divisor) if latest > rule.threshold * earlier else seen
