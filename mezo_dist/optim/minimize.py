"""The algorithms on any function of named tensors: no model, no gradient, nothing but values.

    found = minimize(cost, {"gain": torch.zeros(4)}, MezoConfig(lr=0.1, eps=0.1), steps=100)

The function may be a simulation, a metric, a program on another machine. `mezo_dist.runs.training` is for language
models: it shards them, shares work out over processes, logs and resumes; none of that is here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mezo_dist import algorithms
from mezo_dist.algorithms.base import Algorithm, Batch, Evaluation, Losses, Problem, Update, Variant
from mezo_dist.directions.add import DTYPES
from mezo_dist.directions.combination import CoefficientError, Combination
from mezo_dist.directions.law import Field
from mezo_dist.directions.seeds import derive_seed, param_ids
from mezo_dist.errors import UserError

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Draw:
    """Which of its data a function is to use. Functions without data or chance ignore it.

    Whatever is random in a function must follow from its draw: estimates compare values of equal draws.
    """

    step: int
    batch: Batch = "minibatch"
    """``full`` for the anchors of MeZO-SVRG: all the data there is."""


@dataclass(frozen=True, eq=False)
class Minimum:
    """What `minimize` found."""

    weights: Weights
    losses: tuple[float, ...]
    """Of every step, around the weights before it; not a number where the step was skipped."""
    calls: int
    """How often the function was called."""


def minimize(
    function: Callable[[Weights, Draw], float],
    start: Mapping[str, Tensor],
    algorithm: Any,
    *,
    steps: int,
    seed: int = 0,
    law: Literal["gaussian", "rademacher", "lowrank"] = "gaussian",
    rank: int = 1,
    mapper: Callable[..., Iterable[float]] = map,
    after_step: Callable[[int, Weights, dict[str, float]], object] | None = None,
    max_skipped: int = 10,
) -> Minimum:
    """Make ``function`` small, by calling it.

    The same arguments give the same weights, bit for bit, if the function is deterministic.

    Args:
        function: value at some weights, which are its own to keep. A value that is not finite makes the step a skipped
            one.
        start: named tensors, fp32, bf16 or fp16 (fp32 is best: 16 bits lose small updates, though bf16 is rounded
            stochastically); they are not changed. Names are part of what a seed means.
        algorithm: settings of any algorithm, such as ``MezoConfig(lr=1e-2)``.
        steps: how many.
        seed: of the directions.
        law: of the directions.
        rank: of low-rank directions.
        mapper: calls the function on all variants of a step; `map`, or the ``map`` of an executor of
            `concurrent.futures`, for which the function must be importable. There are as many copies of the weights.
        after_step: called with the number of steps done, the weights (not to be changed) and the algorithm's metrics.
        max_skipped: steps in a row that may be skipped.

    Raises:
        UserError: settings or tensors that cannot be used; too many steps in a row without a finite value.
    """
    weights = _copies(start)
    if getattr(algorithm, "per_sample", False):
        raise UserError("algorithm.per_sample: a function has no samples that could be told apart; leave it out")
    at = _Arithmetic(weights, Field(law, rank), param_ids(weights), {})
    rounds = any(tensor.dtype != torch.float32 for tensor in weights.values())
    planner: Algorithm = algorithms.build(algorithm.name, algorithm, Problem(seed, steps, rounds=rounds))
    state, losses, calls, in_a_row = planner.init(), [], 0, 0

    def evaluate(request: Evaluation, step: int) -> Losses:
        nonlocal calls
        variants = at.variants(request.variants)
        calls += len(variants)
        return Losses(tuple(map(float, mapper(function, variants, [Draw(step, request.batch)] * len(variants)))))

    for step in range(steps):
        update = _step(planner, state, step, evaluate)
        if update is not None:
            state = update.state
            at.apply(update, seed, step)
        in_a_row = 0 if update else in_a_row + 1
        _check_skips(in_a_row, max_skipped, step)
        losses.append(update.metrics["loss"] if update else math.nan)
        if after_step is not None:
            after_step(step + 1, weights, update.metrics if update else {})
    return Minimum(weights, tuple(losses), calls)


def _copies(start: Mapping[str, Tensor]) -> Weights:
    weights = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in start.items()}
    for name, tensor in weights.items():
        if tensor.dtype not in DTYPES:
            raise UserError(f"start: {name!r} is {tensor.dtype}; use float32, bfloat16 or float16")
    return weights


def _check_skips(in_a_row: int, most: int, step: int) -> None:
    if in_a_row >= most:
        raise UserError(
            f"max_skipped: {most} steps in a row had no finite value, the last one step {step + 1}; "
            "the learning rate or eps is probably too large"
        )


def _step(planner: Algorithm, state: Any, step: int, evaluate: Callable[[Evaluation, int], Losses]) -> Update | None:
    """One step's update; None if a value, or a coefficient made of it, is not finite."""
    rounds: list[Losses] = []
    request: Evaluation | Update = planner.plan(state, step)
    while isinstance(request, Evaluation):
        rounds.append(evaluate(request, step))
        if not all(map(math.isfinite, rounds[-1].mean)):
            return None
        try:
            request = planner.update(state, step, rounds)
        except CoefficientError:
            return None
    return request


@dataclass(frozen=True, eq=False)
class _Arithmetic:
    """Adds combinations to named tensors."""

    weights: Weights
    field: Field
    ids: dict[str, int]
    anchor: Weights

    def variants(self, wanted: Sequence[Variant]) -> list[Weights]:
        """The weights, or the kept copy of them, plus what each variant adds."""
        made: list[Weights] = [{} for _ in wanted]
        for base in dict.fromkeys(variant.base for variant in wanted):
            own = [(v, variant.shift) for v, variant in enumerate(wanted) if variant.base == base]
            for name, tensor in (self.anchor if base == "anchor" else self.weights).items():
                outputs = [torch.empty_like(tensor) for _ in own]
                shifts = [shift for _, shift in own]
                self.field.add(tensor, shifts, outputs, param_id=self.ids[name], shape=tensor.shape)
                for (v, _), output in zip(own, outputs, strict=True):
                    made[v][name] = output
        return made

    def apply(self, update: Update, seed: int, step: int) -> None:
        """The end of a step of a run from ``seed``."""
        if update.keep:
            self.anchor.update({name: tensor.clone() for name, tensor in self.weights.items()})
        if update.scale != 1:
            self._scale(update.scale, derive_seed(seed, "decay rounding", step))
        self._add(update.combination, derive_seed(seed, "rounding", step))

    def _scale(self, factor: float, rounding_seed: int) -> None:
        """Multiply in place."""
        for name, tensor in self.weights.items():
            rounding = rounding_seed if tensor.dtype == torch.bfloat16 else None
            self.field.scale(tensor, factor, param_id=self.ids[name], rounding_seed=rounding)

    def _add(self, combination: Combination, rounding_seed: int) -> None:
        """Add ``combination`` in place."""
        for name, tensor in self.weights.items():
            rounding = rounding_seed if tensor.dtype == torch.bfloat16 else None
            self.field.add(
                tensor, [combination], [tensor], param_id=self.ids[name], shape=tensor.shape, rounding_seed=rounding
            )
