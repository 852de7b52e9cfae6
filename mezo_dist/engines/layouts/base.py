"""Where weights live: what a layout is, and the pieces that ranks own.

An engine (`mezo_dist.engines.engine`) evaluates variants of weights and adds combinations to them; its layout says
where those weights are: a copy in every process (`replicated`), FSDP2's shards (`fsdp`) or ZeRO-3's (`zero`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mezo_dist.engines.hooked import Weight
from mezo_dist.engines.units import Unit


@dataclass(frozen=True, eq=False)
class Shard:
    """The contiguous piece of one parameter that a rank owns. Padding that an engine adds is no part of it."""

    name: str
    """Canonical name of the parameter."""
    param_id: int
    """See `mezo_dist.directions.seeds.param_id`."""
    shape: torch.Size
    """Shape of the full parameter."""
    offset: int
    """Index of the first element in the flattened full parameter."""
    tensor: Tensor
    """The elements themselves, contiguous, of any shape (and perhaps none), where they live: writing to it changes the
    weights. Valid until the next shard is asked for, or longer (see ``stays``): only then do shards that live on NVMe
    go back there."""
    is_first: bool = True
    """False where another rank's copy of the same piece is the one that sums count."""
    stays: bool = True
    """The tensor stays valid when the next shard is asked for."""


def exchange_contents(shards: Iterator[Shard], others: dict[str, Tensor]) -> None:
    """See `Layout.exchange`: by copying, which works wherever shards live."""
    for shard in shards:
        if shard.name in others:
            other = others[shard.name]
            before = shard.tensor.clone()
            shard.tensor.copy_(other)
            other.copy_(before)


class Layout(Protocol):
    """Where the weights of a model live, and how those of one unit come together on every rank.

    `start`, `finish` and `release` are collective: the ranks that share a copy of the weights call them for the same
    units in the same order.
    """

    @property
    def units(self) -> Sequence[Unit]:
        """All units of the model, in its order of modules."""

    @property
    def is_sharded(self) -> bool:
        """Weights are whole only between `start` and `release`."""

    @property
    def gather_dtype(self) -> torch.dtype | None:
        """dtype to which floating-point weights are cast before they are gathered; None: they are gathered as they
        are."""

    def describe(self, weight: Weight) -> tuple[torch.dtype, torch.device]:
        """Dtype and device that ``weight`` has while its unit is whole; asked at any time."""

    def synchronize(self, what: str) -> None:
        """Wait for the ranks that gather with this one, those of its copy of the weights, to come here for the same
        reason. Raises OutOfStepError if one of them has another."""

    def start(self, unit: Unit) -> None:
        """Begin to gather the weights of ``unit``; they may be used after `finish`."""

    def finish(self, unit: Unit) -> None:
        """Wait for what `start` began. The unit's modules hold whole weights now (`Weight.tensor`)."""

    def release(self, unit: Unit) -> None:
        """Free the gathered weights; the shards stay."""

    def back_propagating(self) -> AbstractContextManager[None]:
        """Within, the model is called and back-propagated through by itself, without `start`, `finish` and `release`:
        gradients of shards (DTensors) are means over the ranks when a backward pass ends, those of whole weights are
        this rank's, and those of ZeRO's partitions are in DeepSpeed's engine. All ranks run equally many passes."""

    def shards(self) -> Iterator[Shard]:
        """What this rank owns of every parameter, frozen ones too, in the order of the model's parameters."""

    def exchange(self, others: dict[str, Tensor]) -> None:
        """Let the contents of this rank's shards of some parameters, and of ``others`` (by name), change places."""

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Canonical name and full tensor of every parameter in the dtype it is kept in, one after another; collective.

        A tensor is valid until the next one is asked for.
        """

    def total(self, value: int) -> int:
        """Sum over the ranks, modulo 2**64, where each rank's value covers its first copies (`Shard.is_first`) alone;
        collective."""
