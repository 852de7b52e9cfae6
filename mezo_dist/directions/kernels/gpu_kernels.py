"""Triton code of `gpu`: what a program does with its tile. The host side, and what keeps the bits equal, is there.

Each kernel works on many tensors at once: a table, int64, has a row for each of them, and a program looks up which one
its tile belongs to. Addresses in it count from those that the launch names (of the first tensor, of its first output,
of the factors), so that a table stays right when memory is allocated anew. They are turned into pointers of the dtypes
that the launch names by codes: 0 is fp32, 1 bf16 (as int16), 2 fp16.

A tile is `TILE_CHUNKS` chunks of the flattened full parameter, one after another. Those that are whole are read and
written without masks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mezo_dist.directions.kernels.gpu_values import (
    CHUNK_SIZE,
    _cast,
    _gaussian,
    _lowrank,
    _noise,
    _pointer,
    _rademacher,
    _to_fp32,
)

# mypy: disable-error-code="no-untyped-def, assignment"
# ruff: noqa: SIM102, SIM108 - Triton compiles these forms otherwise

# Columns of the tables; those of outputs come last, one each.
FIRST_TILE, WEIGHT, STRIDE, OFFSET, LENGTH, TILES, PARAM_ID = (tl.constexpr(i) for i in range(7))
U, V, FIRST_ROW, NUM_ROWS, COLUMNS, OUTPUTS = (tl.constexpr(i) for i in range(7, 13))
STREAM, DIVISOR, PIECES, FILL_COLUMNS = (tl.constexpr(i) for i in range(7, 11))  # of `fill_kernel`, after PARAM_ID
IS_GAUSSIAN, IS_RADEMACHER, IS_LOWRANK = (tl.constexpr(i) for i in range(3))
"""Laws by number."""


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
def _piece_of(entry, tile, rows, HAS_ROWS: tl.constexpr):
    """Which piece of a tensor a tile belongs to, number of the tile in it, and where it starts in the full parameter.

    Args:
        entry: the tensor's row of the table.
        tile: number of the tile in the tensor.
        rows: address of the numbers of rows, int64, if the tensors are rows of parameters.
        HAS_ROWS: they are; else a tensor is one piece.
    """
    piece = tile * 0
    if HAS_ROWS:
        tiles = tl.load(entry + TILES)
        piece = tile // tiles
        tile = tile - piece * tiles
        offset = tl.load(rows.to(tl.int64).to(tl.pointer_type(tl.int64)) + piece) * tl.load(entry + STRIDE)
    else:
        offset = tl.load(entry + OFFSET)
    return piece, tile, offset


@triton.jit
def _read(pointers, inside, CODE: tl.constexpr, MASKED: tl.constexpr):
    """fp32 [1024 CHUNKS]: weights; the ``.cg`` leaves the first-level cache to the gaussian table.

    Args:
        pointers: to each of them.
        inside: which of them there are, if MASKED.
        CODE: of the dtype.
        MASKED: some are not there.
    """
    if MASKED:
        loaded = tl.load(pointers, inside, other=0, cache_modifier=".cg")
    else:
        loaded = tl.load(pointers, cache_modifier=".cg")
    return _to_fp32(loaded, CODE)


@triton.jit
def _write(pointers, value, inside, MASKED: tl.constexpr):
    """The reverse of `_read`.

    Args:
        pointers: to each element.
        value: of their dtype.
        inside: which of them there are, if MASKED.
        MASKED: some are not there.
    """
    if MASKED:
        tl.store(pointers, value, inside)
    else:
        tl.store(pointers, value)


@triton.jit
def _write_output(
    address, start, element, inside, value, noise,
    CODE: tl.constexpr, STOCHASTIC: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Some chunks of an output.

    Args:
        address: int64 scalar, of the tensor.
        start: int64 scalar, index in it of the first element.
        element: int32 [1024 CHUNKS], from 0 on.
        inside: which elements there are, if MASKED.
        value: fp32.
        noise: see `_cast`.
        CODE: of the dtype.
        STOCHASTIC: round stochastically.
        MASKED: some elements are not there.
    """
    places = _pointer(address, CODE) + start + element
    _write(places, _cast(value, noise, CODE, STOCHASTIC), inside, MASKED)


@triton.jit
def _values(
    seeds, k, chunk, param_id, stream, half_table, u, v, row, column, num_rows, columns,
    LAW: tl.constexpr, RANK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """fp32 [1024 CHUNKS]: values of direction ``k``; arguments as those of `add_kernel`, `_gaussian` and `_lowrank`."""
    if LAW == IS_LOWRANK:
        z = _lowrank(u, v, k, row, column, num_rows, columns, RANK, CHUNKS)
    else:
        seed = tl.load(seeds + k).to(tl.uint64, bitcast=True)
        if LAW == IS_GAUSSIAN:
            z = _gaussian(seed, chunk, param_id, stream, half_table, CHUNKS)
        else:
            z = _rademacher(seed, chunk, param_id, stream, CHUNKS)
    return z


@triton.jit
def _chunks(
    entry, weight, first_output, base, start, chunk, length, row, column, num_rows, columns, u, v,
    half_table, seeds, coefficients, rounding, num_terms, param_id, stream, rounding_seed, factor,
    SOURCE: tl.constexpr, TARGETS: tl.constexpr, NUM_OUTPUTS: tl.constexpr, LAW: tl.constexpr, RANK: tl.constexpr,
    STOCHASTIC: tl.constexpr, MANY: tl.constexpr, SCALED: tl.constexpr, DENSE: tl.constexpr,
    CHUNKS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Some chunks of a tensor. Terms are skipped where an output lacks them: adding even 0 * z is not always nothing
    (-0.0). With ``MANY`` each update is rounded as it was at its time.

    Args: as those of `add_kernel`, `_gaussian` and `_lowrank`, and:
        entry: the tensor's row of the table.
        weight: pointer to the tensor's first element.
        base: int64 scalar, elements of the tensor before the piece.
        start: int64 scalar, index in the piece of the first element, which may be outside of it.
        chunk: int64 scalar, number of the first chunk in the full parameter.
        length: int64 scalar, elements of the piece.
        CHUNKS: number of chunks.
        MASKED: some elements are outside.
    """
    element = tl.arange(0, CHUNKS * CHUNK_SIZE)
    inside = (element >= -start) & (element < length - start)
    weight_places = weight + base + start + element
    total = _read(weight_places, inside, SOURCE, MASKED)
    if SCALED:
        total = total * factor
    if MANY:
        for k in range(num_terms):
            z = _values(
                seeds, k, chunk, param_id, stream, half_table, u, v, row, column, num_rows, columns,
                LAW, RANK, CHUNKS,
            )  # fmt: skip
            total = total + tl.load(coefficients + k) * z
            if SOURCE != 0:
                if tl.load(rounding + 2 * k) != 0:
                    noise = 0
                    if STOCHASTIC:
                        noise = _noise(
                            tl.load(rounding + 2 * k + 1).to(tl.uint64, bitcast=True), chunk, param_id, CHUNKS
                        )
                    total = _to_fp32(_cast(total, noise, SOURCE, STOCHASTIC), SOURCE)
        _write(weight_places, _cast(total, 0, SOURCE, False), inside, MASKED)
    else:
        totals = (total,) * NUM_OUTPUTS
        for k in range(num_terms):
            z = _values(
                seeds, k, chunk, param_id, stream, half_table, u, v, row, column, num_rows, columns,
                LAW, RANK, CHUNKS,
            )  # fmt: skip
            sums = ()
            for n in tl.static_range(NUM_OUTPUTS):
                coefficient = tl.load(coefficients + k * NUM_OUTPUTS + n)
                moved = totals[n] + coefficient * z
                if not DENSE:
                    moved = tl.where(coefficient == 0, totals[n], moved)
                sums = sums + (moved,)  # noqa: RUF005 - Triton does not know the star
            totals = sums
        noise = 0
        if STOCHASTIC:
            noise = _noise(rounding_seed, chunk, param_id, CHUNKS)
        for n in tl.static_range(NUM_OUTPUTS):
            _write_output(
                first_output + tl.load(entry + OUTPUTS + n), base + start, element, inside, totals[n], noise,
                (TARGETS >> (2 * n)) & 3, STOCHASTIC, MASKED,
            )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "first_weight",
        "first_output",
        "rows",
        "factors",
        "num_terms",
        "stream",
        "rounding_seed",
        "factor",
    ]
)
def add_kernel(
    table, first_weight: tl.int64, first_output: tl.int64, rows: tl.int64, factors: tl.int64,
    half_table, seeds, coefficients, rounding,
    num_terms: tl.int32, stream: tl.uint32, rounding_seed: tl.uint64, factor: tl.float32,
    GROUP: tl.constexpr, SOURCE: tl.constexpr, TARGETS: tl.constexpr, NUM_OUTPUTS: tl.constexpr, LAW: tl.constexpr,
    RANK: tl.constexpr, STOCHASTIC: tl.constexpr, MANY: tl.constexpr, SCALED: tl.constexpr, DENSE: tl.constexpr,
    HAS_ROWS: tl.constexpr, CHUNKS: tl.constexpr, TILE_CHUNKS: tl.constexpr,
):  # fmt: skip
    """One update of any outputs, or (``MANY``) many updates of one; of all tensors of a table.

    Args:
        table: int64 [GROUP, 12 + NUM_OUTPUTS], see the columns above.
        first_weight: address that those of weights count from.
        first_output: address that those of outputs count from.
        rows: see `_piece_of`.
        factors: address that those of U and V count from, of low-rank directions.
        half_table: see `gpu_inputs.half_table`.
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
        LAW: of the directions.
        RANK: of low-rank directions.
        STOCHASTIC: bf16 outputs are rounded stochastically.
        MANY: many updates.
        SCALED: multiply by ``factor``.
        DENSE: no coefficient is zero.
        HAS_ROWS: tensors are rows of parameters.
        CHUNKS: chunks that are worked on together.
        TILE_CHUNKS: chunks of a tile.
    """
    entry = _row_of(table, OUTPUTS + NUM_OUTPUTS, GROUP)
    param_id, length = tl.load(entry + PARAM_ID).to(tl.uint32), tl.load(entry + LENGTH)
    piece, tile, offset = _piece_of(entry, tl.program_id(0) - tl.load(entry + FIRST_TILE), rows, HAS_ROWS)
    weight = _pointer(first_weight + tl.load(entry + WEIGHT), SOURCE)
    first_chunk = offset // CHUNK_SIZE + tile * TILE_CHUNKS
    start = first_chunk * CHUNK_SIZE - offset
    u, v, row, column, num_rows, columns = weight, weight, start, 0, start, 0
    if LAW == IS_LOWRANK:
        num_rows, columns = tl.load(entry + NUM_ROWS), tl.load(entry + COLUMNS).to(tl.int32)
        u, v = _pointer(factors + tl.load(entry + U), 0), _pointer(factors + tl.load(entry + V), 0)
        row = first_chunk * CHUNK_SIZE // columns
        column = (first_chunk * CHUNK_SIZE - row * columns).to(tl.int32)
        if HAS_ROWS:
            row = row - offset // columns + piece
        else:
            row = row - tl.load(entry + FIRST_ROW)
    for n in range(0, TILE_CHUNKS, CHUNKS):
        begin = start + n * CHUNK_SIZE
        if begin < length:
            if (begin >= 0) & (begin + CHUNKS * CHUNK_SIZE <= length):
                _chunks(
                    entry, weight, first_output, piece * length, begin, first_chunk + n, length, row,
                    column + n * CHUNK_SIZE, num_rows, columns, u, v, half_table, seeds, coefficients, rounding,
                    num_terms, param_id, stream, rounding_seed, factor, SOURCE, TARGETS, NUM_OUTPUTS, LAW, RANK,
                    STOCHASTIC, MANY, SCALED, DENSE, CHUNKS,
                    False,
                )  # fmt: skip
            else:
                _chunks(
                    entry, weight, first_output, piece * length, begin, first_chunk + n, length, row,
                    column + n * CHUNK_SIZE, num_rows, columns, u, v, half_table, seeds, coefficients, rounding,
                    num_terms, param_id, stream, rounding_seed, factor, SOURCE, TARGETS, NUM_OUTPUTS, LAW, RANK,
                    STOCHASTIC, MANY, SCALED, DENSE, CHUNKS,
                    True,
                )  # fmt: skip


@triton.jit(do_not_specialize=["first", "rows"])
def fill_kernel(
    table, first: tl.int64, rows: tl.int64, half_table, seeds,
    GROUP: tl.constexpr, LAW: tl.constexpr, HAS_ROWS: tl.constexpr,
):  # fmt: skip
    """The values of many directions, fp32, of all tensors of a table; program (chunk, number of the direction).

    Args:
        table: int64 [GROUP, 10], see the columns above; a tensor is [number of directions, pieces, length].
        first: address that those in the table count from.
        rows: see `_piece_of`.
        half_table: see `gpu_inputs.half_table`.
        seeds: int64, the bits of uint64.
        GROUP: rows of the table.
        LAW: of the values.
        HAS_ROWS: tensors have rows of parameters.
    """
    entry = _row_of(table, FILL_COLUMNS, GROUP)
    param_id, stream = tl.load(entry + PARAM_ID).to(tl.uint32), tl.load(entry + STREAM).to(tl.uint32)
    divisor, length = tl.load(entry + DIVISOR).to(tl.int32).to(tl.float32, bitcast=True), tl.load(entry + LENGTH)
    piece, tile, offset = _piece_of(entry, tl.program_id(0) - tl.load(entry + FIRST_TILE), rows, HAS_ROWS)
    chunk = offset // CHUNK_SIZE + tile
    start, element = chunk * CHUNK_SIZE - offset, tl.arange(0, CHUNK_SIZE)
    piece = piece + tl.program_id(1) * tl.load(entry + PIECES)
    seed = tl.load(seeds + tl.program_id(1)).to(tl.uint64, bitcast=True)
    if LAW == IS_GAUSSIAN:
        z = _gaussian(seed, chunk, param_id, stream, half_table, 1)
    else:
        z = _rademacher(seed, chunk, param_id, stream, 1)
    places = _pointer(first + tl.load(entry + WEIGHT), 0) + piece * length + start + element
    inside = (element >= -start) & (element < length - start)
    tl.store(places, tl.math.div_rn(z, divisor + z * 0), inside)
