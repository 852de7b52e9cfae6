"""Triton code of `fused_linear`: a linear layer whose weights are perturbed in registers. The host side is there.

A program computes one tile of every output: some rows of each input by some rows of the weight (output features). It
walks along the weight's rows in spans: of a span it loads the weights once, makes the bits of each direction once, and
multiplies the inputs of each variant by that variant's weights, which exist in registers alone.

The bit layouts say what a span is. Rademacher: the 128 elements of one generator block. Gaussian: a chunk of 1024
elements, where a block has the elements b, b + 128, ..., b + 896. Spans begin at multiples of their length in the
flattened parameter, and so at another column in another row. Rows ``PERIOD`` apart (span / gcd(span, columns)) begin
at the same place of a span: a tile consists of such rows, and is cut in spans at the same columns for all of them.
Where the number of columns is a multiple of the span, these are neighbours.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mezo_dist.directions.bits import CHUNK
from mezo_dist.directions.kernels.gpu_values import GAUSSIAN_BLOCKS, HALF_TABLE, _cast, _philox, _to_fp32

# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"

CHUNK_SIZE = tl.constexpr(CHUNK)
SIGNS = tl.constexpr(128)
"""Elements of a rademacher direction that a block has, 32 in each of its 4 words."""
PARTS = tl.constexpr(8)
"""Elements of a gaussian direction that a block has, 128 apart."""


@triton.jit
def _signs(word):
    """fp32 [rows, 32]: the rademacher values of a word, uint32 [rows], of a block of each row."""
    bits = (word[:, None] >> tl.arange(0, 32).to(tl.uint32)[None, :]) & 1
    return tl.where(bits == 1, 1.0, -1.0)


@triton.jit
def _quantiles(word, half_table, PART: tl.constexpr):
    """fp32: the gaussian values of half a word of each block.

    Args:
        word: uint32, any shape.
        half_table: see `gpu_inputs.half_table`.
        PART: number of the half among those of a block; odd: the high one.
    """
    index = ((word >> 16) if PART % 2 else (word & 0xFFFF)).to(tl.int32) - HALF_TABLE
    magnitude = tl.load(half_table + (index ^ (index >> 31)))  # ~index where negative
    return (magnitude.to(tl.int32, bitcast=True) ^ (index & -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def _load(pointer, inside, CODE: tl.constexpr, AS_FP32: tl.constexpr):
    """Elements of a tensor, zero outside.

    Args:
        pointer: to each of them.
        inside: which of them there are; None: all.
        CODE: of the dtype.
        AS_FP32: as fp32 (bf16 by integer arithmetic, for the interpreter cannot multiply it), else as they are.
    """
    if AS_FP32:
        if CODE == 1:
            pointer = pointer.to(tl.pointer_type(tl.int16), bitcast=True)
        value = tl.load(pointer, inside, other=0) if inside is not None else tl.load(pointer)
        value = _to_fp32(value, CODE)
    else:
        value = tl.load(pointer, inside, other=0) if inside is not None else tl.load(pointer)
    return value


@triton.jit
def _operand(total, CODE: tl.constexpr, INTERPRETED: tl.constexpr):
    """A variant's weights as a matrix product takes them: fp32 rounded to nearest even to the dtype of a code.

    Args:
        total: fp32.
        CODE: of the dtype.
        INTERPRETED: round bf16 by integer arithmetic and keep it as fp32, for the interpreter's own cast truncates.
    """
    if INTERPRETED:
        value = _to_fp32(_cast(total, 0, CODE, False), CODE)
    elif CODE == 0:
        value = total
    elif CODE == 1:
        value = total.to(tl.bfloat16)
    else:
        value = total.to(tl.float16)
    return value


@triton.jit
def _multiplied(
    sums, weight, inputs, values, coefficients, rows, columns, row_inside, places, num_columns,
    SOURCE: tl.constexpr, TARGET: tl.constexpr, NUM_TERMS: tl.constexpr, NUM_OUTPUTS: tl.constexpr,
    MASKED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """``sums`` plus every input times its variant's weights, over some columns: a tuple of fp32 [inputs, rows].

    Args:
        sums: what was added up before.
        weight: pointer to the weights.
        inputs: pointers to the inputs.
        values: of each direction, fp32 [rows, columns].
        coefficients: of each direction for each output, one after another.
        rows: int64 [rows], indices of the rows' first elements.
        columns: int32 [columns]; with MASKED some may be outside.
        row_inside: which rows there are.
        places: int64 [inputs], indices of the inputs' first elements, and which inputs there are.
        num_columns: of the weight.
        SOURCE, TARGET, NUM_TERMS, NUM_OUTPUTS, INTERPRETED: see `linear_kernel`.
        MASKED: see ``columns``.
    """
    inside, input_inside = row_inside[:, None], places[1][:, None]
    if MASKED:
        column_inside = (columns >= 0) & (columns < num_columns)
        inside, input_inside = inside & column_inside[None, :], input_inside & column_inside[None, :]
    source = _load(weight + rows[:, None] + columns[None, :], inside, SOURCE, True)
    added = ()
    for v in tl.static_range(NUM_OUTPUTS):
        total = source
        for k in tl.static_range(NUM_TERMS):
            total = total + coefficients[k * NUM_OUTPUTS + v] * values[k]
        x = _load(inputs[v] + places[0][:, None] + columns[None, :], input_inside, TARGET, INTERPRETED)
        moved = _operand(total, TARGET, INTERPRETED)
        added = added + (tl.dot(x, tl.trans(moved), sums[v], input_precision="ieee"),)  # noqa: RUF005
    return added


@triton.jit(do_not_specialize=["num_inputs", "offset", "param_id", "stream"])
def linear_kernel(
    weight, inputs, outputs, biases, half_table, seeds, coefficients,
    num_inputs: tl.int32, num_rows, num_columns, offset: tl.int64, param_id: tl.uint32, stream: tl.uint32,
    SOURCE: tl.constexpr, TARGET: tl.constexpr, GAUSSIAN: tl.constexpr, NUM_TERMS: tl.constexpr,
    NUM_OUTPUTS: tl.constexpr, HAS_BIAS: tl.constexpr, PERIOD: tl.constexpr,
    WHOLE: tl.constexpr, INTERPRETED: tl.constexpr,
    TILE_INPUTS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_BLOCKS: tl.constexpr,
):  # fmt: skip
    """``outputs[v] = cast(inputs[v] cast(weight + combinations[v])^T + biases[v])`` for every v.

    Args:
        weight: [num_rows, num_columns], contiguous.
        inputs: one [num_inputs, num_columns] per output, contiguous, of the variants' dtype.
        outputs: [num_inputs, num_rows], contiguous, of the variants' dtype.
        biases: one [num_rows] per output, of the variants' dtype; anything if HAS_BIAS is false.
        half_table: see `gpu_inputs.half_table`.
        seeds: int64 [NUM_TERMS], the bits of uint64, ascending.
        coefficients: fp32 [NUM_TERMS, NUM_OUTPUTS]; every output has every term.
        num_inputs: rows of each input.
        num_rows: output features.
        num_columns: input features.
        offset: index of the weight's first element in the flattened parameter.
        param_id: see `seeds.param_id`.
        stream: the generator's.
        SOURCE: code of the weight's dtype.
        TARGET: code of the variants' dtype.
        GAUSSIAN: gaussian values, else rademacher.
        NUM_TERMS: number of directions.
        NUM_OUTPUTS: number of outputs.
        HAS_BIAS: there are biases.
        PERIOD: see above.
        WHOLE: every row consists of whole spans.
        INTERPRETED: see `_operand`.
        TILE_INPUTS: rows of inputs in a tile.
        TILE_ROWS: rows of the weight in a tile.
        TILE_BLOCKS: generator blocks of a gaussian chunk that are made at a time, at most 128.
    """
    SPAN: tl.constexpr = CHUNK_SIZE if GAUSSIAN else SIGNS
    tiles = tl.cdiv(num_inputs, TILE_INPUTS)  # neighbouring programs share a tile of the weight
    input_row = (tl.program_id(0) % tiles) * TILE_INPUTS + tl.arange(0, TILE_INPUTS)
    row_tile = tl.program_id(0) // tiles
    residue = row_tile % PERIOD
    row = residue + PERIOD * (row_tile // PERIOD * TILE_ROWS + tl.arange(0, TILE_ROWS))
    row_inside, input_inside = row < num_rows, input_row < num_inputs
    rows, places = row.to(tl.int64) * num_columns, (input_row.to(tl.int64) * num_columns, input_inside)
    phase = ((offset + residue.to(tl.int64) * num_columns) % SPAN).to(tl.int32)  # elements of the first span before us
    if WHOLE:
        phase = 0
    first_span = (offset + rows) // SPAN

    factors = ()
    for t in tl.static_range(NUM_TERMS * NUM_OUTPUTS):
        factors = factors + (tl.load(coefficients + t),)  # noqa: RUF005
    sums = ()
    for _ in tl.static_range(NUM_OUTPUTS):
        sums = sums + (tl.zeros((TILE_INPUTS, TILE_ROWS), tl.float32),)  # noqa: RUF005
    if GAUSSIAN:
        for start in range(0, tl.cdiv(phase + num_columns, SPAN) * GAUSSIAN_BLOCKS, TILE_BLOCKS):
            block = start + tl.arange(0, TILE_BLOCKS)  # from the row's first span on
            number = (first_span * GAUSSIAN_BLOCKS)[:, None] + block[None, :]
            first_column = start // 128 * 1024 + start % 128 - phase  # of part 0
            first_columns = first_column + tl.arange(0, TILE_BLOCKS)
            words = ()
            for k in tl.static_range(NUM_TERMS):
                seed = tl.load(seeds + k).to(tl.uint64, bitcast=True)
                words = words + (_philox(number.to(tl.uint64), seed, param_id, stream),)  # noqa: RUF005
            for part in tl.static_range(PARTS):
                columns = first_columns + part * GAUSSIAN_BLOCKS
                first = first_column + part * GAUSSIAN_BLOCKS
                if WHOLE or ((first < num_columns) & (first + TILE_BLOCKS > 0)):
                    values = ()
                    for k in tl.static_range(NUM_TERMS):
                        values = values + (_quantiles(words[k][part // 2], half_table, part),)  # noqa: RUF005
                    sums = _multiplied(
                        sums, weight, inputs, values, factors, rows, columns, row_inside, places, num_columns,
                        SOURCE, TARGET, NUM_TERMS, NUM_OUTPUTS, not WHOLE, INTERPRETED,
                    )  # fmt: skip
    else:
        for i in range(tl.cdiv(phase + num_columns, SPAN)):
            words = ()
            for k in tl.static_range(NUM_TERMS):
                seed = tl.load(seeds + k).to(tl.uint64, bitcast=True)
                words = words + (_philox((first_span + i).to(tl.uint64), seed, param_id, stream),)  # noqa: RUF005
            for part in tl.static_range(4):
                first = i * SPAN - phase + part * 32
                if WHOLE or ((first < num_columns) & (first + 32 > 0)):
                    values = ()
                    for k in tl.static_range(NUM_TERMS):
                        values = values + (_signs(words[k][part]),)  # noqa: RUF005
                    columns = first + tl.arange(0, 32)
                    sums = _multiplied(
                        sums, weight, inputs, values, factors, rows, columns, row_inside, places, num_columns,
                        SOURCE, TARGET, NUM_TERMS, NUM_OUTPUTS, not WHOLE, INTERPRETED,
                    )  # fmt: skip

    place = input_row.to(tl.int64)[:, None] * num_rows + row[None, :]
    inside = input_inside[:, None] & row_inside[None, :]
    for v in tl.static_range(NUM_OUTPUTS):
        total = sums[v]
        if HAS_BIAS:
            total = total + _load(biases[v] + row, row_inside, TARGET, True)[None, :]
        pointer = outputs[v] + place
        if TARGET == 1:
            pointer = pointer.to(tl.pointer_type(tl.int16), bitcast=True)
        tl.store(pointer, _cast(total, 0, TARGET, False), inside)
