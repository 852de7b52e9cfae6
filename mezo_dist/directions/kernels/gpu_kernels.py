"""Triton code of `gpu`: what a program does with its tile. The host side, and what keeps the bits equal, is there.

Each kernel works on many tensors at once: a table, int64, has a row for each of them, and a program looks up which one
its tile belongs to. Addresses in it count from those that the launch names (of the first tensor, of its first output,
of the factors), so that a table stays right when memory is allocated anew. They are turned into pointers of the dtypes
that the launch names by codes: 0 is fp32, 1 bf16 (as int16), 2 fp16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mezo_dist.directions import philox
from mezo_dist.directions.bits import CHUNK, GAUSSIAN, RADEMACHER, TABLE_SIZE

# mypy: disable-error-code="no-untyped-def, assignment"
# ruff: noqa: SIM102 - Triton compiles these forms otherwise

M0, M1 = (tl.constexpr(m) for m in philox.MULTIPLIERS)
K0, K1 = (tl.constexpr(k) for k in philox.KEY_INCREMENTS)
ROUNDS, STREAM_ROUNDING = tl.constexpr(philox.ROUNDS), tl.constexpr(philox.STREAM_ROUNDING)
CHUNK_SIZE = tl.constexpr(CHUNK)
GAUSSIAN_BLOCKS = tl.constexpr(GAUSSIAN.blocks_per_chunk)
RADEMACHER_BLOCKS = tl.constexpr(RADEMACHER.blocks_per_chunk)
HALF_TABLE = tl.constexpr(TABLE_SIZE // 2)

# Columns of the tables; those of outputs come last, one each.
FIRST_TILE, WEIGHT, STRIDE, OFFSET, LENGTH, TILES, PARAM_ID, OUTPUTS = (tl.constexpr(i) for i in range(8))
STREAM, DIVISOR, PIECES, FILL_COLUMNS = (tl.constexpr(i) for i in range(7, 11))  # after those up to PARAM_ID
U, V, FIRST_ROW, NUM_ROWS, COLUMNS, LOWRANK_OUTPUTS = (tl.constexpr(i) for i in range(7, 13))


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
        half_table: see `gpu._half_table`.
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
    bits = (words[:, :, None] >> tl.arange(0, 32).to(tl.uint32)[None, None, :]) & 1
    return tl.where(tl.reshape(bits, (CHUNKS * CHUNK_SIZE,)) == 1, 1.0, -1.0)


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
def _noise_at(seed, element, param_id):
    """`_noise` of elements anywhere: a block of the generator for each, of which one half of a word counts.

    Args:
        seed: 64-bit scalar, the rounding's.
        element: int64, indices in the full parameter.
        param_id: uint32.
    """
    place = element % CHUNK_SIZE
    block = element // CHUNK_SIZE * GAUSSIAN_BLOCKS + place % GAUSSIAN_BLOCKS
    c0, c1, c2, c3 = _philox(block.to(tl.uint64), seed, param_id, STREAM_ROUNDING)
    word = place // 256
    chosen = tl.where(word == 0, c0, tl.where(word == 1, c1, tl.where(word == 2, c2, c3)))
    return tl.where((place // 128) % 2 == 0, chosen & 0xFFFF, chosen >> 16)


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
    else:
        bits = x.to(tl.uint32, bitcast=True)
        if not STOCHASTIC:
            noise = 0x7FFF + ((bits >> 16) & 1)
        rounded = tl.where(x == x, bits + noise, 0x7FC00000)  # the sum could make anything of a NaN
        value = (rounded >> 16).to(tl.uint16).to(tl.int16, bitcast=True)
    return value


@triton.jit
def _store(address, place, inside, value, noise, CODE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Write a tile in the dtype of a code.

    Args:
        address: of the tensor.
        place: index of each element in it.
        inside: which elements are there.
        value: fp32.
        noise: see `_cast`.
        CODE: of the dtype.
        STOCHASTIC: round stochastically.
    """
    tl.store(_pointer(address, CODE) + place, _cast(value, noise, CODE, STOCHASTIC), inside)


@triton.jit
def _row_of(table, WIDTH: tl.constexpr, GROUP: tl.constexpr):
    """Pointer to the row of the tensor that this program's tile belongs to.

    Args:
        table: int64 [GROUP, WIDTH], rows by first tile; filled up with rows that start after the last tile.
        WIDTH: columns.
        GROUP: rows, a power of two.
    """
    index = 0
    if GROUP > 1:
        first_tiles = tl.load(table + tl.arange(0, GROUP) * WIDTH + FIRST_TILE)
        index = tl.sum((first_tiles <= tl.program_id(0)).to(tl.int32), 0) - 1
    return table + index * WIDTH


@triton.jit
def _place(entry, tile, rows, CHUNKS: tl.constexpr):
    """Where a tile of `_add` and `_fill` lies: number of its row, its first chunk in the full parameter, index of that
    chunk's start from the start of the row, and which elements of the tile are the row's.

    Args:
        entry: the tensor's row of the table.
        tile: number of the tile in the tensor.
        rows: address of the numbers of rows, int64, if the tensor is rows of a parameter.
        CHUNKS: chunks of a tile.
    """
    length, tiles = tl.load(entry + LENGTH), tl.load(entry + TILES)
    row = tile // tiles
    stride = tl.load(entry + STRIDE)
    if stride != 0:
        offset = tl.load(rows.to(tl.int64).to(tl.pointer_type(tl.int64)) + row) * stride
    else:
        offset = tl.load(entry + OFFSET)
    chunk = offset // CHUNK_SIZE + (tile % tiles) * CHUNKS
    before = offset - chunk * CHUNK_SIZE  # elements of the tile before the row, negative after its first tile
    element = tl.arange(0, CHUNKS * CHUNK_SIZE)
    inside = (element >= before) & (element < before + length)
    return row, chunk, before, inside


@triton.jit
def _advanced(
    total, seeds, coefficients, rounding, num_terms, chunk, param_id, stream, half_table,
    CODE: tl.constexpr, GAUSSIAN: tl.constexpr, STOCHASTIC: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One update after another, each rounded as it was at its time: fp32 [1024 CHUNKS].

    Args: as those of `add_kernel` and `_gaussian`; ``total`` is fp32 [1024 CHUNKS], the weights.
    """
    for k in range(num_terms):
        seed = tl.load(seeds + k).to(tl.uint64, bitcast=True)
        if GAUSSIAN:
            z = _gaussian(seed, chunk, param_id, stream, half_table, CHUNKS)
        else:
            z = _rademacher(seed, chunk, param_id, stream, CHUNKS)
        total = total + tl.load(coefficients + k) * z
        if CODE != 0:
            if tl.load(rounding + 2 * k) != 0:
                noise = 0
                if STOCHASTIC:
                    noise = _noise(tl.load(rounding + 2 * k + 1).to(tl.uint64, bitcast=True), chunk, param_id, CHUNKS)
                total = _to_fp32(_cast(total, noise, CODE, STOCHASTIC), CODE)
    return total


@triton.jit
def _sums(
    source, seeds, coefficients, num_terms, chunk, param_id, stream, half_table,
    GAUSSIAN: tl.constexpr, NUM_OUTPUTS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """``source`` plus every output's combination: a tuple of fp32 [1024 CHUNKS], one per output.

    A term that an output lacks is skipped, for even adding 0 * z is not always nothing (-0.0).

    Args: as those of `add_kernel` and `_gaussian`; ``source`` is fp32 [1024 CHUNKS], the weights.
    """
    totals = (source,) * NUM_OUTPUTS
    for k in range(num_terms):
        seed = tl.load(seeds + k).to(tl.uint64, bitcast=True)
        if GAUSSIAN:
            z = _gaussian(seed, chunk, param_id, stream, half_table, CHUNKS)
        else:
            z = _rademacher(seed, chunk, param_id, stream, CHUNKS)
        sums = ()
        for v in tl.static_range(NUM_OUTPUTS):
            coefficient = tl.load(coefficients + k * NUM_OUTPUTS + v)
            total = tl.where(coefficient == 0, totals[v], totals[v] + coefficient * z)
            sums = sums + (total,)  # noqa: RUF005 - Triton does not know the star
        totals = sums
    return totals


@triton.jit(
    do_not_specialize=["first_weight", "first_output", "rows", "num_terms", "stream", "rounding_seed", "factor"]
)
def add_kernel(
    table, first_weight: tl.int64, first_output: tl.int64, rows: tl.int64, half_table, seeds, coefficients, rounding,
    num_terms: tl.int32, stream: tl.uint32, rounding_seed: tl.uint64, factor: tl.float32,
    GROUP: tl.constexpr, SOURCE: tl.constexpr, TARGETS: tl.constexpr, NUM_OUTPUTS: tl.constexpr,
    GAUSSIAN: tl.constexpr, STOCHASTIC: tl.constexpr, MANY: tl.constexpr, SCALED: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One update of any outputs, or (``MANY``) many updates of one; of all tensors of a table.

    Args:
        table: int64 [GROUP, 7 + NUM_OUTPUTS], see the columns above.
        first_weight: address that those of weights count from.
        first_output: address that those of outputs count from.
        rows: see `_place`.
        half_table: see `gpu._half_table`.
        seeds: int64 [num_terms], the bits of uint64; ascending within an update.
        coefficients: fp32 [num_terms, NUM_OUTPUTS], zero where an output has no such term.
        rounding: with ``MANY``, int64 [num_terms, 2]: whether an update ends here, and the seed of its rounding.
        num_terms: number of terms.
        stream: the generator's.
        rounding_seed: that of stochastic rounding.
        factor: what weights are multiplied by before anything is added, if ``SCALED``.
        GROUP: rows of the table.
        SOURCE: code of the weights' dtype.
        TARGETS: codes of the outputs' dtypes, two bits each, the first one lowest.
        NUM_OUTPUTS: of each tensor.
        GAUSSIAN: gaussian values, else rademacher.
        STOCHASTIC: bf16 outputs are rounded stochastically.
        MANY: many updates.
        SCALED: multiply by ``factor``.
        CHUNKS: chunks of a tile.
    """
    entry = _row_of(table, OUTPUTS + NUM_OUTPUTS, GROUP)
    param_id = tl.load(entry + PARAM_ID).to(tl.uint32)
    row, chunk, before, inside = _place(entry, tl.program_id(0) - tl.load(entry + FIRST_TILE), rows, CHUNKS)
    place = row * tl.load(entry + LENGTH) - before + tl.arange(0, CHUNKS * CHUNK_SIZE)

    weight = _pointer(first_weight + tl.load(entry + WEIGHT), SOURCE)
    source = _to_fp32(tl.load(weight + place, inside, other=0, cache_modifier=".cg"), SOURCE)
    if SCALED:
        source = source * factor
    if MANY:
        total = _advanced(
            source, seeds, coefficients, rounding, num_terms, chunk, param_id, stream, half_table,
            SOURCE, GAUSSIAN, STOCHASTIC, CHUNKS,
        )  # fmt: skip
        tl.store(weight + place, _cast(total, 0, SOURCE, False), inside)
    else:
        totals = _sums(
            source, seeds, coefficients, num_terms, chunk, param_id, stream, half_table, GAUSSIAN, NUM_OUTPUTS, CHUNKS
        )
        noise = 0
        if STOCHASTIC:
            noise = _noise(rounding_seed, chunk, param_id, CHUNKS)
        for v in tl.static_range(NUM_OUTPUTS):
            address = first_output + tl.load(entry + OUTPUTS + v)
            _store(address, place, inside, totals[v], noise, (TARGETS >> (2 * v)) & 3, STOCHASTIC)


@triton.jit(do_not_specialize=["first", "rows"])
def fill_kernel(
    table, first: tl.int64, rows: tl.int64, half_table, seeds,
    GROUP: tl.constexpr, GAUSSIAN: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The values of many directions, fp32, of all tensors of a table; program (tile, number of the direction).

    Args:
        table: int64 [GROUP, 10], see the columns above; a tensor is [number of directions, pieces, length].
        first: address that those in the table count from.
        rows: see `_place`.
        half_table: see `gpu._half_table`.
        seeds: int64, the bits of uint64.
        GROUP: rows of the table.
        GAUSSIAN: gaussian values, else rademacher.
        CHUNKS: chunks of a tile.
    """
    entry = _row_of(table, FILL_COLUMNS, GROUP)
    param_id, stream = tl.load(entry + PARAM_ID).to(tl.uint32), tl.load(entry + STREAM).to(tl.uint32)
    divisor = tl.load(entry + DIVISOR).to(tl.int32).to(tl.float32, bitcast=True)
    row, chunk, before, inside = _place(entry, tl.program_id(0) - tl.load(entry + FIRST_TILE), rows, CHUNKS)
    row = row + tl.program_id(1) * tl.load(entry + PIECES)
    place = row * tl.load(entry + LENGTH) - before + tl.arange(0, CHUNKS * CHUNK_SIZE)
    seed = tl.load(seeds + tl.program_id(1)).to(tl.uint64, bitcast=True)
    if GAUSSIAN:
        z = _gaussian(seed, chunk, param_id, stream, half_table, CHUNKS)
    else:
        z = _rademacher(seed, chunk, param_id, stream, CHUNKS)
    tl.store(_pointer(first + tl.load(entry + WEIGHT), 0) + place, tl.math.div_rn(z, divisor + z * 0), inside)


@triton.jit
def _product(u, v, k, rows, columns, row_inside, column_inside, num_rows, num_columns, RANK: tl.constexpr):
    """fp32 [rows, columns]: ``sum_r u[row, r] v[column, r]`` of direction ``k``, r in order, each operation rounded.

    Args:
        u: pointer, fp32 [directions, num_rows, RANK].
        v: pointer, fp32 [directions, num_columns, RANK].
        k: number of the direction.
        rows: int64 [n], of a tile.
        columns: int64 [m], of a tile.
        row_inside: which rows there are.
        column_inside: which columns there are.
        num_rows: rows of U.
        num_columns: rows of V.
        RANK: columns of both.
    """
    left, right = u + (k * num_rows + rows) * RANK, v + (k * num_columns + columns) * RANK
    z = tl.load(left, row_inside, other=0)[:, None] * tl.load(right, column_inside, other=0)[None, :]
    for r in tl.static_range(1, RANK):
        z = z + tl.load(left + r, row_inside, other=0)[:, None] * tl.load(right + r, column_inside, other=0)[None, :]
    return z


@triton.jit(do_not_specialize=["first_weight", "first_output", "factors", "num_terms", "rounding_seed"])
def lowrank_kernel(
    table, first_weight: tl.int64, first_output: tl.int64, factors: tl.int64,
    coefficients, rounding, num_terms: tl.int32, rounding_seed: tl.uint64,
    GROUP: tl.constexpr, SOURCE: tl.constexpr, TARGETS: tl.constexpr, NUM_OUTPUTS: tl.constexpr, RANK: tl.constexpr,
    STOCHASTIC: tl.constexpr, MANY: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """`add_kernel` of low-rank directions, whose factors are there; a tile is some rows and columns of a matrix.

    Args:
        table: int64 [GROUP, 12 + NUM_OUTPUTS], see the columns above.
        first_weight: address that those of weights count from.
        first_output: address that those of outputs count from.
        factors: address that those of U and V count from.
        coefficients: fp32 [num_terms, NUM_OUTPUTS], zero where an output has no such term.
        rounding: see `add_kernel`.
        num_terms: number of directions.
        rounding_seed: that of stochastic rounding.
        GROUP: rows of the table.
        SOURCE: code of the weights' dtype.
        TARGETS: codes of the outputs' dtypes, see `add_kernel`.
        NUM_OUTPUTS: of each tensor.
        RANK: columns of the factors.
        STOCHASTIC: bf16 outputs are rounded stochastically.
        MANY: many updates of one output, the weight itself.
        TILE_ROWS: rows of a tile.
        TILE_COLUMNS: columns of a tile.
    """
    entry = _row_of(table, LOWRANK_OUTPUTS + NUM_OUTPUTS, GROUP)
    param_id = tl.load(entry + PARAM_ID).to(tl.uint32)
    tile, tiles = tl.program_id(0) - tl.load(entry + FIRST_TILE), tl.load(entry + TILES)
    num_rows, num_columns = tl.load(entry + NUM_ROWS), tl.load(entry + COLUMNS)
    rows = tile // tiles * TILE_ROWS + tl.arange(0, TILE_ROWS)
    columns = tile % tiles * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    row_inside, column_inside = rows < num_rows, columns < num_columns
    skip = tl.load(entry + OFFSET) - tl.load(entry + FIRST_ROW) * num_columns  # elements of the first row before ours
    place = rows[:, None] * num_columns + columns[None, :] - skip
    inside = (place >= 0) & (place < tl.load(entry + LENGTH)) & column_inside[None, :]
    u, v = _pointer(factors + tl.load(entry + U), 0), _pointer(factors + tl.load(entry + V), 0)

    weight = _pointer(first_weight + tl.load(entry + WEIGHT), SOURCE)
    total = _to_fp32(tl.load(weight + place, inside, other=0, cache_modifier=".cg"), SOURCE)
    element = place + tl.load(entry + OFFSET)
    if MANY:
        for k in range(num_terms):
            z = _product(u, v, k, rows, columns, row_inside, column_inside, num_rows, num_columns, RANK)
            total = total + tl.load(coefficients + k) * z
            if SOURCE != 0:
                if tl.load(rounding + 2 * k) != 0:
                    noise = 0
                    if STOCHASTIC:
                        noise = _noise_at(tl.load(rounding + 2 * k + 1).to(tl.uint64, bitcast=True), element, param_id)
                    total = _to_fp32(_cast(total, noise, SOURCE, STOCHASTIC), SOURCE)
        tl.store(weight + place, _cast(total, 0, SOURCE, False), inside)
    else:
        totals = (total,) * NUM_OUTPUTS
        for k in range(num_terms):
            z = _product(u, v, k, rows, columns, row_inside, column_inside, num_rows, num_columns, RANK)
            sums = ()
            for n in tl.static_range(NUM_OUTPUTS):
                coefficient = tl.load(coefficients + k * NUM_OUTPUTS + n)
                moved = tl.where(coefficient == 0, totals[n], totals[n] + coefficient * z)
                sums = sums + (moved,)  # noqa: RUF005 - Triton does not know the star
            totals = sums
        noise = 0
        if STOCHASTIC:
            noise = _noise_at(rounding_seed, element, param_id)
        for n in tl.static_range(NUM_OUTPUTS):
            address = first_output + tl.load(entry + LOWRANK_OUTPUTS + n)
            _store(address, place, inside, totals[n], noise, (TARGETS >> (2 * n)) & 3, STOCHASTIC)
