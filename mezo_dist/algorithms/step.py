"""One optimisation step, whoever takes it: the rounds of forward passes, and the update that their losses give.

`mezo_dist.runs.training`, `mezo_dist.optim`, the studies and the benchmarks differ in how they evaluate a round. What
they do with the answer is here. What an update does to weights is in `mezo_dist.algorithms.operations`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

from mezo_dist.algorithms.base import Algorithm, Evaluation, Losses, StateT, Update
from mezo_dist.algorithms.operations import EditableWeights, apply_updates
from mezo_dist.directions.combination import CoefficientError

Evaluate = Callable[[Evaluation, int], "Losses | None"]
"""(what to evaluate, number of the round in its step) -> losses, equal on all ranks; None if one is not finite."""


@dataclass(frozen=True)
class StepResult(Generic[StateT]):
    """The outcome of a step. Nothing has been done to the weights yet."""

    step: int
    rounds: tuple[Losses, ...]
    """The losses of its rounds, as far as they are finite."""
    update: Update[StateT] | None
    """None: the step is skipped, on all ranks alike."""
    skipped: str = ""
    """Why there is no update; empty if there is one."""


def run_step(algorithm: Algorithm[StateT], state: StateT, step: int, evaluate: Evaluate) -> StepResult[StateT]:
    """Plan a step, evaluate its rounds one after another, and turn their losses into an update.

    A loss, or a coefficient made of losses, that is not finite makes the step a skipped one: its update would destroy
    the weights.

    Args:
        algorithm: the planner.
        state: the planner's, after the steps before.
        step: number of the step (0-based).
        evaluate: runs the forward passes of a round.
    """
    rounds: list[Losses] = []
    request: Evaluation | Update[StateT] = algorithm.plan(state, step)
    while isinstance(request, Evaluation):
        losses = evaluate(request, len(rounds))
        if losses is None or not all(map(math.isfinite, losses.mean)):
            return StepResult(step, tuple(rounds), None, "a loss is not finite")
        if losses.gradient_norm is not None and not math.isfinite(losses.gradient_norm):
            return StepResult(step, tuple(rounds), None, "the gradient is not finite")
        rounds.append(losses)
        try:
            request = algorithm.update(state, step, rounds)
        except CoefficientError as error:
            return StepResult(step, tuple(rounds), None, str(error))
    return StepResult(step, tuple(rounds), request)


@dataclass
class Progress(Generic[StateT]):
    """Where a run is."""

    state: StateT
    """State of the planner after the steps done."""
    step: int = 0
    """Steps done."""
    skipped: int = 0
    skipped_in_a_row: int = 0

    def after(self, update: Update[StateT] | None) -> None:
        """Count one more step; None: a skipped one, after which the state is as it was before."""
        self.step += 1
        if update is None:
            self.skipped += 1
            self.skipped_in_a_row += 1
        else:
            self.state = update.state
            self.skipped_in_a_row = 0


def take_step(
    algorithm: Algorithm[StateT],
    progress: Progress[StateT],
    evaluate: Evaluate,
    weights: EditableWeights,
    run_seed: int,
) -> StepResult[StateT]:
    """`run_step`, with its update done to ``weights`` and counted in ``progress``.

    Args:
        algorithm: the planner.
        progress: where the run is; moved one step on.
        evaluate: runs the forward passes of a round.
        weights: changed in place, unless the step is skipped.
        run_seed: seed of the run.
    """
    result = run_step(algorithm, progress.state, progress.step, evaluate)
    if result.update is not None:
        apply_updates(weights, run_seed, [(result.step, result.update.operations)])
    progress.after(result.update)
    return result
