"""Which samples go through the frozen blocks together: what `mezo_dist.models.frozen_cache` asks of the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, final

from torch import Tensor

from mezo_dist.models.frozen_blocks import Inputs

Group = tuple[Inputs, Tensor | None]
"""A micro-batch: inputs, and the positions that its logits are read at (None for a classifier, which picks them)."""


class Groups(Protocol):
    """Micro-batches of the data, by their numbers, each of which goes through the frozen blocks at once."""

    def group(self, number: int) -> Group:
        """A micro-batch, in host memory."""

    def numbers(self, tokens: bytes) -> Sequence[int]:
        """The micro-batches that may hold a sequence, the one that counts for it first.

        Args:
            tokens: int64, as they lie in memory; no padding.
        """


@final
@dataclass(frozen=True)
class OneGroup:
    """One micro-batch, and no other."""

    only: Group

    def group(self, _: int) -> Group:
        """See `Groups`."""
        return self.only

    def numbers(self, _: bytes) -> Sequence[int]:
        """See `Groups`."""
        return (0,)
