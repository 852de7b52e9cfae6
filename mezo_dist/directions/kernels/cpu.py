"""`add` for tensors in host memory: the compiled kernel of `cpu_kernel` on torch's threads.

numba's own `prange` was turned down: it brings a second native thread pool into every process, and where OpenMP is
missing its substitute ends the process as soon as two Python threads use it at once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mezo_dist.directions.bits import CHUNK, GAUSSIAN, RADEMACHER, BitLayout, gaussian_table
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.kernels import cpu_kernel
from mezo_dist.directions.kernels.cpu_jobs import Array, job_of
from mezo_dist.directions.kernels.threads import in_threads

KINDS = {torch.float32: cpu_kernel.FP32, torch.bfloat16: cpu_kernel.BF16, torch.float16: cpu_kernel.FP16}
CHUNKS_PER_THREAD = 128
"""Of one term. Less work than this (about 0.1 ms) is not worth waking a thread."""


def add(
    weight: Tensor,
    combinations: Sequence[Combination],
    outputs: Sequence[Tensor],
    *,
    param_id: int,
    offsets: Sequence[int],
    bits: BitLayout,
    rounding_seed: int | None,
) -> None:
    """See `mezo_dist.directions.add`."""
    if bits.values not in (GAUSSIAN.values, RADEMACHER.values):
        raise ValueError(f"the CPU kernel does not know the law {bits.name!r}")
    rows, length = len(offsets), weight.numel() // len(offsets)
    chunks_per_row = (length + 2 * CHUNK - 2) // CHUNK  # of the row that lies worst
    seeds, coefficients = _table_of_terms(tuple(combinations))
    tensors = (weight, *outputs)
    job = job_of(
        len(outputs),
        rows,
        len(seeds),
        length,
        chunks_per_row,
        seeds.address,
        coefficients.address,
        param_id,
        bits.stream,
        bits.values is GAUSSIAN.values,
        rounding_seed is not None,
        rounding_seed or 0,
        table_of_values().address,
        *(tensor.data_ptr() for tensor in tensors),
        *(KINDS[tensor.dtype] for tensor in tensors),
        *offsets,
    )
    least = max(1, CHUNKS_PER_THREAD // max(1, len(seeds)))
    in_threads(cpu_kernel.kernel.address, job, rows * chunks_per_row, least)


@functools.lru_cache(maxsize=4)
def _table_of_terms(combinations: tuple[Combination, ...]) -> tuple[Array, Array]:
    """All seeds in ascending order, uint64 [k], and the coefficients, fp32 [k, len(combinations)], zero: no such term.

    Ascending is the order of every combination, so one pass over the seeds serves all of them.
    """
    seeds = sorted({seed for combination in combinations for seed, _ in combination.terms})
    position = {seed: k for k, seed in enumerate(seeds)}
    coefficients = np.zeros((len(seeds), len(combinations)), dtype=np.float32)
    for v, combination in enumerate(combinations):
        for seed, coefficient in combination.terms:
            coefficients[position[seed], v] = coefficient
    return Array(np.array(seeds, dtype=np.uint64)), Array(coefficients)


@functools.cache
def table_of_values() -> Array:
    """Of the gaussian law."""
    return Array(gaussian_table())
