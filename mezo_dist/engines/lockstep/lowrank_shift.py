"""A low-rank shift in activation space: what it adds to a layer's output, in place of weights that are shifted.

A low-rank direction z = U V^T of a weight matrix changes a linear layer's output by ``(x V) U^T``, and an embedding's
by ``U[ids] V^T``. Where the model is called with few tokens at a time, as in generation, that is far less work than
making the matrix anew, and it needs no memory. All samples of a pass have the same shift here;
`mezo_dist.engines.lockstep.persample` gives each its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from mezo_dist.directions.combination import Combination
from mezo_dist.engines.hooked import HookedModule, Weight
from mezo_dist.engines.lockstep.factors import Factors
from mezo_dist.engines.lockstep.passes import Call

Forward = Callable[[Call, list[Tensor]], object]
KINDS = (nn.Linear, Conv1D, nn.Embedding)


def shifts_in_activations(hooked: HookedModule) -> Weight | None:
    """The matrix of ``hooked`` whose low-rank shifts can be added to its output; None if there is none."""
    if hooked.spans_blocks or hooked.kind not in KINDS:
        return None
    return next((w for w in hooked.weights if w.attribute == "weight" and w.trainable and len(w.shape) == 2), None)


@final
class MovedOutput:
    """What a layer gives under a shift of its matrix, from what it gives on the matrix as it is. What does not depend
    on the layer's input is looked up once.

    Args:
        factors: of the run's directions (low-rank).
        hooked: the layer, of one of `KINDS`.
        matrix: its weight that moves.
        shift: by this.
        rows: the rows of the matrix that are computed; None: all.
    """

    def __init__(
        self, factors: Factors, hooked: HookedModule, matrix: Weight, shift: Combination, rows: Tensor | None
    ) -> None:
        self._factors, self._kind, self._matrix, self._shift, self._rows = factors, hooked.kind, matrix, shift, rows
        self._known: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, output: object) -> Tensor:
        """The moved output.

        Args:
            x: the layer's input.
            output: what it gives on the matrix as it is: [..., outputs].
        """
        assert isinstance(output, Tensor)
        key = output.dtype, output.device
        into, out = self._known.get(key) or self._known.setdefault(key, self._thin(output))
        if self._kind is nn.Embedding:
            inner = F.embedding(x, into).view(-1, into.shape[1])
        elif x.dim() > 1 and x.is_contiguous():  # what torch does for `@`, in fewer calls
            inner = torch.mm(x.view(-1, into.shape[0]), into)
        else:
            inner = (x @ into).view(-1, into.shape[1])
        return torch.addmm(output.reshape(-1, out.shape[1]), inner, out).view(output.shape)

    def _thin(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """[inputs, k] and [k, outputs], whose product is the shift, as a layer takes it."""
        u, v = self._factors.of_shift(self._matrix, self._shift, like)
        into, out = (v, u) if self._kind is nn.Linear else (u, v)  # the rows of other matrices belong to inputs
        return into, (out if self._rows is None else out[self._rows]).T


def with_shift(
    factors: Factors,
    hooked: HookedModule,
    matrix: Weight,
    shifts: Sequence[Combination],
    unmoved: Forward,
    rows: Tensor | None,
) -> Forward:
    """The forward of ``hooked`` under the shift of a call's variant.

    Args:
        factors: of the run's directions (low-rank).
        hooked: the module.
        matrix: its weight that moves.
        shifts: of each variant.
        unmoved: the forward on the matrix as it is.
        rows: the rows of the matrix that are computed; None: all.
    """
    moved = [MovedOutput(factors, hooked, matrix, shift, rows) if shift else None for shift in shifts]

    def forward(call: Call, tensors: list[Tensor]) -> object:
        output, move = unmoved(call, tensors), moved[call.caller.variant]
        if move is None:
            return output
        return move(call.args[0] if call.args else call.kwargs["input"], output)

    return forward
