"""Sparse rows: of tables of which a forward pass needs only some rows, only those are materialised.

An embedding looks up the tokens of the batch; an output head read at the label words computes only those. Directions
can start at any element, so the rows have the same bits as in the whole table.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezo_dist.directions import devices
from mezo_dist.engines.hooked import HookedModule
from mezo_dist.engines.lockstep.head_slice import head_rows
from mezo_dist.engines.lockstep.passes import Call


@dataclass(frozen=True)
class Rows:
    """The rows ``indices`` (int64 [k]) of every weight of a hooked module, and a forward that needs no others."""

    indices: Tensor
    forward: Callable[[Call, list[Tensor]], Tensor]


def plan_sparse_rows(hooked: HookedModule, calls: Sequence[Call], real: Callable[..., object]) -> Rows | None:
    """The rows that ``calls`` of ``hooked`` need, or None if its whole weights are needed.

    Only plain ``nn.Embedding`` lookups and heads under a `HeadSlice` qualify: for any other class (scaled embeddings,
    position tables) and any replaced forward the module's own code decides what it does with its weights.

    Args:
        hooked: the module.
        calls: its waiting calls.
        real: its forward.
    """
    rows_of_head = head_rows(hooked.module)
    if rows_of_head is not None:
        return Rows(rows_of_head, _linear_rows)
    is_plain = getattr(real, "__func__", None) is nn.Embedding.forward
    if not isinstance(hooked.module, nn.Embedding) or not is_plain or hooked.module.max_norm is not None:
        return None
    if any(len(call.args) != 1 or call.kwargs for call in calls):
        return None
    if devices.takes_launches(calls[0].args[0].device):
        return _every_token(calls)
    indices = torch.unique(torch.cat([call.args[0].reshape(-1) for call in calls]))

    def look_up(call: Call, tensors: list[Tensor]) -> Tensor:
        return F.embedding(torch.searchsorted(indices, call.args[0].contiguous()), tensors[0])

    return Rows(indices, look_up)


def may_need_rows(module: nn.Module) -> bool:
    """Whether there may be calls of ``module`` for which `plan_sparse_rows` has rows."""
    return isinstance(module, nn.Embedding) or head_rows(module) is not None


def _every_token(calls: Sequence[Call]) -> Rows:
    """A row for every token, the same one again for the same token: to find out which of them are different, the host
    would have to wait for the device. Passes on the same micro-batch share their rows."""
    ids: dict[object, Tensor] = {devices.same_memory(call.args[0]): call.args[0] for call in calls}
    starts = dict(zip(ids, itertools.accumulate((t.numel() for t in ids.values()), initial=0), strict=False))

    def look_up(call: Call, tensors: list[Tensor]) -> Tensor:
        tokens = call.args[0]
        start = starts[devices.same_memory(tokens)]
        return tensors[0][start : start + tokens.numel()].view(*tokens.shape, -1)

    return Rows(torch.cat([tensor.reshape(-1) for tensor in ids.values()]), look_up)


def _linear_rows(call: Call, tensors: list[Tensor]) -> Tensor:
    (hidden,) = call.args
    weight, bias = tensors if len(tensors) == 2 else (tensors[0], None)
    return F.linear(hidden, weight, bias)
