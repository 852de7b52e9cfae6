"""`add` and `advance` for tensors in host memory: the compiled kernel of `cpu_kernel` on torch's threads.

`add` is one update with any number of outputs, `advance` any number of updates with one output, the weight itself.
The kernel does both, so everything here is shared: the tables of terms, the arguments and the launch.

numba's own `prange` was turned down: it brings a second native thread pool into every process, and where OpenMP is
missing its substitute ends the process as soon as two Python threads use it at once.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mezo_dist.directions.bits import CHUNK, GAUSSIAN, RADEMACHER, BitLayout, gaussian_table
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.kernels import cpu_kernel
from mezo_dist.directions.kernels.cpu_arguments import Arguments
from mezo_dist.directions.kernels.threads import in_threads

KINDS = {torch.float32: cpu_kernel.FP32, torch.bfloat16: cpu_kernel.BF16, torch.float16: cpu_kernel.FP16}
CHUNKS_PER_THREAD = 128
"""Chunks of one term that are worth waking a thread: about 0.1 ms of work."""


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
    """See `mezo_dist.directions.add.add`."""
    terms = _table_of_terms(((tuple(combinations), rounding_seed),))
    _launch(weight, outputs, terms, param_id, offsets, bits)


def advance(
    weight: Tensor,
    updates: Sequence[tuple[Combination, int | None]],
    *,
    param_id: int,
    bits: BitLayout,
    offset: int,
) -> None:
    """See `mezo_dist.directions.add.advance`."""
    terms = _table_of_terms(tuple(((combination,), seed) for combination, seed in updates))
    _launch(weight, [weight], terms, param_id, [offset], bits)


@dataclass(frozen=True)
class _Terms:
    """The terms of some updates, one update after another; see the fields of the same names in `Arguments`."""

    seeds: array[int]
    coefficients: array[float]
    ends: array[int]
    rounding_seeds: array[int]


@functools.lru_cache(maxsize=4)
def _table_of_terms(updates: tuple[tuple[tuple[Combination, ...], int | None], ...]) -> _Terms:
    """The tables that the kernel reads; cached, because a step adds the same combinations to every parameter.

    Args:
        updates: (one combination per output, seed of stochastic rounding or None) for each update.

    Returns:
        The seeds of an update in ascending order, which is the order of every combination: one pass over the seeds
        serves all outputs. A coefficient is zero where the output has no such term.
    """
    terms = _Terms(array("Q"), array("f"), array("q"), array("Q"))
    for combinations, rounding_seed in updates:
        by_seed = [dict(combination.terms) for combination in combinations]
        seeds = sorted({seed for coefficients in by_seed for seed in coefficients})
        terms.seeds.extend(seeds)
        terms.coefficients.extend(coefficients.get(seed, 0.0) for seed in seeds for coefficients in by_seed)
        terms.ends.append(len(terms.seeds))
        if rounding_seed is not None:
            terms.rounding_seeds.append(rounding_seed)
    return terms


def _launch(
    weight: Tensor,
    outputs: Sequence[Tensor],
    terms: _Terms,
    param_id: int,
    offsets: Sequence[int],
    bits: BitLayout,
) -> None:
    """Run the kernel; several updates are right only where the weight is the one output.

    Args:
        weight: contiguous, ``len(offsets)`` equally long rows.
        outputs: as many elements each, or the weight itself.
        terms: see `_table_of_terms`.
        param_id: see `seeds.param_id`.
        offsets: index of each row's first element in the flattened full parameter.
        bits: bit layout of the directions.

    Raises:
        ValueError: the kernel does not know the bit layout.
    """
    if bits.values not in (GAUSSIAN.values, RADEMACHER.values):
        raise ValueError(f"the CPU kernel does not know the bit layout {bits.name!r}")
    row_length = weight.numel() // len(offsets)
    chunks_per_row = (row_length + 2 * CHUNK - 2) // CHUNK
    # Named, so that these arrays live until the kernel is done.
    addresses = array("Q", [output.data_ptr() for output in outputs])
    kinds = array("q", [KINDS[output.dtype] for output in outputs])
    rows = array("q", offsets)
    arguments = Arguments(
        weight=weight.data_ptr(),
        weight_kind=KINDS[weight.dtype],
        num_outputs=len(outputs),
        num_rows=len(offsets),
        row_length=row_length,
        chunks_per_row=chunks_per_row,
        num_updates=len(terms.ends),
        num_terms=len(terms.seeds),
        param_id=param_id,
        stream=bits.stream,
        is_gaussian=bits.values is GAUSSIAN.values,
        is_stochastic=bool(terms.rounding_seeds),
        outputs=_address(addresses),
        kinds=_address(kinds),
        offsets=_address(rows),
        seeds=_address(terms.seeds),
        coefficients=_address(terms.coefficients),
        ends=_address(terms.ends),
        rounding_seeds=_address(terms.rounding_seeds),
        table=_address_of_gaussian_table(),
    )
    min_tasks = max(1, CHUNKS_PER_THREAD // max(1, len(terms.seeds)))
    in_threads(cpu_kernel.kernel.address, arguments, len(offsets) * chunks_per_row, min_tasks)


def _address(values: array[int] | array[float]) -> int:
    return values.buffer_info()[0]


@functools.cache
def _address_of_gaussian_table() -> int:
    """The address in memory; `gaussian_table` keeps the table for ever."""
    return gaussian_table().ctypes.data
