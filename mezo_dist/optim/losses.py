"""What a user's loss function may return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar, Union

import torch
from torch import Tensor, nn

from mezo_dist.errors import UserError

BatchT = TypeVar("BatchT")
Loss = Union[Tensor, float, "tuple[Tensor | float, int | Tensor]"]
"""A mean loss; one loss per sample [n]; or a pair of either and the number (numbers, [n]) of things it is a mean of."""
LossFunction = Callable[[nn.Module, BatchT], Loss]


def loss_and_weight(loss: object) -> tuple[Tensor, Tensor]:
    """What a loss function returned, as sums of losses (fp32 or fp64 [n]) and what they are sums over (int64 [n]).

    Raises:
        UserError: it is nothing that a batch's loss can be computed from.
    """
    value, count = loss if isinstance(loss, tuple) and len(loss) == 2 else (loss, None)
    tensor = torch.as_tensor(value) if isinstance(value, (Tensor, float, int)) else None
    if tensor is None or tensor.dim() > 1 or not tensor.is_floating_point() or not tensor.numel():
        raise UserError(
            f"the loss function returned {_described(loss)}; it must return the mean loss of its batch (a scalar), one "
            "loss per sample (a vector), or a pair (mean loss, number of samples or tokens that it is the mean of)"
        )
    tensor = tensor.detach().to("cpu", torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    if count is None:
        return tensor.reshape(-1), torch.ones(tensor.numel(), dtype=torch.int64)
    if isinstance(count, Tensor) and count.shape == tensor.shape != () and not count.is_floating_point():
        counts = count.detach().to("cpu", torch.int64)
        if bool((counts >= 1).all()):
            return tensor.double() * counts, counts
    if isinstance(count, Tensor) and count.numel() == 1 and not count.is_floating_point():
        count = int(count)
    if tensor.dim() or not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UserError(
            f"the loss function returned {_described(loss)}; of a pair the first must be a scalar, and the second the "
            "whole number of samples or tokens that it is the mean of (or both vectors, with an entry per sample)"
        )
    return (tensor.double() * count).reshape(1), torch.tensor([count])


def num_samples_of(batch: object) -> int:
    """The first dimension of the first tensor in a batch: a tensor, or a mapping or sequence of such.

    Raises:
        UserError: there is no tensor in it.
    """
    pending = [batch]
    while pending:
        item = pending.pop(0)
        if isinstance(item, Tensor) and item.dim():
            return item.shape[0]
        if isinstance(item, Mapping):
            pending = [*item.values(), *pending]
        elif isinstance(item, (list, tuple)):
            pending = [*item, *pending]
    raise UserError("a batch without a tensor: say how many samples it has (Optimizer(num_samples=...))")


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, tuple):
        return f"a tuple of ({', '.join(_described(item) for item in value)})"
    return "None" if value is None else f"a {type(value).__name__}"
