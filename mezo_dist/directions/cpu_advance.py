"""The kernel of `mezo_dist.directions.advance` for weights in host memory, built from the parts of `cpu_kernel`."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numba import uint64
from torch import Tensor

from mezo_dist.directions import cpu_kernel, laws, philox
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.cpu import CHUNKS_PER_THREAD, KINDS, in_threads
from mezo_dist.directions.cpu_kernel import (
    BLOCKS,
    BLOCKS_OF_BITS,
    FP32,
    STREAM_ROUNDING,
    _gaussian,
    _halves,
    _load,
    _multiply_add,
    _philox,
    _prefetch,
    _rademacher,
    _store,
    _total,
)
from mezo_dist.directions.laws import CHUNK, GAUSSIAN, Law, gaussian_table
from mezo_dist.directions.numba_cache import compiled

# mypy: disable-error-code="no-untyped-def"


def _advance_chunks(
    address, kind, length, offset, seeds, coefficients, ends, rounding_seeds,
    param_id, stream, gaussian, stochastic, table, first, stop,
):  # fmt: skip
    """Take the chunks [first, stop) of a weight at ``address`` through all updates.

    Update s has the terms ``ends[s - 1] .. ends[s]`` of ``seeds`` and ``coefficients``. A 16-bit chunk is stored after
    every update and loaded again, which rounds it as stepping does, in the nearest cache.
    """
    words, z = np.empty((4, BLOCKS), np.uint32), np.empty(CHUNK, np.float32)
    scratch, noise = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.uint32)
    for task in range(first, stop):
        chunk = offset // CHUNK + task
        before = offset - chunk * CHUNK  # elements of the chunk before the weight, negative after its first chunk
        low, high = max(before, 0), min(before + length, CHUNK)
        if low >= high:
            continue
        start = low - before
        if gaussian:
            _prefetch(address, kind, start + CHUNK)
        total = _total(address, kind, start, scratch[low:high])
        k = 0
        for s in range(len(ends)):
            if kind != FP32:
                _load(address, kind, start, total)
            while k < ends[s]:
                if gaussian:
                    _philox(words, seeds[k], uint64(chunk * BLOCKS), param_id, stream, BLOCKS)
                    _gaussian(words, table, z)
                else:
                    _philox(words, seeds[k], uint64(chunk * BLOCKS_OF_BITS), param_id, stream, BLOCKS_OF_BITS)
                    _rademacher(words, z)
                _multiply_add(total, coefficients[k], z[low:high])
                k += 1
            if kind != FP32:
                if stochastic:
                    seed = rounding_seeds[s]
                    _philox(words, seed, uint64(chunk * BLOCKS), param_id, uint64(STREAM_ROUNDING), BLOCKS)
                    _halves(words, noise)
                _store(address, kind, start, total, stochastic, noise[low:high])


SIGNATURE = (
    "void(uint64, int64, int64, int64, uint64[::1], float32[::1], int64[::1], uint64[::1],"
    " uint64, uint64, boolean, boolean, Array(float32, 1, 'C', readonly=True), int64, int64)"
)
kernel = compiled(_advance_chunks, SIGNATURE, uses=[cpu_kernel, laws, philox])
"""`_advance_chunks`, compiled."""


def advance(
    weight: Tensor, updates: Sequence[tuple[Combination, int | None]], *, param_id: int, law: Law, offset: int
) -> None:
    """See `mezo_dist.directions.advance.advance`. ``weight`` is 1-D here."""
    terms = [term for combination, _ in updates for term in combination.terms]
    rounding = [seed for _, seed in updates if seed is not None]
    if rounding and len(rounding) < len(updates):
        raise ValueError("either all updates are rounded stochastically or none")
    work = functools.partial(
        kernel,
        weight.data_ptr(),
        KINDS[weight.dtype],
        len(weight),
        offset,
        np.array([seed for seed, _ in terms], dtype=np.uint64),
        np.array([c for _, c in terms], dtype=np.float32),
        np.cumsum([len(combination) for combination, _ in updates], dtype=np.int64),
        np.array(rounding, dtype=np.uint64),
        param_id,
        law.stream,
        law.values is GAUSSIAN.values,
        bool(rounding),
        gaussian_table(),
    )
    chunks = (offset % CHUNK + len(weight) + CHUNK - 1) // CHUNK
    in_threads(work, chunks, max(1, CHUNKS_PER_THREAD // max(1, len(terms))))
