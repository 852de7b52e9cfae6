"""Triton code of `gpu`: the values of directions and of rounding noise, some chunks at a time, and casts.

128 threads share a chunk, each with every 128th element. Of a gaussian direction these are the 8 elements of one block
of the generator, and nothing passes between threads. Of a rademacher direction a block has 128 neighbours: a few
threads call the generator, and hand its words to the others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mezo_dist.directions import philox
from mezo_dist.directions.bits import CHUNK, GAUSSIAN, RADEMACHER, TABLE_SIZE

# mypy: disable-error-code="no-untyped-def, assignment"

M0, M1 = (tl.constexpr(m) for m in philox.MULTIPLIERS)
K0, K1 = (tl.constexpr(k) for k in philox.KEY_INCREMENTS)
ROUNDS, STREAM_ROUNDING = tl.constexpr(philox.ROUNDS), tl.constexpr(philox.STREAM_ROUNDING)
CHUNK_SIZE = tl.constexpr(CHUNK)
GAUSSIAN_BLOCKS = tl.constexpr(GAUSSIAN.blocks_per_chunk)
RADEMACHER_BLOCKS = tl.constexpr(RADEMACHER.blocks_per_chunk)
HALF_TABLE = tl.constexpr(TABLE_SIZE // 2)


@triton.jit
def _philox(block, seed, param_id, stream):
    """The four words, uint32, of blocks of any shape.

    Products are 64-bit: one wide multiplication gives both halves, compiled and in the interpreter.

    Args:
        block: uint64, numbers of blocks.
        seed: 64-bit scalar, the key.
        param_id: uint32.
        stream: uint32, the generator's.
    """
    c0, c1 = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    c2, c3 = c0 * 0 + param_id, c0 * 0 + stream
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        p0, p1 = c0.to(tl.uint64) * M0, c2.to(tl.uint64) * M1
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0, k1 = k0 + K0, k1 + K1
    return c0, c1, c2, c3


IS_INTERPRETED = not isinstance(_philox, triton.JITFunction)
"""Triton decides at import whether it compiles or interprets."""
INTERPRETED = tl.constexpr(IS_INTERPRETED)


@triton.jit
def _words(seed, first_block, param_id, stream, BLOCKS: tl.constexpr):
    """uint32 [BLOCKS, 4]: the words of blocks ``first_block ..``.

    Args:
        seed: 64-bit scalar, the key.
        first_block: 64-bit scalar.
        param_id: uint32.
        stream: uint32, the generator's.
        BLOCKS: number of blocks.
    """
    block = first_block.to(tl.uint64) + tl.arange(0, BLOCKS).to(tl.uint64)
    c0, c1, c2, c3 = _philox(block, seed, param_id, stream)
    return tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), (BLOCKS, 4))


@triton.jit
def _halves(words, CHUNKS: tl.constexpr):
    """16 bits per element, bit layout of `bits.halves`: uint32 [128 CHUNKS, 4] -> [1024 CHUNKS]."""
    halves = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (CHUNKS, GAUSSIAN_BLOCKS, 8))
    return tl.reshape(tl.permute(halves, (0, 2, 1)), (CHUNKS * CHUNK_SIZE,))


@triton.jit
def _gaussian(seed, chunk, param_id, stream, half_table, CHUNKS: tl.constexpr):
    """fp32 [1024 CHUNKS]: the values of some chunks of a gaussian direction.

    Args:
        seed: 64-bit scalar, the direction's.
        chunk: 64-bit scalar, number of the first chunk in the full parameter.
        param_id: uint32.
        stream: uint32, the generator's.
        half_table: see `gpu_inputs.half_table`.
        CHUNKS: number of chunks.
    """
    words = _words(seed, chunk * GAUSSIAN_BLOCKS, param_id, stream, GAUSSIAN_BLOCKS * CHUNKS)
    index = _halves(words, CHUNKS).to(tl.int32) - HALF_TABLE
    magnitude = tl.load(half_table + (index ^ (index >> 31)))  # ~index where negative
    return (magnitude.to(tl.int32, bitcast=True) ^ (index & -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def _rademacher(seed, chunk, param_id, stream, CHUNKS: tl.constexpr):
    """fp32 [1024 CHUNKS]: as `_gaussian`, 1 bit per element; in memory order these are block, word, bit.

    Args:
        seed: the direction's, uint64.
        chunk: number of the first chunk.
        param_id: see `seeds.param_id`.
        stream: of the generator.
        CHUNKS: number of chunks.
    """
    words = _words(seed, chunk * RADEMACHER_BLOCKS, param_id, stream, RADEMACHER_BLOCKS * CHUNKS)
    top = words[:, :, None] << (31 - tl.arange(0, 32)).to(tl.uint32)[None, None, :]
    signs = (
        tl.reshape(top, (CHUNKS * CHUNK_SIZE,)) & 0x80000000
    ) ^ 0xBF800000  # of -1.0, whose sign a set bit takes away
    return signs.to(tl.float32, bitcast=True)


@triton.jit
def _noise(seed, chunk, param_id, CHUNKS: tl.constexpr):
    """uint32 [1024 CHUNKS]: the 16 bits per element of stochastic rounding.

    Args:
        seed: 64-bit scalar, the rounding's.
        chunk: number of the first chunk.
        param_id: uint32.
        CHUNKS: number of chunks.
    """
    return _halves(_words(seed, chunk * GAUSSIAN_BLOCKS, param_id, STREAM_ROUNDING, GAUSSIAN_BLOCKS * CHUNKS), CHUNKS)


@triton.jit
def _lowrank(u, v, k, row, first, num_rows, columns, RANK: tl.constexpr, CHUNKS: tl.constexpr):
    """fp32 [1024 CHUNKS]: ``sum_r u[row, r] v[column, r]``, r in order, each operation rounded.

    Args:
        u: pointer, fp32 [directions, num_rows, RANK].
        v: pointer, fp32 [directions, columns, RANK].
        k: number of the direction.
        row: int64 scalar, row of U of the first element, or one further up; that and later ones may be outside of U.
        first: int32 scalar, column of the first element, counted from the start of that row.
        num_rows: rows of U.
        columns: rows of V.
        RANK: columns of both.
        CHUNKS: number of chunks.
    """
    down = first // columns
    row, first = row + down, first - down * columns
    left, right = u + k * num_rows * RANK, v + k * columns * RANK
    column = first + tl.arange(0, CHUNKS * CHUNK_SIZE)
    if first + CHUNKS * CHUNK_SIZE <= columns:  # all in one row
        z = _product(left + row * RANK, right + column * RANK, RANK)
    else:
        below = column // columns
        rows = tl.minimum(tl.maximum(row + below, 0), num_rows - 1)
        z = _product(left + rows * RANK, right + (column - below * columns) * RANK, RANK)
    return z


@triton.jit
def _product(left, right, RANK: tl.constexpr):
    """``sum_r left[r] right[r]`` of pointers to the first ones, r in order, each operation rounded."""
    z = tl.load(left) * tl.load(right)
    for r in tl.static_range(1, RANK):
        z = z + tl.load(left + r) * tl.load(right + r)
    return z


@triton.jit
def _pointer(address, CODE: tl.constexpr):
    """A pointer to elements of the dtype with this code."""
    if CODE == 0:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif CODE == 1:
        pointer = address.to(tl.pointer_type(tl.int16))
    else:
        pointer = address.to(tl.pointer_type(tl.float16))
    return pointer


@triton.jit
def _to_fp32(x, CODE: tl.constexpr):
    """The fp32 values of loaded elements."""
    if CODE == 1:
        value = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        value = x.to(tl.float32)
    return value


@triton.jit
def _cast(x, noise, CODE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """fp32 as the dtype of a code. To bf16: to nearest even, or by adding ``noise`` to the bits that are then cut off.

    Args:
        x: fp32.
        noise: uint32 below 2**16; counts only if rounding is stochastic.
        CODE: of the dtype.
        STOCHASTIC: round stochastically.
    """
    if CODE == 0:
        value = x
    elif CODE == 2:
        value = x.to(tl.float16)
    elif STOCHASTIC or INTERPRETED:  # the interpreter's own cast truncates
        bits = x.to(tl.uint32, bitcast=True)
        if not STOCHASTIC:
            noise = 0x7FFF + ((bits >> 16) & 1)
        rounded = tl.where(x == x, bits + noise, 0x7FC00000)  # the sum could make anything of a NaN
        value = (rounded >> 16).to(tl.uint16).to(tl.int16, bitcast=True)
    else:
        value = x.to(tl.bfloat16).to(tl.int16, bitcast=True)
    return value
