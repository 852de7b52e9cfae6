"""`add` for tensors in host memory: one compiled kernel (numba), the same bits as `reference`.

The kernel works on one chunk of 1024 elements at a time and never leaves the cache: read the weights, make each
direction once (all Philox words of the chunk first, then values with unit stride: both loops become SIMD code), add
it to every output that wants it, cast, store. No `fastmath`: fused or reordered sums would be other numbers.

Threads are plain Python threads that run the kernel without the GIL, as many as torch uses. numba's own `prange` was
turned down: it brings a second thread pool to every process, compiles several times longer, and its fallback pool
kills the process when two Python threads use it at once.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from numba import carray
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy import float32, int64, uint16, uint32, uint64
from torch import Tensor

from mezo_dist.directions import philox
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.laws import CHUNK, GAUSSIAN, RADEMACHER, Law, gaussian_table

log = logging.getLogger(__name__)

CHUNKS_PER_THREAD = 32  # less work than this is not worth waking another thread
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FP32, BF16 = KINDS[torch.float32], KINDS[torch.bfloat16]
BLOCKS = 128  # per chunk, in the 16-bit layout
BITS_BLOCKS = RADEMACHER.blocks_per_chunk
M0, M1 = (np.uint64(m) for m in philox.MULTIPLIERS)
K0, K1 = (np.uint64(k) for k in philox.KEY_INCREMENTS)
LOW32, SHIFT32 = np.uint64(philox.MASK32), np.uint64(32)
ROUNDS, STREAM_DIRECTION, STREAM_ROUNDING = philox.ROUNDS, philox.STREAM_DIRECTION, philox.STREAM_ROUNDING


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
    if law not in (GAUSSIAN, RADEMACHER):
        raise ValueError(f"the CPU kernel does not know the law {law.name!r}")
    seeds = sorted({seed for combination in combinations for seed, _ in combination.terms})
    position = {seed: k for k, seed in enumerate(seeds)}
    coefficients = np.zeros((len(seeds), len(outputs)), dtype=np.float32)
    for v, combination in enumerate(combinations):
        for seed, coefficient in combination.terms:
            coefficients[position[seed], v] = coefficient
    rows, length = weight.shape
    chunks_per_row = (length + 2 * CHUNK - 2) // CHUNK  # for the offset that touches the most
    arguments = (
        np.array([weight.data_ptr()] + [output.data_ptr() for output in outputs], dtype=np.uint64),
        np.array([KINDS[weight.dtype]] + [KINDS[output.dtype] for output in outputs], dtype=np.int64),
        rows * length,
        length,
        chunks_per_row,
        np.array(offsets, dtype=np.int64),
        np.array(seeds, dtype=np.uint64),
        coefficients,
        param_id,
        law is GAUSSIAN,
        rounding_seed is not None,
        rounding_seed or 0,
        gaussian_table(),
    )
    _run(functools.partial(_kernel, *arguments), rows * chunks_per_row)


def _run(work: Callable[[int, int], None], num_tasks: int) -> None:
    """Call ``work(first, stop)`` on pieces of ``range(num_tasks)``, in as many threads as torch uses."""
    threads = min(torch.get_num_threads(), -(-num_tasks // CHUNKS_PER_THREAD))
    if threads <= 1:
        work(0, num_tasks)
        return
    grain = max(CHUNKS_PER_THREAD, num_tasks // (4 * threads))  # a thread that is held up does fewer pieces
    starts = iter(range(0, num_tasks, grain))

    def drain() -> None:
        for first in starts:
            work(first, min(first + grain, num_tasks))

    others = [_pool(threads - 1).submit(drain) for _ in range(threads - 1)]
    drain()
    for other in others:
        other.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="mezo_dist-add")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


@numba.njit
def _philox(words, seed, block, param_id, stream, count):  # type: ignore[no-untyped-def]
    """words[:, :count] = blocks ``block ..``, which share the high word (chunks are aligned).

    The four words of the state live in 64-bit lanes: the SIMD product of 32 bits by 32 bits wants them there.
    """
    high = block >> SHIFT32
    for j in range(count):
        c0, c1, c2, c3 = (block & LOW32) + uint64(j), high, param_id, stream
        k0, k1 = seed & LOW32, seed >> SHIFT32
        for _ in range(ROUNDS):
            p0, p1 = M0 * c0, M1 * c2
            c0, c1, c2, c3 = (p1 >> SHIFT32) ^ c1 ^ k0, p1 & LOW32, (p0 >> SHIFT32) ^ c3 ^ k1, p0 & LOW32
            k0, k1 = (k0 + K0) & LOW32, (k1 + K1) & LOW32
        words[0, j], words[1, j], words[2, j], words[3, j] = uint32(c0), uint32(c1), uint32(c2), uint32(c3)


@numba.njit
def _gaussian(words, table, z):  # type: ignore[no-untyped-def]
    """z[:] = the values of one chunk, layout of `laws.halves`."""
    for group in range(8):
        word, shift, out = words[group // 2], uint32(16 * (group % 2)), z[group * BLOCKS : (group + 1) * BLOCKS]
        for j in range(BLOCKS):
            out[j] = table[(word[j] >> shift) & uint32(0xFFFF)]


@numba.njit
def _rademacher(words, z):  # type: ignore[no-untyped-def]
    """z[:] = the values of one chunk, layout of `laws._rademacher_values`: +1.0 or -1.0 by writing the sign bit."""
    bits = z.view(np.uint32)
    for group in range(CHUNK // 32):
        word, out = ~uint32(words[group % 4, group // 4]), bits[group * 32 : (group + 1) * 32]
        for i in range(32):
            out[i] = ((word >> uint32(i)) << uint32(31)) | uint32(0x3F800000)


@numba.njit
def _halves(words, out):  # type: ignore[no-untyped-def]
    """out[:] = 16 bits per element, layout of `laws.halves`."""
    for group in range(8):
        word, shift = words[group // 2], uint32(16 * (group % 2))
        for j in range(BLOCKS):
            out[group * BLOCKS + j] = (word[j] >> shift) & uint32(0xFFFF)


@numba.njit
def _bits(x):  # type: ignore[no-untyped-def]
    return float32(x).view(np.uint32)


@numba.njit
def _float(bits):  # type: ignore[no-untyped-def]
    return uint32(bits).view(np.float32)


@numba.njit
def _from_fp16(half):  # type: ignore[no-untyped-def]
    """fp16 bits -> fp32 bits. By integers, and subnormals by an exact product: flush-to-zero modes change nothing."""
    magnitude = uint32(half & 0x7FFF)
    bits = (magnitude << 13) + (112 << 23)
    if magnitude >= 0x7C00:
        bits += 112 << 23
    if magnitude < 0x400:
        bits = int64(_bits(float32(magnitude) * float32(2.0**-24)))
    return uint32(bits | int64(half & 0x8000) << 16)


@numba.njit
def _to_fp16(bits):  # type: ignore[no-untyped-def]
    """fp32 bits -> fp16 bits, to nearest even."""
    magnitude = int64(bits & 0x7FFFFFFF)
    half = (magnitude + 0xFFF + ((magnitude >> 13) & 1) - (112 << 23)) >> 13
    if magnitude >= 0x477FF000:
        half = 0x7C00
    if magnitude > 0x7F800000:
        half = 0x7E00
    if magnitude < 0x38800000:  # subnormal: the sum with 0.5 is rounded at 2**-24, fp16's smallest step
        half = int64(_bits(_float(magnitude) + float32(0.5))) - 0x3F000000
    return uint16(half | (bits >> 16) & 0x8000)


@numba.njit
def _to_bf16(bits, noise):  # type: ignore[no-untyped-def]
    """fp32 bits -> bf16 bits; ``noise`` < 2**16 is added to the bits that are cut off."""
    if bits & 0x7F800000 == 0x7F800000:  # infinity stays what it is, and a NaN must keep a non-zero bit
        return uint16(bits >> 16 | ((bits & 0x7FFFFF) != 0) << 6)
    return uint16((bits + noise) >> 16)


@intrinsic
def _pointer(typing_context, address):  # type: ignore[no-untyped-def]
    """The integer ``address`` as a pointer for `numba.carray`: one compiled kernel serves every mix of dtypes."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.uint64), generate


@numba.njit
def _load(address, kind, size, start, low, high, out):  # type: ignore[no-untyped-def]
    """out[low:high] = elements [start + low, start + high) of the tensor at ``address``, as fp32."""
    if kind == FP32:
        floats = carray(_pointer(address), size, np.float32)[start + low : start + high]
        for i in range(high - low):
            out[low + i] = floats[i]
        return
    words, bits = carray(_pointer(address), size, np.uint16)[start + low : start + high], out.view(np.uint32)
    for i in range(high - low):
        bits[low + i] = uint32(words[i]) << 16 if kind == BF16 else _from_fp16(words[i])


@numba.njit
def _store(address, kind, size, start, low, high, values, stochastic, noise):  # type: ignore[no-untyped-def]
    """The way back from `_load`: cast values[low:high] and write them."""
    if kind == FP32:
        floats = carray(_pointer(address), size, np.float32)[start + low : start + high]
        for i in range(high - low):
            floats[i] = values[low + i]
        return
    words, bits = carray(_pointer(address), size, np.uint16)[start + low : start + high], values.view(np.uint32)
    for i in range(high - low):
        x = bits[low + i]
        if kind != BF16:
            words[i] = _to_fp16(x)
        elif stochastic:
            words[i] = _to_bf16(x, noise[low + i])
        else:
            words[i] = _to_bf16(x, 0x7FFF + ((x >> 16) & 1))


def _add_chunks(  # type: ignore[no-untyped-def]
    addresses, kinds, size, length, chunks_per_row, offsets, seeds, coefficients,
    param_id, gaussian, stochastic, rounding_seed, table, first, stop,
):  # fmt: skip
    """Tasks [first, stop): task t is chunk t % chunks_per_row of row t // chunks_per_row.

    ``addresses`` and ``kinds`` [1 + num_outputs] describe the weight and the outputs; ``seeds`` [num_seeds] ascend;
    ``coefficients`` [num_seeds, num_outputs], zero where an output has no such term: it is skipped, for even the
    sum with 0 * z is not always the same number (-0.0).
    """
    words = np.empty((4, BLOCKS), np.uint32)
    z = np.empty(CHUNK, np.float32)
    noise = np.empty(CHUNK, np.uint32)
    totals = np.empty((len(addresses) - 1, CHUNK), np.float32)
    for task in range(first, stop):
        offset = offsets[task // chunks_per_row]
        chunk = offset // CHUNK + task % chunks_per_row
        start = (task // chunks_per_row) * length + chunk * CHUNK - offset  # where the chunk starts in the tensor
        low, high = max(offset - chunk * CHUNK, 0), min(offset + length - chunk * CHUNK, CHUNK)
        if low >= high:
            continue
        for v in range(len(totals)):
            _load(addresses[0], kinds[0], size, start, low, high, totals[v])
        for k in range(len(seeds)):
            if gaussian:
                _philox(words, seeds[k], uint64(chunk * BLOCKS), param_id, uint64(STREAM_DIRECTION), BLOCKS)
                _gaussian(words, table, z)
            else:
                _philox(words, seeds[k], uint64(chunk * BITS_BLOCKS), param_id, uint64(STREAM_DIRECTION), BITS_BLOCKS)
                _rademacher(words, z)
            for v in range(len(totals)):
                coefficient, total = coefficients[k, v], totals[v]
                if coefficient != 0:
                    for i in range(low, high):
                        total[i] += coefficient * z[i]
        if stochastic:
            _philox(words, rounding_seed, uint64(chunk * BLOCKS), param_id, uint64(STREAM_ROUNDING), BLOCKS)
            _halves(words, noise)
        for v in range(len(totals)):
            _store(addresses[v + 1], kinds[v + 1], size, start, low, high, totals[v], stochastic, noise)


SIGNATURE = (
    "void(uint64[::1], int64[::1], int64, int64, int64, int64[::1], uint64[::1], float32[:, ::1],"
    " uint64, boolean, boolean, uint64, Array(float32, 1, 'C', readonly=True), int64, int64)"
)


def _compile(function: Callable[..., None]) -> Any:
    """Machine code for ``function``, from numba's cache where there is one.

    numba keeps it beside this file, in NUMBA_CACHE_DIR or in the user's cache directory, whichever can be written.
    With none of them, a full disk or a damaged entry, compile for this process alone.
    """
    try:
        return numba.njit(SIGNATURE, nogil=True, cache=True)(function)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        log.warning("numba's cache cannot be used (%s): the CPU kernel is compiled at every start", error)
        return numba.njit(SIGNATURE, nogil=True)(function)


_kernel = _compile(_add_chunks)
