"""`add` for tensors on a GPU: one Triton kernel, the same bits as `reference`.

A program works on one tile of a few chunks: it reads the weights once, then generates each direction once and adds it
to every output that has such a term, casts and stores. The bit layouts were chosen for this: neighbouring lanes hold
neighbouring elements, so that every load and store of weights and outputs is coalesced.

It has NEVER RUN ON A REAL GPU so far, and no speed is known. Its bits are checked against the reference in Triton's
interpreter, and its code as compiled for an H100 (sm_90); where there is a GPU, the tests compare the bits there too.

What keeps the bits equal:

- Multiply, then add. The launch option ``enable_fp_fusion=False`` (a field of Triton's ``CUDAOptions`` and
  ``HIPOptions``) keeps LLVM from contracting ``a * b + c`` to one fused operation and calls ptxas with
  ``--fmad=false``. The PTX then says ``mul.rn`` and ``add.rn``, which ptxas may not fuse either (PTX ISA, "add": only
  instructions without a rounding modifier may be).
- bf16 is read and written as 16-bit integers and rounded by integer arithmetic: the interpreter's own cast to bf16
  truncates. fp16 casts are the hardware's (and numpy's), to nearest even.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mezo_dist.directions import philox
from mezo_dist.directions.bits import CHUNK, GAUSSIAN, RADEMACHER, TABLE_SIZE, BitLayout, gaussian_table
from mezo_dist.directions.combination import Combination

# mypy: disable-error-code="no-untyped-def, assignment"

# num_stages: nothing can be pipelined; a program is short, and other programs hide its latency.
OPTIONS = {"enable_fp_fusion": False, "num_warps": 4, "num_stages": 1}
M0, M1 = (tl.constexpr(m) for m in philox.MULTIPLIERS)
K0, K1 = (tl.constexpr(k) for k in philox.KEY_INCREMENTS)
ROUNDS, STREAM_ROUNDING = tl.constexpr(philox.ROUNDS), tl.constexpr(philox.STREAM_ROUNDING)
CHUNK_SIZE = tl.constexpr(CHUNK)
GAUSSIAN_BLOCKS = tl.constexpr(GAUSSIAN.blocks_per_chunk)
RADEMACHER_BLOCKS = tl.constexpr(RADEMACHER.blocks_per_chunk)
HALF_TABLE = tl.constexpr(TABLE_SIZE // 2)


def add(
    weight: Tensor,
    combinations: Sequence[Combination],
    outputs: Sequence[Tensor],
    *,
    param_id: int,
    offsets: Sequence[int],
    bits: BitLayout,
    rounding_seed: int | None,
) -> None:
    """See `mezo_dist.directions.add.add`."""
    if bits.values not in (GAUSSIAN.values, RADEMACHER.values):
        raise ValueError(f"the GPU kernel does not know the bit layout {bits.name!r}")
    rows, length = len(offsets), weight.numel() // len(offsets)
    # A lane needs a whole block for 8 gaussian elements, but 128 lanes need only 8 blocks for 1024 bits.
    chunks = 2 if bits.values is RADEMACHER.values and length >= 2 * CHUNK and len(outputs) <= 2 else 1
    tiles_per_row = triton.cdiv(length + CHUNK - 1, chunks * CHUNK)  # tiles that a row can touch, at worst
    with torch.cuda.device_of(weight):  # Triton launches on the current device; this does nothing to CPU tensors
        place = _place(weight)
        seeds, coefficients = _table_of_terms(tuple(combinations), *place)
        _kernel[(rows * tiles_per_row,)](
            _as_bits(weight.detach()),
            tuple(_as_bits(output.detach()) for output in outputs),
            _half_table(*place),
            seeds,
            coefficients,
            _to_device(torch.tensor(offsets, dtype=torch.int64), weight.device),
            len(seeds),
            length,
            tiles_per_row,
            param_id,
            bits.stream,
            rounding_seed or 0,
            GAUSSIAN=bits.values is GAUSSIAN.values,
            STOCHASTIC=rounding_seed is not None,
            CHUNKS=chunks,
            **OPTIONS,
        )


def advance(
    weight: Tensor,
    updates: Sequence[tuple[Combination, int | None]],
    *,
    param_id: int,
    bits: BitLayout,
    offset: int,
) -> None:
    """See `mezo_dist.directions.add.advance`. One launch per update, which reads and writes the weight each time."""
    for combination, seed in updates:
        add(weight, [combination], [weight], param_id=param_id, offsets=[offset], bits=bits, rounding_seed=seed)


def _as_bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def _place(tensor: Tensor) -> tuple[torch.device, int]:
    """Device and current stream: memory that outlives a call is reused only on the stream that it was allocated on."""
    return tensor.device, torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on ``device`` that does not wait for the kernels queued there: hence the pinned memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type != "cpu" else tensor


@functools.lru_cache(maxsize=64)
def _half_table(device: torch.device, stream: int) -> Tensor:
    """fp32 [32768]: the upper half of the gaussian table; the lower is its mirror image, negated.

    128 KiB instead of 256 can stay in the L1 cache of a big GPU, where the look-ups, all over the table, are cheapest.
    """
    return _to_device(torch.from_numpy(gaussian_table()[TABLE_SIZE // 2 :].copy()), device)


@functools.lru_cache(maxsize=64)
def _table_of_terms(combinations: tuple[Combination, ...], device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    """All seeds in ascending order, int64 [k] (bits of uint64), and the coefficients, fp32 [k, len(combinations)].

    Ascending is the order of every combination, so one pass serves all of them. A coefficient is zero where an output
    has no such term. Cached, because a step adds the same few combinations to every parameter.

    Args:
        combinations: one per output.
        device: where the tables are needed.
        stream: see `_place`.
    """
    seeds = sorted({seed for combination in combinations for seed, _ in combination.terms})
    by_seed = [dict(combination.terms) for combination in combinations]
    coefficients = [[terms.get(seed, 0.0) for terms in by_seed] for seed in seeds]
    signed = [seed - 2**64 if seed >= 2**63 else seed for seed in seeds]
    return (
        _to_device(torch.tensor(signed, dtype=torch.int64), device),
        _to_device(torch.tensor(coefficients, dtype=torch.float32), device),
    )


@triton.jit
def _words(seed, first_block, param_id, stream, BLOCKS: tl.constexpr):
    """uint32 [BLOCKS, 4]: the words of blocks ``first_block ..``.

    Products are 64-bit: one wide multiplication gives both halves, compiled and in the interpreter.

    Args:
        seed: 64-bit scalar, the key.
        first_block: 64-bit scalar.
        param_id: uint32.
        stream: uint32, the generator's.
        BLOCKS: number of blocks.
    """
    block = first_block.to(tl.uint64) + tl.arange(0, BLOCKS).to(tl.uint64)
    c0, c1 = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    c2, c3 = tl.full((BLOCKS,), 0, tl.uint32) + param_id, tl.full((BLOCKS,), 0, tl.uint32) + stream
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        p0, p1 = c0.to(tl.uint64) * M0, c2.to(tl.uint64) * M1
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0, k1 = k0 + K0, k1 + K1
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
        half_table: see `_half_table`.
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
def _to_fp32(x):
    """The fp32 values of loaded elements; int16 stands for bf16."""
    if x.dtype == tl.int16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _to_bf16(x, noise, STOCHASTIC: tl.constexpr):
    """The bits of bf16, int16: to nearest even, or by adding ``noise`` < 2**16 to the bits that are then cut off.

    Args:
        x: fp32.
        noise: uint32; counts only if rounding is stochastic.
        STOCHASTIC: round stochastically.
    """
    bits = x.to(tl.uint32, bitcast=True)
    if not STOCHASTIC:
        noise = 0x7FFF + ((bits >> 16) & 1)
    rounded = tl.where(x == x, bits + noise, 0x7FC00000)  # the sum could make anything of a NaN
    return (rounded >> 16).to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def _sums(
    source, seeds, coefficients, num_seeds, chunk, param_id, stream, half_table,
    GAUSSIAN: tl.constexpr, NUM_OUTPUTS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """``source`` plus every output's combination: a tuple of fp32 [1024 CHUNKS], one per output.

    Args: as those of `_kernel` and `_gaussian`; ``source`` is fp32 [1024 CHUNKS], the weights.
    """
    totals = (source,) * NUM_OUTPUTS
    for k in range(num_seeds):
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


@triton.jit(do_not_specialize=["num_seeds", "length", "tiles_per_row", "param_id", "stream", "rounding_seed"])
def _kernel(
    weight,
    outputs,
    half_table,
    seeds,
    coefficients,
    offsets,
    num_seeds: tl.int32,
    length: tl.int64,
    tiles_per_row: tl.int32,
    param_id: tl.uint32,
    stream: tl.uint32,
    rounding_seed: tl.uint64,
    GAUSSIAN: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Program p does tile p % tiles_per_row of row p // tiles_per_row.

    A term that an output lacks is skipped, for even adding 0 * z is not always nothing (-0.0).

    Args:
        weight: pointer; rows of ``length`` elements, one after another.
        outputs: tuple of pointers, as ``weight``; int16 stands for bf16.
        half_table: see `_half_table`.
        seeds: int64 [num_seeds], ascending; the bits of uint64.
        coefficients: fp32 [num_seeds, len(outputs)], zero where an output has no such term.
        offsets: int64, index of each row's first element in the full parameter.
        num_seeds: number of terms.
        length: elements of a row.
        tiles_per_row: tiles that a row can touch, at worst.
        param_id: see `seeds.param_id`.
        stream: the generator's.
        rounding_seed: that of stochastic rounding.
        GAUSSIAN: gaussian values, else rademacher.
        STOCHASTIC: bf16 outputs are rounded stochastically.
        CHUNKS: chunks of a tile.
    """
    TILE: tl.constexpr = CHUNKS * CHUNK_SIZE
    NUM_OUTPUTS: tl.constexpr = len(outputs)
    row = tl.program_id(0) // tiles_per_row
    offset = tl.load(offsets + row)
    chunk = offset // CHUNK_SIZE + (tl.program_id(0) % tiles_per_row).to(tl.int64) * CHUNKS
    before = offset - chunk * CHUNK_SIZE  # elements of the tile before the row, negative after its first tile
    low = tl.maximum(before, 0).to(tl.int32)
    high = tl.minimum(before + length, TILE).to(tl.int32)
    if low >= high:
        return
    element = tl.arange(0, TILE)
    inside = (element - low).to(tl.uint32, bitcast=True) < (high - low).to(tl.uint32, bitcast=True)
    start = row.to(tl.int64) * length - before

    source = _to_fp32(tl.load(weight + start + element, inside, other=0, cache_modifier=".cg"))
    totals = _sums(
        source, seeds, coefficients, num_seeds, chunk, param_id, stream, half_table, GAUSSIAN, NUM_OUTPUTS, CHUNKS
    )
    noise = 0
    if STOCHASTIC:
        noise_words = _words(
            rounding_seed, chunk * GAUSSIAN_BLOCKS, param_id, STREAM_ROUNDING, GAUSSIAN_BLOCKS * CHUNKS
        )
        noise = _halves(noise_words, CHUNKS)
    for v in tl.static_range(NUM_OUTPUTS):
        if outputs[v].dtype.element_ty == tl.int16:
            result = _to_bf16(totals[v], noise, STOCHASTIC)
        else:
            result = totals[v].to(outputs[v].dtype.element_ty)
        tl.store(outputs[v] + start + element, result, inside)
