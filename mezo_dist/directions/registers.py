"""Linear layers on variants of their weights that no memory ever holds: where there is a kernel for that, and the call.

The kernel is `mezo_dist.directions.kernels.fused_linear` (Triton); `kernels.reference.linear` defines what it gives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mezo_dist.directions.combination import Combination
from mezo_dist.directions.law import Law

MOST_TERMS = 4
"""Directions of a variant, at most: the kernel's code is unrolled for them."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of weights, and of inputs."""


def why_not(law: Law, device: torch.device) -> str:
    """Why no linear layer can be computed so under a law on a device; "" if it can.

    Args:
        law: of the directions.
        device: where the weights are.
    """
    if law.is_lowrank:
        return "makes the bits of law: gaussian and rademacher, and lowrank directions are products of thin factors"
    try:
        from mezo_dist.directions.kernels import fused_linear
    except ImportError as error:
        return f"needs Triton ({error})"
    if device.type != "cuda" and not fused_linear.IS_INTERPRETED:
        return f"needs weights on an NVIDIA GPU, and these are on {device.type}"
    return ""


def linear(
    law: Law,
    weight: Tensor,
    combinations: Sequence[Combination],
    inputs: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    *,
    param_id: int,
) -> list[Tensor]:
    """``inputs[v] cast(weight + combinations[v])^T + biases[v]`` for every v, where `why_not` has no objection.

    Args:
        law: of the directions.
        weight: [output features, input features], contiguous, of `DTYPES`: a whole parameter.
        combinations: of each variant, with at most `MOST_TERMS` terms.
        inputs: for each variant [..., input features], of the dtype that weights are cast to.
        biases: for each variant [output features], of the inputs' dtype; None: no bias.
        param_id: see `seeds.param_id`.

    Returns:
        For each variant [..., output features]. Sums are in fp32 and rounded once; their order is not that of torch.
    """
    from mezo_dist.directions.kernels import fused_linear

    flat = [x.reshape(-1, x.shape[-1]).contiguous() for x in inputs]
    outputs = fused_linear.linear(weight, combinations, flat, biases, param_id=param_id, bits=law._bits)
    return [y.view(*x.shape[:-1], weight.shape[0]) for x, y in zip(inputs, outputs, strict=True)]
