"""From a trajectory back to weights: base + what the logged losses say was done to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mezo_dist.algorithms.base import Algorithm, Evaluation, StateT, Update
from mezo_dist.algorithms.groups import at_rates
from mezo_dist.algorithms.operations import CopyAnchor, Operation, apply_updates
from mezo_dist.algorithms.step import Progress, StepResult
from mezo_dist.engines.engine import Engine
from mezo_dist.errors import UserError
from mezo_dist.storage.trajectory import Log, Step, digest

TERMS_AT_ONCE = 4096
"""About how many terms are added in one pass over the weights; more would only take memory."""


def logged_step(result: StepResult[StateT], rates: tuple[float, ...] = ()) -> Step:
    """The line of the trajectory that a step becomes.

    Args:
        result: of the step.
        rates: learning rate of each group of weights, if they do not follow from the settings.
    """
    if result.update is None:
        return Step(result.step, (), skipped=result.skipped)
    return Step(result.step, result.rounds, digest(result.update.operations), lr=rates)


def replay_updates(
    algorithm: Algorithm[StateT], steps: Sequence[Step], progress: Progress[StateT]
) -> Iterator[Update[StateT] | None]:
    """What each of the logged steps did, None where it was skipped. ``progress`` is after the step that came last.

    Args:
        algorithm: the run's planner.
        steps: logged steps, from the first on.
        progress: counts them; it is after the step that came last.

    Raises:
        UserError: the algorithm computes something else from the losses than it did in the run.
    """
    for step in steps:
        if step.skipped:
            progress.after(None)
            yield None
            continue
        try:
            update = at_rates(algorithm, step.lr).update(progress.state, step.step, step.rounds)
            fits = not isinstance(update, Evaluation) and digest(update.operations) == step.update
        except (ValueError, ArithmeticError, LookupError, TypeError, AssertionError) as error:
            raise UserError(f"step {step.step} has losses that no step of this run can have ({error})") from error
        if isinstance(update, Evaluation) or not fits:
            raise UserError(
                f"step {step.step} is not what this version of the algorithm makes of its losses: another version of "
                "mezo_dist took it (the trajectory's header names it, CHANGELOG.md what changed), and that one can go "
                "on with the run or rebuild it; or begin anew, with --output.if_exists=new"
            )
        progress.after(update)
        yield update


def replay_steps(
    engine: Engine,
    run_seed: int,
    algorithm: Algorithm[StateT],
    recorded: Log,
    num_steps: int,
    *,
    start: int = 0,
    verify: bool = True,
    anchor: bool = False,
) -> Progress[StateT]:
    """Bring weights that are those after ``start`` steps to where they were after ``num_steps``. Collective.

    Args:
        engine: owns the weights: the base model's, or what a snapshot made of them.
        run_seed: seed of the run.
        algorithm: the run's planner.
        recorded: the trajectory.
        num_steps: at most as many as it has.
        start: steps that the weights have seen.
        verify: compare the weights with all fingerprints on the way, which costs a pass over them for each.
        anchor: also make the copies that the run made (`CopyAnchor`); a run that goes on needs the last of them.

    Raises:
        UserError: the weights are not what they were, or see `replay_updates`.
    """
    progress = Progress(algorithm.init())
    pending: list[tuple[int, Sequence[Operation]]] = []
    num_terms = 0
    for update in replay_updates(algorithm, recorded.steps[:num_steps], progress):
        if progress.step <= start:
            continue
        if update is not None:
            pending.append((progress.step - 1, update.operations))
            num_terms += len(update.combination)
        marked = verify and progress.step in recorded.marks
        if marked or num_terms >= TERMS_AT_ONCE:
            apply_updates(engine, run_seed, _with_last_copy(pending, anchor=anchor))
            pending, num_terms = [], 0
        if marked:
            _check_mark(engine, recorded.marks[progress.step].weights, progress.step)
    apply_updates(engine, run_seed, _with_last_copy(pending, anchor=anchor))
    return progress


def _with_last_copy(
    updates: Sequence[tuple[int, Sequence[Operation]]], *, anchor: bool
) -> list[tuple[int, list[Operation]]]:
    """The updates without copies that a later one replaces (without any, if no ``anchor`` is wanted)."""
    copying = [step for step, operations in updates if CopyAnchor() in operations]
    last = copying[-1] if copying and anchor else None
    return [
        (step, [o for o in operations if not isinstance(o, CopyAnchor) or step == last]) for step, operations in updates
    ]


def _check_mark(engine: Engine, recorded: str, step: int) -> None:
    """Raises UserError if the weights are not what they were in the run.

    Args:
        engine: owns the weights.
        recorded: their fingerprint in the run.
        step: steps that they have seen.
    """
    fingerprint = engine.fingerprint()
    if fingerprint != recorded:
        raise UserError(
            f"after step {step} the weights have the fingerprint {fingerprint}, but had {recorded} in the run: it was "
            "made on another kind of machine, with other software, or on a faulty one, or its weights were changed by "
            "something else than its steps"
        )
