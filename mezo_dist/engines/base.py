"""What an engine is: the owner of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from mezo_dist.algorithms.base import Variant
from mezo_dist.directions.combination import Combination

ItemT = TypeVar("ItemT")


class Engine(Protocol):
    """Owns a model's weights: evaluates variants of them without changing a bit, and adds combinations to them."""

    model: nn.Module

    def evaluate(
        self,
        variants: Sequence[Variant],
        items: Sequence[ItemT],
        forward: Callable[[nn.Module, ItemT], Any],
    ) -> list[list[Any]]:
        """``forward(model, item)`` for every item (a micro-batch) on every variant: ``result[item][variant]``."""

    def apply(self, combination: Combination, rounding_seed: int) -> None:
        """weights <- weights + combination, in place. ``rounding_seed`` is for stochastic rounding, where it is on."""

    def fingerprint(self) -> str:
        """16 hexadecimal digits that depend on the bits of all weights, frozen ones too, and not on their layout."""

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Canonical name and full tensor of every parameter, one after another (for export)."""
