"""A low-rank shift in activation space: what it adds to a layer's output, in place of weights that are shifted.

A low-rank direction z = U V^T of a weight matrix changes a linear layer's output by ``(x V) U^T``, and an embedding's
by ``U[ids] V^T``. Where the model is called with few tokens at a time, as in generation, that is far less work than
making the matrix anew, and it needs no memory. All samples of a pass have the same shift here;
`mezo_dist.engines.lockstep.persample` gives each its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from mezo_dist.directions.combination import Combination
from mezo_dist.engines.hooked import HookedModule, Weight
from mezo_dist.engines.lockstep.passes import Call
from mezo_dist.engines.lockstep.persample import Factors

Forward = Callable[[Call, list[Tensor]], object]
KINDS = (nn.Linear, Conv1D, nn.Embedding)


def shifts_in_activations(hooked: HookedModule) -> Weight | None:
    """The matrix of ``hooked`` whose low-rank shifts can be added to its output; None if there is none."""
    if hooked.spans_blocks or hooked.kind not in KINDS:
        return None
    return next((w for w in hooked.weights if w.attribute == "weight" and w.trainable and len(w.shape) == 2), None)


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

    def forward(call: Call, tensors: list[Tensor]) -> object:
        output, shift = unmoved(call, tensors), shifts[call.caller.variant]
        if not shift:
            return output
        x = call.args[0] if call.args else call.kwargs["input"]
        return moved_output(factors, hooked.kind, matrix, shift, x, output, rows)

    return forward


def moved_output(
    factors: Factors,
    kind: type[nn.Module],
    matrix: Weight,
    shift: Combination,
    x: Tensor,
    output: object,
    rows: Tensor | None = None,
) -> Tensor:
    """What a layer gives under a shift of its matrix.

    Args:
        factors: of the run's directions (low-rank).
        kind: one of `KINDS`.
        matrix: the weight that moves.
        shift: by this.
        x: the layer's input.
        output: what it gives on the matrix as it is: [..., outputs].
        rows: the rows of the matrix that are computed; None: all.
    """
    assert isinstance(output, Tensor)
    u, v = factors.of_shift(matrix, shift, output)
    into, out = (v, u) if kind is nn.Linear else (u, v)  # the rows of other matrices belong to inputs
    if rows is not None:
        out = out[rows]
    inner = F.embedding(x, into) if kind is nn.Embedding else x @ into
    moved = torch.addmm(output.reshape(-1, output.shape[-1]), inner.reshape(-1, inner.shape[-1]), out.T)
    return moved.view(output.shape)
