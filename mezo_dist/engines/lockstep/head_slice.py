"""The output head, evaluated only where a task looks: at some positions of each sample, and at the label words.

A language model's head is a large share of a small model's work (SmolLM2-135M: a fifth). Where a task needs the logits
of a few words at one position, hidden states of other positions and rows of other words are left out. The rest of
the model's code runs unmodified and sees logits of shape [n, number of positions, number of rows].
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezo_dist.engines.lockstep.forwards import Forward, Layer, add_layer, layer_of, remove_layer


@dataclass(eq=False)
class _Places:
    """Where a forward pass looks."""

    positions: Tensor | None
    """int64 [n], or [n, m]."""
    taken: bool = False
    """A head gave these positions alone."""


_places: ContextVar[_Places | None] = ContextVar("head_slice_places", default=None)


@dataclass(frozen=True, eq=False)
class _SlicedHead:
    """A layer around a head's forward: only the outputs ``rows`` are computed, in that order."""

    rows: Tensor
    """int64 [k]"""

    def __call__(self, head: nn.Linear, inner: Forward, hidden: Tensor) -> Tensor:
        weight = head.weight.index_select(0, self.rows)
        bias = None if head.bias is None else head.bias.index_select(0, self.rows)
        return F.linear(hidden, weight, bias)


class HeadSlice:
    """Attaches to a model's output head until `detach`.

    While attached, the head computes the rows ``rows`` only (all, if None), at the positions set by `at` in the current
    context (each forward pass of a fan-out runs in a context of its own), or at all positions if none are set.
    """

    def __init__(self, head: nn.Linear, rows: Tensor | None) -> None:
        self.head, self._has_rows = head, rows is not None
        if rows is not None:
            add_layer(head, Layer.HEAD_ROWS, _SlicedHead(rows))
        add_layer(head, Layer.HEAD_POSITIONS, _at_positions)

    @staticmethod
    def at(positions: Tensor | None) -> Token[_Places | None]:
        """From now on read sample i at ``positions[i]`` (int64 [n] or [n, m]); for passes of the current context."""
        return _places.set(_Places(positions))

    @staticmethod
    def was_used() -> bool:
        """A head has computed the positions of the last `at` alone."""
        places = _places.get()
        return places is not None and places.taken

    @staticmethod
    def reset(token: Token[_Places | None]) -> None:
        """Undo `at`."""
        _places.reset(token)

    def detach(self) -> None:
        """Give the head its own forward back."""
        if self._has_rows:
            remove_layer(self.head, Layer.HEAD_ROWS)
        remove_layer(self.head, Layer.HEAD_POSITIONS)


def head_rows(module: nn.Module) -> Tensor | None:
    """The rows that ``module`` computes if it is a sliced head."""
    layer = layer_of(module, Layer.HEAD_ROWS)
    return layer.rows if isinstance(layer, _SlicedHead) else None


def _at_positions(head: nn.Module, inner: Forward, hidden: Tensor, *args: object, **kwargs: object) -> object:
    """The layer that hands a head the hidden states of the positions that `HeadSlice.at` set; all if none are set.

    Args:
        head: the output head.
        inner: the forward inside of this layer.
        hidden: [n, length, features].
    """
    places = _places.get()
    if places is not None and places.positions is not None:
        hidden, places.taken = hidden_at(hidden, places.positions), True
    return inner(hidden, *args, **kwargs)


def hidden_at(hidden: Tensor, positions: Tensor) -> Tensor:
    """[n, m, features]: of [n, length, features] sample i's at ``positions[i]``, int64 [n, m], or [n] for m = 1."""
    columns = positions.unsqueeze(1) if positions.dim() == 1 else positions
    return hidden[torch.arange(len(positions), device=hidden.device).unsqueeze(1), columns]
