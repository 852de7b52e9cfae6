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

_positions: ContextVar[Tensor | None] = ContextVar("readout_positions", default=None)


@dataclass(frozen=True, eq=False)
class SlicedHead:
    """Replaces a head's ``forward``: only the outputs ``rows`` are computed, in that order."""

    head: nn.Linear
    rows: Tensor
    """int64 [k]"""

    def __call__(self, hidden: Tensor) -> Tensor:
        weight = self.head.weight.index_select(0, self.rows)
        bias = None if self.head.bias is None else self.head.bias.index_select(0, self.rows)
        return F.linear(hidden, weight, bias)


class HeadSlice:
    """Attaches to a model's output head until `detach`.

    While attached, the head computes the rows ``rows`` only, at the positions set by `at` in the current context
    (each forward pass of a fan-out runs in a context of its own), or at all positions if none are set.
    """

    def __init__(self, head: nn.Linear, rows: Tensor) -> None:
        self.head = head
        self._hook = head.register_forward_pre_hook(_select_positions)
        head.forward = SlicedHead(head, rows)  # type: ignore[method-assign, assignment]

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
        self._hook.remove()
        del self.head.forward


def _select_positions(head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    positions = _positions.get()
    if positions is None:
        return None
    hidden, *rest = args
    return (hidden[torch.arange(len(positions), device=hidden.device), positions].unsqueeze(1), *rest)
