"""The kernel of `mezo_dist.directions.advance` for weights in host memory, built from the parts of `cpu_kernel`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit
from numpy import int64, uint64
from torch import Tensor

from mezo_dist.directions import bits, philox
from mezo_dist.directions.bits import CHUNK, GAUSSIAN, BitLayout
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.kernels import cpu_jobs, cpu_kernel
from mezo_dist.directions.kernels.cpu import CHUNKS_PER_THREAD, KINDS, table_of_values
from mezo_dist.directions.kernels.cpu_jobs import JOB, Array, claim, job_of, view
from mezo_dist.directions.kernels.cpu_kernel import (
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
from mezo_dist.directions.kernels.numba_cache import compiled
from mezo_dist.directions.kernels.threads import in_threads

# mypy: disable-error-code="no-untyped-def"


@njit
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


def _advance(job):
    """What a thread does: the words of the job are written by `advance`."""
    words = view(job, np.uint64, 3, 18)
    num_updates, num_terms = int64(words[0]), int64(words[1])
    while True:
        first, stop = claim(job)
        if first >= stop:
            return
        _advance_chunks(
            words[2],
            int64(words[3]),
            int64(words[4]),
            int64(words[5]),
            view(words[6], np.uint64, 0, num_terms),
            view(words[7], np.float32, 0, num_terms),
            view(words[8], np.int64, 0, num_updates),
            view(words[9], np.uint64, 0, num_updates),  # if there is none, nobody looks
            words[10],
            words[11],
            words[12] != 0,
            words[13] != 0,
            view(words[14], np.float32, 0, 1 << 16),
            first,
            stop,
        )


kernel = compiled(_advance, JOB, uses=[cpu_jobs, cpu_kernel, bits, philox])
"""`_advance`, compiled."""


def advance(
    weight: Tensor, updates: Sequence[tuple[Combination, int | None]], *, param_id: int, bits: BitLayout, offset: int
) -> None:
    """See `mezo_dist.directions.advance.advance`. ``weight`` is 1-D here."""
    terms = [term for combination, _ in updates for term in combination.terms]
    rounding = [seed for _, seed in updates if seed is not None]
    if rounding and len(rounding) < len(updates):
        raise ValueError("either all updates are rounded stochastically or none")
    seeds = Array(np.array([seed for seed, _ in terms], dtype=np.uint64))
    coefficients = Array(np.array([c for _, c in terms], dtype=np.float32))
    ends = Array(np.cumsum([len(combination) for combination, _ in updates], dtype=np.int64))
    rounding_seeds = Array(np.array(rounding, dtype=np.uint64))
    job = job_of(
        len(updates),
        len(terms),
        weight.data_ptr(),
        KINDS[weight.dtype],
        len(weight),
        offset,
        seeds.address,
        coefficients.address,
        ends.address,
        rounding_seeds.address,
        param_id,
        bits.stream,
        bits.values is GAUSSIAN.values,
        bool(rounding),
        table_of_values().address,
    )
    chunks = (offset % CHUNK + len(weight) + CHUNK - 1) // CHUNK
    in_threads(kernel.address, job, chunks, max(1, CHUNKS_PER_THREAD // max(1, len(terms))))
