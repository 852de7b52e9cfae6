"""The one primitive: everything that MeZO and SVRG do to weights is "add a combination of directions".

`add` is one update, written to any number of outputs; `advance` is many updates of a weight in place. Three modules
implement both: `kernels.reference` (plain torch, the definition), `kernels.cpu` (numba) and `kernels.gpu` (Triton).
This file checks the arguments and picks the fastest module that can do the work. Invariant: all of them give the same
bits, and `advance` gives those of one `add` per update.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Sequence
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
        bits: bit layout of the directions.
        offsets: index of each piece's first element in the flattened full parameter.
        rounding_seed: with a seed, bf16 outputs are rounded stochastically with the bits of stream 1 of that seed;
            without, to nearest even.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    if len(combinations) != len(outputs):
        raise ValueError(f"{len(combinations)} combinations for {len(outputs)} outputs")
    if not offsets or weight.numel() % len(offsets):
        raise ValueError(f"{weight.numel()} elements do not make {len(offsets)} equal pieces")
    check(weight, outputs, is_stochastic=rounding_seed is not None)
    if weight.numel() == 0:
        return
    implementation(weight.device.type).add(
        weight,
        combinations,
        outputs,
        param_id=param_id,
        offsets=offsets,
        bits=bits,
        rounding_seed=rounding_seed,
    )


def advance(
    weight: Tensor,
    updates: Sequence[tuple[Combination, int | None]],
    *,
    param_id: int,
    bits: BitLayout,
    offset: int = 0,
) -> None:
    """``weight <- cast(weight + combination)`` for one update after another, in place.

    Stepping reads and writes all weights for every step, and on most machines waits for memory. On the CPU a chunk of
    the weight goes through all its updates, each rounded as it was at its time, while it is in the cache.

    Args:
        weight: fp32, bf16 or fp16, contiguous: a piece of one flattened full parameter.
        updates: (combination, seed of stochastic rounding or None), one after another; rounding seeds for bf16 weights
            only, and then for all updates or for none.
        param_id: see `seeds.param_id`.
        bits: bit layout of the directions.
        offset: index of the first element in the flattened full parameter.

    Raises:
        ValueError: a weight or rounding seeds that are not as described.
    """
    num_stochastic = sum(seed is not None for _, seed in updates)
    if num_stochastic not in (0, len(updates)):
        raise ValueError("either all updates are rounded stochastically or none")
    check(weight, [weight], is_stochastic=num_stochastic > 0)
    if weight.numel() and updates:
        implementation(weight.device.type).advance(weight, updates, param_id=param_id, bits=bits, offset=offset)


@functools.cache
def implementation(device_type: str) -> ModuleType:
    """The module with the fastest `add` and `advance` for tensors on a kind of device.

    If that is only the reference, the log says so once.
    """
    name = {"cpu": "cpu", "cuda": "gpu"}.get(device_type)
    if name is None:
        log.warning("no fused kernel for device %r: the (slow) torch reference generates directions", device_type)
        return reference
    try:
        return importlib.import_module(f"mezo_dist.directions.kernels.{name}")
    except ImportError as error:
        install = f"; pip install {error.name}" if isinstance(error, ModuleNotFoundError) else ""
        log.warning(
            "fused %s kernels are off (%s): the (slow) torch reference generates directions%s", name, error, install
        )
        return reference


def handles_parts(kernels: ModuleType) -> bool:
    """Whether kernels work on many tensors at once, and on tables on the device: those of GPUs do."""
    return hasattr(kernels, "add_parts")


def check(weight: Tensor, outputs: Sequence[Tensor], *, is_stochastic: bool) -> None:
    """Raise ValueError for tensors that no implementation takes.

    Args:
        weight: what is added to.
        outputs: where results go.
        is_stochastic: whether outputs are rounded stochastically.
    """
    for tensor in (weight, *outputs):
        if tensor.dtype not in DTYPES or not tensor.is_contiguous():
            raise ValueError(f"weights and outputs must be contiguous fp32, bf16 or fp16, not {tensor.dtype}")
        if tensor.numel() != weight.numel() or tensor.device != weight.device:
            raise ValueError("weight and outputs must have the same number of elements and the same device")
    if is_stochastic and any(output.dtype != torch.bfloat16 for output in outputs):
        raise ValueError("stochastic rounding is defined for bf16 outputs")
