"""The compiled (numba) kernel behind `cpu`: the same bits as `reference`, at the speed of the memory.

It works on one chunk of 1024 elements at a time and stays in the cache: read the weights, make each direction once
(all Philox words of the chunk first, then the values with unit stride), add it to every output that wants it, cast.

Written for the compiler: loops run from 0 over slices, because an index that might be negative keeps numba from SIMD;
no `fastmath`, because fused or reordered sums are other numbers.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy import float32, int64, uint16, uint32, uint64

from mezo_dist.directions import bits, philox
from mezo_dist.directions.bits import CHUNK, RADEMACHER
from mezo_dist.directions.kernels import cpu_jobs
from mezo_dist.directions.kernels.cpu_jobs import JOB, claim, view
from mezo_dist.directions.kernels.numba_cache import compiled

FP32, BF16, FP16 = range(3)
BLOCKS = 128  # per chunk, where an element takes 16 bits
BLOCKS_OF_BITS = RADEMACHER.blocks_per_chunk
SIGNS = np.where(np.arange(256)[:, None] >> np.arange(8) & 1, 1, -1).astype(np.float32)  # of the bits of each byte
M0, M1 = (uint64(m) for m in philox.MULTIPLIERS)
K0, K1 = (uint64(k) for k in philox.KEY_INCREMENTS)
LOW32, SHIFT32 = uint64(philox.MASK32), uint64(32)
ROUNDS, STREAM_ROUNDING = philox.ROUNDS, philox.STREAM_ROUNDING

# mypy: disable-error-code="no-untyped-def"


@numba.njit
def _philox(words, seed, block, param_id, stream, count):
    """words[:, :count] = blocks ``block ..``; chunks are aligned, so these share the high word of their number.

    The words of the state live in 64-bit lanes, where SIMD multiplies 32 bits by 32.
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
def _gaussian(words, table, z):
    """z[:] = the values of one chunk, layout of `laws.halves`. The table fills L2, not L1: that is the speed limit."""
    for group in range(8):
        word, shift, out = words[group // 2], uint32(16 * (group % 2)), z[group * BLOCKS : (group + 1) * BLOCKS]
        for j in range(BLOCKS):
            out[j] = table[(word[j] >> shift) & uint32(0xFFFF)]


@numba.njit
def _rademacher(words, z):
    """z[:] = the values of one chunk: element e takes block e // 128, word (e // 32) % 4, bit e % 32 (1 = +1)."""
    for group in range(CHUNK // 32):
        word = words[group % 4, group // 4]
        for byte in range(4):
            out, signs = z[group * 32 + byte * 8 :], SIGNS[(word >> uint32(8 * byte)) & uint32(0xFF)]
            # fmt: off
            out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7] = (  # one wide load, one wide store
                signs[0], signs[1], signs[2], signs[3], signs[4], signs[5], signs[6], signs[7]
            )
            # fmt: on


@numba.njit
def _halves(words, out):
    """out[:] = 16 bits per element, layout of `laws.halves`."""
    for group in range(8):
        word, shift, part = words[group // 2], uint32(16 * (group % 2)), out[group * BLOCKS : (group + 1) * BLOCKS]
        for j in range(BLOCKS):
            part[j] = (word[j] >> shift) & uint32(0xFFFF)


@numba.njit
def _multiply_add(total, coefficient, z):
    for i in range(len(total)):
        total[i] += coefficient * z[i]


@numba.njit
def _bits(x):
    return float32(x).view(np.uint32)


@numba.njit
def _float(bits):
    return uint32(bits).view(np.float32)


@numba.njit
def _from_fp16(half):
    """fp16 bits -> fp32 bits. Subnormals by an exact product, so that flush-to-zero modes change nothing."""
    sign, magnitude = uint32(half & uint16(0x8000)) << uint32(16), uint32(half & uint16(0x7FFF))
    bits = (magnitude << uint32(13)) + uint32(112 << 23)  # 112: the difference of the exponents' biases
    if magnitude >= uint32(0x7C00):  # infinity or NaN
        bits += uint32(112 << 23)
    if magnitude < uint32(0x0400):
        bits = uint64(_bits(float32(magnitude) * float32(2.0**-24)))
    return uint32(bits | sign)


@numba.njit
def _to_fp16(bits):
    """fp32 bits -> fp16 bits, to nearest even."""
    magnitude = bits & uint32(0x7FFFFFFF)
    x = _float(magnitude)
    if x < float32(2.0**-14):  # subnormal: the sum with 0.5 is rounded at fp16's smallest step, 2**-24
        half = uint16(_bits(x + float32(0.5)) & uint32(0x7FFF))
    elif x < float32(65520.0):
        odd = (magnitude >> uint32(13)) & uint32(1)
        half = uint16((magnitude + uint32(0xFFF) + odd - uint32(112 << 23)) >> uint32(13))
    else:
        half = uint16(0x7C00) if x == x else uint16(0x7E00)
    return half | uint16((bits >> uint32(16)) & uint32(0x8000))


@numba.njit
def _to_bf16(bits, noise):
    """fp32 bits -> bf16 bits; ``noise`` < 2**16 is added to the bits that are then cut off."""
    x = _float(bits)
    return uint16((bits + noise) >> uint32(16)) if x == x else uint16(0x7FC0)


@intrinsic
def _prefetch_line(typing_context, address):
    """Ask for the cache line at ``address`` (any number: prefetching never faults), to L2."""

    def generate(context, builder, signature, arguments):
        int32 = ir.IntType(32)
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch", [cgutils.voidptr_t], ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t] + [int32] * 3)
        )
        builder.call(prefetch, [builder.inttoptr(arguments[0], cgutils.voidptr_t), int32(0), int32(2), int32(1)])
        return context.get_dummy_value()

    return types.void(types.uint64), generate


@numba.njit
def _prefetch(address, kind, start):
    """Ask for one chunk from element ``start`` on of the tensor at ``address``.

    The processor's own prefetcher sees only the table's random lines; without this a gaussian add takes 25 % longer.
    """
    size = 4 if kind == FP32 else 2
    for byte in range(start * size, (start + CHUNK) * size, 64):
        _prefetch_line(address + uint64(byte))


@numba.njit
def _load(address, kind, start, out):
    """out[:] = elements ``start ..`` of the tensor at ``address``, as fp32."""
    stop = start + len(out)
    if kind == FP32:
        floats = view(address, np.float32, start, stop)
        for i in range(len(out)):
            out[i] = floats[i]
        return
    words, bits = view(address, np.uint16, start, stop), out.view(np.uint32)
    if kind == BF16:
        for i in range(len(out)):
            bits[i] = uint32(words[i]) << uint32(16)
    else:
        for i in range(len(out)):
            bits[i] = _from_fp16(words[i])


@numba.njit
def _store(address, kind, start, values, stochastic, noise):
    """Cast ``values`` to a 16-bit kind and write them to elements ``start ..`` of the tensor at ``address``."""
    words, bits = view(address, np.uint16, start, start + len(values)), values.view(np.uint32)
    if kind == FP16:
        for i in range(len(words)):
            words[i] = _to_fp16(bits[i])
    elif stochastic:
        for i in range(len(words)):
            words[i] = _to_bf16(bits[i], noise[i])
    else:
        for i in range(len(words)):
            words[i] = _to_bf16(bits[i], uint32(0x7FFF) + ((bits[i] >> uint32(16)) & uint32(1)))


@numba.njit
def _total(address, kind, start, scratch):
    """Where an output is summed up: fp32 where it belongs, a 16-bit one in ``scratch`` until it is cast."""
    return view(address, np.float32, start, start + len(scratch)) if kind == FP32 else scratch


@numba.njit
def _add_chunks(
    addresses, kinds, length, chunks_per_row, offsets, seeds, coefficients,
    param_id, stream, gaussian, stochastic, rounding_seed, table, first, stop,
):  # fmt: skip
    """Do the tasks [first, stop): task t is chunk t % chunks_per_row of row t // chunks_per_row.

    ``addresses`` and ``kinds`` [1 + num_outputs] describe the weight and the outputs; ``seeds`` [num_seeds] ascend;
    ``coefficients`` [num_seeds, num_outputs] are zero where an output has no such term: it is skipped, for even
    adding 0 * z is not always nothing (-0.0).
    """
    num_outputs = len(addresses) - 1
    words, z = np.empty((4, BLOCKS), np.uint32), np.empty(CHUNK, np.float32)
    scratch, noise = np.empty((num_outputs, CHUNK), np.float32), np.empty(CHUNK, np.uint32)
    for task in range(first, stop):
        row = task // chunks_per_row
        chunk = offsets[row] // CHUNK + task % chunks_per_row
        before = offsets[row] - chunk * CHUNK  # elements of the chunk before the row, negative after its first chunk
        low, high = max(before, 0), min(before + length, CHUNK)
        if low >= high:
            continue
        start = row * length + low - before
        for v in range(num_outputs):
            address, kind = addresses[v + 1], kinds[v + 1]
            if kind != FP32 or address != addresses[0]:
                _load(addresses[0], kinds[0], start, _total(address, kind, start, scratch[v, low:high]))
        for k in range(len(seeds)):
            if gaussian:
                if k == 0:
                    for i in range(len(addresses)):
                        _prefetch(addresses[i], kinds[i], start + CHUNK)
                _philox(words, seeds[k], uint64(chunk * BLOCKS), param_id, stream, BLOCKS)
                _gaussian(words, table, z)
            else:
                _philox(words, seeds[k], uint64(chunk * BLOCKS_OF_BITS), param_id, stream, BLOCKS_OF_BITS)
                _rademacher(words, z)
            for v in range(num_outputs):
                if coefficients[k, v] != 0:
                    total = _total(addresses[v + 1], kinds[v + 1], start, scratch[v, low:high])
                    _multiply_add(total, coefficients[k, v], z[low:high])
        if stochastic:
            _philox(words, rounding_seed, uint64(chunk * BLOCKS), param_id, uint64(STREAM_ROUNDING), BLOCKS)
            _halves(words, noise)
        for v in range(num_outputs):
            if kinds[v + 1] != FP32:
                _store(addresses[v + 1], kinds[v + 1], start, scratch[v, low:high], stochastic, noise[low:high])


def _add(job):
    """What a thread does. The words are those that `mezo_dist.directions.kernels.cpu.add` writes, in that order."""
    words = view(job, np.uint64, 3, 16)
    num_outputs, num_rows, num_seeds = int64(words[0]), int64(words[1]), int64(words[2])
    tensors, end = 16 + 1 + num_outputs, 16 + 2 * (1 + num_outputs)
    while True:
        first, stop = claim(job)
        if first >= stop:
            return
        _add_chunks(
            view(job, np.uint64, 16, tensors),
            view(job, np.int64, tensors, end),
            int64(words[3]),
            int64(words[4]),
            view(job, np.int64, end, end + num_rows),
            view(words[5], np.uint64, 0, num_seeds),
            view(words[6], np.float32, 0, num_seeds * num_outputs).reshape(num_seeds, num_outputs),
            words[7],
            words[8],
            words[9] != 0,
            words[10] != 0,
            words[11],
            view(words[12], np.float32, 0, 1 << 16),
            first,
            stop,
        )


if numba.config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")
kernel = compiled(_add, JOB, uses=[cpu_jobs, bits, philox])
"""`_add`, compiled."""
