"""`add` for tensors in host memory: the compiled kernel of `cpu_kernel` on as many threads as torch uses.

Threads are plain Python threads, for the kernel runs without the GIL. numba's own `prange` was turned down: it brings
a second native thread pool into every process, and where OpenMP is missing its substitute ends the process as soon as
two Python threads use it at once.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import torch
from torch import Tensor

from mezo_dist.directions import cpu_kernel
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.laws import CHUNK, GAUSSIAN, RADEMACHER, Law, gaussian_table

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
    law: Law,
    rounding_seed: int | None,
) -> None:
    """See `mezo_dist.directions.add`. ``weight`` and ``outputs`` are 2-D here: [len(offsets), length]."""
    if law.values not in (GAUSSIAN.values, RADEMACHER.values):
        raise ValueError(f"the CPU kernel does not know the law {law.name!r}")
    rows, length = weight.shape
    chunks_per_row = (length + 2 * CHUNK - 2) // CHUNK  # of the row that lies worst
    seeds, coefficients = _table_of_terms(combinations)
    tensors = (weight, *outputs)
    work = functools.partial(
        cpu_kernel.kernel,
        np.array([tensor.data_ptr() for tensor in tensors], dtype=np.uint64),
        np.array([KINDS[tensor.dtype] for tensor in tensors], dtype=np.int64),
        length,
        chunks_per_row,
        np.array(offsets, dtype=np.int64),
        seeds,
        coefficients,
        param_id,
        law.stream,
        law.values is GAUSSIAN.values,
        rounding_seed is not None,
        rounding_seed or 0,
        gaussian_table(),
    )
    in_threads(work, rows * chunks_per_row, max(1, CHUNKS_PER_THREAD // max(1, len(seeds))))


def _table_of_terms(combinations: Sequence[Combination]) -> tuple[np.ndarray, np.ndarray]:
    """All seeds in ascending order, uint64 [k], and the coefficients, fp32 [k, len(combinations)], zero: no such term.

    Ascending is the order of every combination, so one pass over the seeds serves all of them.
    """
    seeds = sorted({seed for combination in combinations for seed, _ in combination.terms})
    position = {seed: k for k, seed in enumerate(seeds)}
    coefficients = np.zeros((len(seeds), len(combinations)), dtype=np.float32)
    for v, combination in enumerate(combinations):
        for seed, coefficient in combination.terms:
            coefficients[position[seed], v] = coefficient
    return np.array(seeds, dtype=np.uint64), coefficients


def in_threads(work: Callable[[int, int], None], num_tasks: int, least: int) -> None:
    """Call ``work(first, stop)`` on pieces of ``range(num_tasks)``, with ``least`` tasks or more for every thread."""
    threads = min(torch.get_num_threads(), num_tasks // least)
    if threads <= 1:
        work(0, num_tasks)
        return
    piece = num_tasks // (4 * threads) + 1  # small, so that a thread that is held up can do fewer
    starts = iter(range(0, num_tasks, piece))

    def drain() -> None:
        for first in starts:
            work(first, min(first + piece, num_tasks))

    others = [_pool(threads - 1).submit(drain) for _ in range(threads - 1)]
    try:
        drain()
    finally:
        wait(others)  # also on Ctrl-C: nobody may write to tensors that the caller has given up


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="mezo_dist-add")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
