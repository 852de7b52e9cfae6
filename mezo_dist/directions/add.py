"""The one primitive, `add`: everything that MeZO and SVRG do to weights is "add a combination of directions".

Three implementations of one contract: `reference` (plain torch, the definition), `cpu` (numba) and `gpu` (Triton).
This file checks the arguments and picks the fastest one that can do the job; results have the same bits.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from mezo_dist.directions.bits import BitLayout
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.kernels import reference

log = logging.getLogger(__name__)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def add(
    weight: Tensor,
    combinations: Sequence[Combination],
    outputs: Sequence[Tensor],
    *,
    param_id: int,
    bits: BitLayout,
    offsets: Sequence[int] = (0,),
    rounding_seed: int | None = None,
) -> None:
    """Write ``cast(weight + combinations[v])`` to ``outputs[v]`` for every v, generating each direction once.

    Computed in fp32: terms in the combination's order (ascending seed), multiply then add, each rounded, one cast
    at the end to the output's dtype. Directions are never stored whole.

    Args:
        weight: fp32, bf16 or fp16, contiguous; ``len(offsets)`` equally long pieces of one flattened full parameter,
            one after another: the whole parameter (offset 0), a shard (its offset), or some rows of a table.
        combinations: one per output.
        outputs: contiguous tensors with as many elements as ``weight``, on its device. An output may be ``weight``
            itself (update in place, then it must be the only one that overlaps it).
        param_id: see `seeds.param_id`.
        bits: law of the directions, as a layout of bits.
        offsets: index of each piece's first element in the flattened full parameter.
        rounding_seed: with a seed, bf16 outputs are rounded stochastically with the bits of stream 1 of that seed;
            without, to nearest even.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    _check(weight, combinations, outputs, offsets, rounding_seed)
    if weight.numel() == 0:
        return
    implementation(weight.device.type)(
        weight,
        combinations,
        outputs,
        param_id=param_id,
        offsets=offsets,
        bits=bits,
        rounding_seed=rounding_seed,
    )


@functools.cache
def implementation(device_type: str) -> Callable[..., None]:
    """The fastest ``add`` for tensors on ``device_type``; says in the log, once, when that is only the reference."""
    name = {"cpu": "cpu", "cuda": "gpu"}.get(device_type)
    if name is None:
        log.warning("no fused kernel for device %r: directions are made by the (slow) torch reference", device_type)
        return reference.add
    try:
        module: ModuleType = importlib.import_module(f"mezo_dist.directions.kernels.{name}")
    except ImportError as error:
        log.warning("fused %s kernels are off (%s): directions are made by the (slow) torch reference", name, error)
        return reference.add
    return module.add


def _check(
    weight: Tensor,
    combinations: Sequence[Combination],
    outputs: Sequence[Tensor],
    offsets: Sequence[int],
    rounding_seed: int | None,
) -> None:
    if len(combinations) != len(outputs):
        raise ValueError(f"{len(combinations)} combinations for {len(outputs)} outputs")
    if not offsets or weight.numel() % len(offsets):
        raise ValueError(f"{weight.numel()} elements do not make {len(offsets)} equal pieces")
    for tensor in (weight, *outputs):
        if tensor.dtype not in DTYPES or not tensor.is_contiguous():
            raise ValueError(f"weights and outputs must be contiguous fp32, bf16 or fp16, not {tensor.dtype}")
        if tensor.numel() != weight.numel() or tensor.device != weight.device:
            raise ValueError("weight and outputs must have the same number of elements and the same device")
    if rounding_seed is not None and any(output.dtype != torch.bfloat16 for output in outputs):
        raise ValueError("stochastic rounding is defined for bf16 outputs")
