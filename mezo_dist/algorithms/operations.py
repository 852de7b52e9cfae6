"""What an update does to the weights: a short list of operations, which one function interprets (torch-free).

An operation says what happens, not how: the owner of the weights (`EditableWeights`) knows where they live and how sums
are rounded to 16 bits. A further operation is one more class here and one more case in `apply_updates`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, Union, runtime_checkable

from mezo_dist.directions.combination import ZERO, Combination
from mezo_dist.directions.seeds import derive_seed


@dataclass(frozen=True)
class CopyAnchor:
    """Copy the weights as they are, in place of the copy made before: variants with ``base="anchor"`` start there."""


@dataclass(frozen=True)
class Scale:
    """Multiply the weights by ``factor``, an fp32 value (weight decay)."""

    factor: float
    exempt_vectors: bool = True
    """Leave vectors, biases and norms as they are: see `mezo_dist.algorithms.decay.decays`."""
    only: tuple[str, ...] | None = None
    """Names of the weights that it is done to; None: all trainable ones."""


@dataclass(frozen=True)
class Add:
    """Add ``combination`` to the weights."""

    combination: Combination
    only: tuple[str, ...] | None = None
    """Names of the weights that it is done to; None: all trainable ones."""


@dataclass(frozen=True)
class OptimizerStep:
    """Multiply the gradient that was computed by ``scale``, and let the attached optimiser of torch take one step with
    it (`mezo_dist.algorithms.first_order`)."""

    lr: float
    """Learning rate of this step."""
    scale: float = 1.0
    """What a limit on the gradient's norm leaves of it."""


Operation = Union[CopyAnchor, Scale, Add, OptimizerStep]  # noqa: UP007 (evaluated on Python 3.10 too)


class EditableWeights(Protocol):
    """Weights that operations can be done to: an engine's, or a dict of tensors."""

    def copy_anchor(self) -> None:
        """Do `CopyAnchor`."""

    def scale(
        self, factor: float, rounding_seed: int, *, exempt_vectors: bool, only: tuple[str, ...] | None = None
    ) -> None:
        """Do `Scale`; ``rounding_seed`` is for weights that are rounded stochastically.

        Args:
            factor: an fp32 value.
            rounding_seed: seed of stochastic rounding, for weights that are rounded so.
            exempt_vectors: leave weights with fewer than two dimensions alone.
            only: names of the weights that it is done to; None: all trainable ones.
        """

    def advance(self, updates: Sequence[tuple[Combination, int]], only: tuple[str, ...] | None = None) -> None:
        """Do one `Add` after another, given as (combination, rounding seed): the same bits as one call for each.

        Args:
            updates: what to add.
            only: names of the weights that it is done to; None: all trainable ones.
        """


@runtime_checkable
class OptimizedWeights(Protocol):
    """Weights with gradients beside them, and an optimiser."""

    def optimizer_step(self, lr: float, scale: float) -> None:
        """Do `OptimizerStep`. Raises RuntimeError where no optimiser is attached."""


def update_operations(
    combination: Combination, *, scale: float = 1.0, exempt_vectors: bool = True, copy_anchor: bool = False
) -> tuple[Operation, ...]:
    """The operations of a usual update, in order: copy the anchor, scale, add. What does nothing is left out.

    Args:
        combination: to be added.
        scale: factor of weight decay, an fp32 value.
        exempt_vectors: see `Scale`.
        copy_anchor: copy the weights before anything is done to them.
    """
    before: list[Operation] = [CopyAnchor()] if copy_anchor else []
    return (*before, *([Scale(scale, exempt_vectors)] if scale != 1 else []), Add(combination))


def apply_updates(weights: EditableWeights, run_seed: int, updates: Iterable[tuple[int, Sequence[Operation]]]) -> None:
    """Do the operations of one step after another.

    Additions that follow one another go to `EditableWeights.advance` together: one pass over the weights. Parts of the
    weights that operations name (``only``) are the same or have no weight in common.

    Args:
        weights: changed in place.
        run_seed: seed of the run, from which the seeds of stochastic rounding are derived.
        updates: (step, its operations), in order.
    """
    additions: dict[tuple[str, ...] | None, list[tuple[Combination, int]]] = {}

    def add_pending() -> None:
        for only, some in additions.items():
            weights.advance(some, only)
        additions.clear()

    for step, operations in updates:
        for operation in operations:
            if isinstance(operation, Add):
                if operation.combination:
                    if (operation.only is None) != (None in additions):  # whole and part must keep their order
                        add_pending()
                    seed = derive_seed(run_seed, "rounding", step)
                    additions.setdefault(operation.only, []).append((operation.combination, seed))
                continue
            add_pending()
            if isinstance(operation, Scale):
                seed = derive_seed(run_seed, "decay rounding", step)
                exempt, only = operation.exempt_vectors, operation.only
                weights.scale(operation.factor, seed, exempt_vectors=exempt, only=only)
            elif isinstance(operation, OptimizerStep):
                if not isinstance(weights, OptimizedWeights):
                    raise TypeError(f"{type(weights).__name__} has no gradients, and no optimiser")
                weights.optimizer_step(operation.lr, operation.scale)
            else:
                weights.copy_anchor()
    add_pending()


def encode(operations: Sequence[Operation]) -> bytes:
    """Bytes that tell operations from any others: seeds as 64-bit words, coefficients and factors as fp32."""
    return b"".join(_encode(operation) for operation in operations)


def _encode(operation: Operation) -> bytes:
    if isinstance(operation, CopyAnchor):
        return b"copy"
    if isinstance(operation, OptimizerStep):
        return b"optimizer" + struct.pack("<dd", operation.lr, operation.scale)
    only = b"" if operation.only is None else ("only " + " ".join(operation.only)).encode()
    if isinstance(operation, Add):
        return only + b"".join(struct.pack("<Qf", seed, c) for seed, c in operation.combination.terms)
    which = b"scale matrices" if operation.exempt_vectors else b"scale"
    return only + which + struct.pack("<f", operation.factor)


def total_added(operations: Sequence[Operation]) -> Combination:
    """The sum of all that is added."""
    return sum((o.combination for o in operations if isinstance(o, Add)), ZERO)
