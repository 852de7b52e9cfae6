"""The output head, evaluated only where a task looks: at one position per sample and at the label words.

A language model's head is a large share of a small model's work (SmolLM2-135M: a fifth). Where a task needs the logits
of a few words at one position, hidden states of other positions and rows of other words are left out. The rest of
the model's code runs unmodified and sees logits of shape [n, 1, num_rows].
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezo_dist.engines.lockstep.forwards import Forward, Layer, add_layer, layer_of, remove_layer

_positions: ContextVar[Tensor | None] = ContextVar("head_slice_positions", default=None)


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

    While attached, the head computes the rows ``rows`` only, at the positions set by `at` in the current context
    (each forward pass of a fan-out runs in a context of its own), or at all positions if none are set.
    """

    def __init__(self, head: nn.Linear, rows: Tensor) -> None:
        self.head = head
        add_layer(head, Layer.HEAD_ROWS, _SlicedHead(rows))
        add_layer(head, Layer.HEAD_POSITIONS, _at_positions)

    @staticmethod
    def at(positions: Tensor | None) -> Token[Tensor | None]:
        """From now on read sample i at ``positions[i]`` (int64 [n]); for forward passes of the current context."""
        return _positions.set(positions)

    @staticmethod
    def reset(token: Token[Tensor | None]) -> None:
        """Undo `at`."""
        _positions.reset(token)

    def detach(self) -> None:
        """Give the head its own forward back."""
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
    positions = _positions.get()
    if positions is not None:
        hidden = hidden[torch.arange(len(positions), device=hidden.device), positions].unsqueeze(1)
    return inner(hidden, *args, **kwargs)
