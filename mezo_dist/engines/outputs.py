"""The outputs of forward passes, and how far those of two passes lie apart."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mezo_dist.engines.engine import Engine

Outputs = list[Tensor]
"""The floating-point tensors that a forward pass gave, in fp32."""


def tensors_of(result: object) -> Outputs:
    """The floating-point tensors in what a forward pass gave, in fp32."""
    leaves = (torch.as_tensor(leaf) for leaf in pytree.tree_leaves(result) if isinstance(leaf, (Tensor, float)))
    return [leaf.detach().float() for leaf in leaves if leaf.is_floating_point()]


def distance(some: Outputs, others: Outputs) -> float:
    """Largest difference of two numbers at the same place; infinite if shapes differ."""
    if [tensor.shape for tensor in some] != [tensor.shape for tensor in others]:
        return math.inf
    return max((_largest(one - other) for one, other in zip(some, others, strict=True)), default=0.0)


def size_of(outputs: Outputs) -> float:
    """The largest absolute value."""
    return max(map(_largest, outputs), default=0.0)


def all_finite(outputs: Outputs) -> bool:
    """No number is infinite or nan."""
    return all(bool(tensor.isfinite().all()) for tensor in outputs)


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def rounding_error(engine: Engine) -> float:
    """Relative error that outputs of equal operations on equal numbers may have. There is none on a CPU, but operations
    may be summed in another order elsewhere, and are in compiled code."""
    if engine.pass_dtype.itemsize < 4:
        return torch.finfo(engine.pass_dtype).eps
    is_exact = next(engine.model.parameters()).device.type == "cpu" and engine.compile == "off"
    return 2e-6 if is_exact else 1e-4
