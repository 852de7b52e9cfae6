"""The algorithms on any function of named tensors: no model, no gradient, nothing but values.

    minimum = minimize(cost, {"gain": torch.zeros(4)}, MeZO(lr=0.1, eps=0.1), steps=100)

The function may be a simulation, a metric, a program on another machine. `mezo_dist.runs.training` is for language
models: it shards them, shares work out over processes, logs and resumes; none of that is here.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mezo_dist import algorithms
from mezo_dist.algorithms import Settings
from mezo_dist.algorithms.auto_eps import LADDER
from mezo_dist.algorithms.base import Batch, Evaluation, Losses, Problem, Variant
from mezo_dist.algorithms.decay import check_something_decays, decays
from mezo_dist.algorithms.step import Progress, take_step
from mezo_dist.directions.add import DTYPES
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.law import Law
from mezo_dist.directions.seeds import param_ids
from mezo_dist.engines import survival
from mezo_dist.engines.layouts.base import Shard
from mezo_dist.errors import UserError
from mezo_dist.optim.checks import check_without_samples

log = logging.getLogger(__name__)
Params = dict[str, Tensor]
"""Named tensors."""


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
    """The result of `minimize`."""

    weights: Params
    losses: tuple[float, ...]
    """The loss of every step, around the weights before it; nan where the step was skipped."""
    calls: int
    """How often the function was called."""


def minimize(
    function: Callable[[Params, Draw], float],
    start: Mapping[str, Tensor],
    algorithm: Settings,
    *,
    steps: int,
    seed: int = 0,
    law: Literal["gaussian", "rademacher", "lowrank"] = "gaussian",
    direction_rank: int = 1,
    mapper: Callable[..., Iterable[float]] = map,
    after_step: Callable[[int, Params, dict[str, float]], object] | None = None,
    max_skipped: int = 10,
) -> Minimum:
    """Make ``function`` small, by calling it.

    The same arguments give the same weights, bit for bit, if the function is deterministic.

    Args:
        function: called with the parameters (a dict of tensors of the shapes of ``start``, which it may keep or change)
            and a `Draw`; it returns a number. A number that is not finite makes the step a skipped one.
        start: named tensors, fp32, bf16 or fp16 (fp32 is best: 16 bits lose small updates, though bf16 is rounded
            stochastically); they are not changed. Names are part of what a seed means.
        algorithm: settings of any algorithm, such as ``MeZO(lr=1e-2)``.
        steps: how many.
        seed: of the directions.
        law: of the directions.
        direction_rank: of low-rank directions.
        mapper: calls the function on all variants of a step; `map`, or the ``map`` of an executor of
            `concurrent.futures`, for which the function must be importable. There are as many copies of the weights.
        after_step: called with the number of steps done, the weights (not to be changed) and the algorithm's metrics.
        max_skipped: steps in a row that may be skipped.

    Raises:
        UserError: settings or tensors that cannot be used, a function that returns no number, or too many steps in a
            row without a finite value.

    >>> import torch
    >>> from mezo_dist import MeZO, minimize
    >>> target = torch.tensor([1.0, -2.0, 3.0])
    >>> def distance(params, draw):
    ...     return float((params["x"] - target).abs().sum())
    >>> minimum = minimize(distance, {"x": torch.zeros(3)}, MeZO(lr=0.02), steps=500)
    >>> bool(distance(minimum.weights, None) < 0.3), minimum.calls
    (True, 1000)
    """
    params = _copies(start)
    check_without_samples(algorithm)
    weights = _Weights(params, Law(law, direction_rank), param_ids(params))
    check_something_decays(algorithm, [(name, tensor.dim()) for name, tensor in params.items()])
    planner = algorithms.build(algorithm.name, algorithm, weights.problem(algorithm, seed, steps))
    progress, evaluator, losses = Progress(planner.init()), _Evaluator(function, mapper, weights), []
    while progress.step < steps:
        evaluator.step = progress.step
        update = take_step(planner, progress, evaluator, weights, seed).update
        for text in update.notes if update else ():
            log.info("step %d: %s", progress.step, text)
        _check_skips(progress, max_skipped)
        losses.append(update.metrics["loss"] if update else math.nan)
        if after_step is not None:
            after_step(progress.step, params, update.metrics if update else {})
    return Minimum(params, tuple(losses), evaluator.calls)


def _check_skips(progress: Progress[object], max_skipped: int) -> None:
    """Raises UserError if the last ``max_skipped`` steps were all skipped."""
    if progress.skipped_in_a_row >= max_skipped:
        raise UserError(
            f"max_skipped: {max_skipped} steps in a row had no finite value, the last one step {progress.step}; "
            "the learning rate or eps is probably too large"
        )


def _number(value: Any) -> float:
    """What the function returned. Raises UserError if that is no number."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        what = "None" if value is None else f"a {type(value).__name__}{shape}"
        raise UserError(f"the function returned {what}; it must return one number, the value to make small") from error


def _copies(start: Mapping[str, Tensor]) -> Params:
    if not isinstance(start, Mapping) or not all(isinstance(tensor, Tensor) for tensor in start.values()):
        raise UserError('start: must be a dict of named tensors, such as {"x": torch.zeros(3)}')
    params = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in start.items()}
    for name, tensor in params.items():
        if tensor.dtype not in DTYPES:
            raise UserError(f"start: {name!r} is {tensor.dtype}; use float32, bfloat16 or float16")
    return params


@dataclass(frozen=True, eq=False)
class _Weights:
    """Named tensors that variants are made of and operations done to; see `EditableWeights`."""

    params: Params
    law: Law
    ids: dict[str, int]
    anchor: Params = dataclasses.field(default_factory=dict)

    def problem(self, algorithm: Settings, seed: int, steps: int) -> Problem:
        """What an algorithm may know.

        Args:
            algorithm: its settings.
            seed: of the directions.
            steps: how many.

        Raises:
            UserError: ``eps: auto``, and the perturbation is lost at every eps.
        """
        has_16bit_weights = any(tensor.dtype != torch.float32 for tensor in self.params.values())
        eps = None
        if algorithm.eps == "auto":
            shards = [Shard(name, self.ids[name], tensor.shape, 0, tensor) for name, tensor in self.params.items()]
            sums = survival.measure_settings(shards, self.law, algorithm, LADDER, seed=seed)
            eps = survival.choose(survival.combined([sums]), LADDER)
        return Problem(seed, steps, has_16bit_weights=has_16bit_weights, eps=eps)

    def variants(self, variants: Sequence[Variant]) -> list[Params]:
        """The parameters of every variant."""
        shifted: list[Params] = [{} for _ in variants]
        for base, params in (("current", self.params), ("anchor", self.anchor)):
            chosen = [v for v, variant in enumerate(variants) if variant.base == base]
            for name, tensor in params.items() if chosen else ():
                outputs = [torch.empty_like(tensor) for _ in chosen]
                shifts = [variants[v].shift for v in chosen]
                self.law.add(tensor, shifts, outputs, param_id=self.ids[name], shape=tensor.shape)
                for v, output in zip(chosen, outputs, strict=True):
                    shifted[v][name] = output
        return shifted

    def copy_anchor(self) -> None:
        self.anchor.update({name: tensor.clone() for name, tensor in self.params.items()})

    def scale(
        self, factor: float, rounding_seed: int, *, exempt_vectors: bool, only: tuple[str, ...] | None = None
    ) -> None:
        """See `EditableWeights.scale`.

        Args:
            factor: an fp32 value.
            rounding_seed: seed of stochastic rounding.
            exempt_vectors: leave tensors with fewer than two dimensions alone.
            only: names of the tensors that are changed; all if None.
        """
        for name, tensor in self.params.items():
            if (only is not None and name not in only) or (exempt_vectors and not decays(name, tensor.dim())):
                continue
            seed = rounding_seed if tensor.dtype == torch.bfloat16 else None
            self.law.scale(tensor, factor, param_id=self.ids[name], rounding_seed=seed)

    def advance(self, updates: Sequence[tuple[Combination, int]], only: tuple[str, ...] | None = None) -> None:
        for name, tensor in self.params.items():
            if only is not None and name not in only:
                continue
            stochastic = tensor.dtype == torch.bfloat16
            rounded = [(combination, seed if stochastic else None) for combination, seed in updates]
            self.law.advance(tensor, rounded, param_id=self.ids[name], shape=tensor.shape)


@dataclass(eq=False)
class _Evaluator:
    """Calls the function on all variants of a round; see `mezo_dist.algorithms.step.Evaluate`."""

    function: Callable[[Params, Draw], float]
    mapper: Callable[..., Iterable[float]]
    weights: _Weights
    step: int = 0
    """The step that is evaluated."""
    calls: int = 0
    """How often the function was called."""

    def __call__(self, request: Evaluation, round_number: int) -> Losses:
        variants = self.weights.variants(request.variants)
        self.calls += len(variants)
        draws = [Draw(self.step, request.batch)] * len(variants)
        return Losses(tuple(map(_number, self.mapper(self.function, variants, draws))))
