"""The compiled (numba) kernel behind `cpu`: the same bits as `reference`, at the speed of the memory.

It takes one chunk of 1024 elements at a time through all updates, and the chunk stays in the cache: read the weights,
generate each direction once (all Philox words of the chunk first, then the values with unit stride), add it to every
output that has such a term, cast.

One kernel serves `add` (one update, several outputs) and `advance` (several updates, in place): the loop over updates
around the loop over terms is all that the second needs. Against a kernel for each, CPU time of one thread over 15
rounds in turns, 2026-11-25, AMD EPYC: 0.96 to 1.05 of theirs; a second copy of theirs, as a control, 0.95 to 1.07.

Written for the compiler: loops run from 0 over slices, because an index that might be negative keeps numba from SIMD;
outputs are views of plain addresses, because slices of an array count references with atomic operations; no `fastmath`,
because fused or reordered sums are other numbers.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy import float32, uint16, uint32, uint64

from mezo_dist.directions import bits, philox
from mezo_dist.directions.bits import CHUNK, RADEMACHER, TABLE_SIZE
from mezo_dist.directions.kernels import cpu_arguments
from mezo_dist.directions.kernels.cpu_arguments import SIGNATURE, arguments_at, claim, view
from mezo_dist.directions.kernels.numba_cache import compiled

FP32, BF16, FP16 = range(3)
BLOCKS = 128  # per chunk, where an element takes 16 bits
BLOCKS_OF_BITS = RADEMACHER.blocks_per_chunk
SIGNS = np.where(np.arange(256)[:, None] >> np.arange(8) & 1, 1, -1).astype(np.float32)  # [byte, bit]
M0, M1 = (uint64(m) for m in philox.MULTIPLIERS)
K0, K1 = (uint64(k) for k in philox.KEY_INCREMENTS)
LOW32, SHIFT32 = uint64(philox.MASK32), uint64(32)
ROUNDS, STREAM_ROUNDING = philox.ROUNDS, philox.STREAM_ROUNDING

# mypy: disable-error-code="no-untyped-def"


@numba.njit
def _philox(words, seed, block, param_id, stream, count):
    """words[:, :count] = blocks ``block ..``; chunks are aligned, so these share the high word of their number.

    The words of the state live in 64-bit lanes, where SIMD multiplies 32 bits by 32.

    Args:
        words: uint32 [4, count or more].
        seed: uint64, the key.
        block: uint64, number of the first block.
        param_id: uint64, below 2**32.
        stream: uint64, below 2**32.
        count: number of blocks.
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
    """z[:] = the values of one chunk, bit layout of `bits.halves`. The table fills L2, not L1: that limits the speed.

    Args:
        words: uint32 [4, 128], the chunk's blocks.
        table: fp32 [65536], the values of the gaussian law.
        z: fp32 [1024].
    """
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
    """out[:] = 16 bits per element, bit layout of `bits.halves`."""
    for group in range(8):
        word, shift, part = words[group // 2], uint32(16 * (group % 2)), out[group * BLOCKS : (group + 1) * BLOCKS]
        for j in range(BLOCKS):
            part[j] = (word[j] >> shift) & uint32(0xFFFF)


@numba.njit
def _multiply_add(total, coefficient, z):
    """total[:] += coefficient * z, the product and the sum rounded; fp32 all three, ``total`` as long as ``z``.

    Args:
        total: changed in place.
        coefficient: of the direction.
        z: values of the direction.
    """
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
    """Ask for one chunk of a tensor, to L2.

    Without this a gaussian `add` takes 25 % longer: the processor's own prefetcher sees only the table's random lines.

    Args:
        address: uint64, the tensor's.
        kind: its dtype, FP32, BF16 or FP16.
        start: first element of the chunk in the tensor.
    """
    size = 4 if kind == FP32 else 2
    for byte in range(start * size, (start + CHUNK) * size, 64):
        _prefetch_line(address + uint64(byte))


@numba.njit
def _load(address, kind, start, out):
    """out[:] = elements ``start ..`` of a tensor, as fp32.

    Args:
        address: uint64, the tensor's.
        kind: its dtype, FP32, BF16 or FP16.
        start: first element.
        out: fp32.
    """
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
def _store(address, kind, start, values, is_stochastic, noise):
    """Cast values to a 16-bit dtype and write them to elements ``start ..`` of a tensor.

    Args:
        address: uint64, the tensor's.
        kind: its dtype, BF16 or FP16.
        start: first element.
        values: fp32.
        is_stochastic: round to bf16 by adding ``noise`` instead of to nearest even.
        noise: uint32, as many as ``values``, below 2**16.
    """
    words, bits = view(address, np.uint16, start, start + len(values)), values.view(np.uint32)
    if kind == FP16:
        for i in range(len(words)):
            words[i] = _to_fp16(bits[i])
    elif is_stochastic:
        for i in range(len(words)):
            words[i] = _to_bf16(bits[i], noise[i])
    else:
        for i in range(len(words)):
            words[i] = _to_bf16(bits[i], uint32(0x7FFF) + ((bits[i] >> uint32(16)) & uint32(1)))


@numba.njit
def _direction(arguments, seed, chunk, table, words, z):
    """z[:] = the values of one chunk of a direction.

    Args:
        arguments: the record `Arguments`.
        seed: uint64, the direction's.
        chunk: number of the chunk in the full parameter.
        table: fp32 [65536], the values of the gaussian law.
        words: uint32 [4, 128], scratch.
        z: fp32 [1024].
    """
    if arguments.is_gaussian:
        _philox(words, seed, uint64(chunk * BLOCKS), arguments.param_id, arguments.stream, BLOCKS)
        _gaussian(words, table, z)
    else:
        first_block = uint64(chunk * BLOCKS_OF_BITS)
        _philox(words, seed, first_block, arguments.param_id, arguments.stream, BLOCKS_OF_BITS)
        _rademacher(words, z)


@numba.njit
def _noise(arguments, seed, chunk, words, out):
    """out[:] = the bits of stochastic rounding of one chunk, below 2**16.

    Args:
        arguments: the record `Arguments`.
        seed: uint64, that of the rounding.
        chunk: number of the chunk in the full parameter.
        words: uint32 [4, 128], scratch.
        out: uint32 [1024].
    """
    _philox(words, seed, uint64(chunk * BLOCKS), arguments.param_id, uint64(STREAM_ROUNDING), BLOCKS)
    _halves(words, out)


@numba.njit
def _place(arguments, offsets, task):
    """Where a task lies: task t is chunk ``t % chunks_per_row`` of row ``t // chunks_per_row``.

    Args:
        arguments: the record `Arguments`.
        offsets: int64 [num_rows].
        task: its number.

    Returns:
        (number of the chunk in the full parameter, first element in the tensors, range of the elements in the chunk);
        the range is empty if the row does not reach that chunk.
    """
    row = task // arguments.chunks_per_row
    chunk = offsets[row] // CHUNK + task % arguments.chunks_per_row
    before = offsets[row] - chunk * CHUNK  # elements of the chunk before the row, negative after its first chunk
    low, high = max(before, 0), min(before + arguments.row_length, CHUNK)
    return chunk, row * arguments.row_length + low - before, low, high


def _run(address):
    """The work of one thread: take one chunk after another through all updates, until all chunks are claimed.

    A term that an output lacks is skipped, for even adding 0 * z is not always nothing (-0.0). An fp32 output is summed
    up where it lies. A 16-bit one is summed up in scratch and stored after every update; the next update loads it
    again, which rounds it as stepping does, in the nearest cache.
    """
    arguments = arguments_at(address)
    num_outputs, num_updates, num_terms = arguments.num_outputs, arguments.num_updates, arguments.num_terms
    outputs = view(arguments.outputs, np.uint64, 0, num_outputs)
    kinds = view(arguments.kinds, np.int64, 0, num_outputs)
    offsets = view(arguments.offsets, np.int64, 0, arguments.num_rows)
    seeds = view(arguments.seeds, np.uint64, 0, num_terms)
    coefficients = view(arguments.coefficients, np.float32, 0, num_terms * num_outputs)
    ends = view(arguments.ends, np.int64, 0, num_updates)
    rounding_seeds = view(arguments.rounding_seeds, np.uint64, 0, num_updates)
    table = view(arguments.table, np.float32, 0, TABLE_SIZE)
    words, z, noise = np.empty((4, BLOCKS), np.uint32), np.empty(CHUNK, np.float32), np.empty(CHUNK, np.uint32)
    scratch, totals = np.empty((num_outputs, CHUNK), np.float32), np.empty(num_outputs, np.uint64)
    while True:
        first, stop = claim(address)
        if first >= stop:
            return
        for task in range(first, stop):
            chunk, start, low, high = _place(arguments, offsets, task)
            if low >= high:
                continue
            length = high - low
            for v in range(num_outputs):
                totals[v] = outputs[v] + uint64(4 * start) if kinds[v] == FP32 else uint64(scratch[v].ctypes.data)
            if arguments.is_gaussian and num_terms > 0:
                _prefetch(arguments.weight, arguments.weight_kind, start + CHUNK)
                for v in range(num_outputs):
                    _prefetch(outputs[v], kinds[v], start + CHUNK)
            k = 0
            for u in range(num_updates):
                for v in range(num_outputs):
                    if kinds[v] != FP32 or outputs[v] != arguments.weight:
                        _load(arguments.weight, arguments.weight_kind, start, view(totals[v], np.float32, 0, length))
                while k < ends[u]:
                    _direction(arguments, seeds[k], chunk, table, words, z)
                    for v in range(num_outputs):
                        coefficient = coefficients[k * num_outputs + v]
                        if coefficient != 0:
                            _multiply_add(view(totals[v], np.float32, 0, length), coefficient, z[low:high])
                    k += 1
                if arguments.is_stochastic:
                    _noise(arguments, rounding_seeds[u], chunk, words, noise)
                for v in range(num_outputs):
                    if kinds[v] != FP32:
                        total = view(totals[v], np.float32, 0, length)
                        _store(outputs[v], kinds[v], start, total, arguments.is_stochastic, noise[low:high])


if numba.config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")
kernel = compiled(_run, SIGNATURE, uses=[cpu_arguments, bits, philox])
"""`_run` as a C function of the address of an `Arguments`."""
