"""`add`, `advance`, `scale` and low-rank factors for tensors on a GPU: Triton kernels, the same bits as `reference`.

A program (`gpu_kernels`) works on one tile: it reads the weights once, then generates each direction once and adds it
to every output that has such a term, casts and stores. The bit layouts were chosen for this: neighbouring lanes hold
neighbouring elements, so that every load and store of weights and outputs is coalesced. One launch serves many tensors
(the parameters of a module, or those of a block that an update changes): a table on the GPU says where each of them
lies. Tables are remembered, for a run works on the same tensors in every step, so that a step sends its seeds and
coefficients to the GPU, and nothing else.

It has NEVER RUN ON A REAL GPU so far, and no speed is known. Its bits are checked against the reference in Triton's
interpreter, and its code as compiled for sm_80, sm_90 and sm_100; where there is a GPU, the tests compare the bits
there too.

What keeps the bits equal:

- Multiply, then add. The launch option ``enable_fp_fusion=False`` (a field of Triton's ``CUDAOptions`` and
  ``HIPOptions``) keeps LLVM from contracting ``a * b + c`` to one fused operation and calls ptxas with
  ``--fmad=false``. The PTX then says ``mul.rn`` and ``add.rn``, which ptxas may not fuse either (PTX ISA, "add": only
  instructions without a rounding modifier may be).
- bf16 is read and written as 16-bit integers and rounded by integer arithmetic: the interpreter's own cast to bf16
  truncates. fp16 casts are the hardware's (and numpy's), to nearest even.
- An element of a low-rank direction is ``sum_r u[r] v[r]``, r in order, each operation rounded: no matrix product, so
  that no tile and no shard matters. (The CPU uses matrix products: the same directions, other last bits.)
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mezo_dist.directions import devices
from mezo_dist.directions.bits import (
    CHUNK,
    FACTOR_U,
    FACTOR_V,
    GAUSSIAN,
    RADEMACHER,
    TABLE_SIZE,
    BitLayout,
    gaussian_table,
)
from mezo_dist.directions.combination import ZERO, Combination
from mezo_dist.directions.kernels import gpu_kernels
from mezo_dist.directions.parts import Part

Update = tuple[Combination, "int | None"]
"""A combination, and the seed of its stochastic rounding or None."""
OPTIONS = {"enable_fp_fusion": False, "num_warps": 4, "num_stages": 1}
"""num_stages: nothing can be pipelined; a program is short, and other programs hide its latency."""
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MOST_PARTS = 32
"""Tensors of one launch."""
MOST_OUTPUTS = 8
"""Outputs of each tensor in one launch: their sums are in registers."""
MOST_TERMS = 64
"""Low-rank directions of one launch: their factors are in memory."""
TILE_ROWS, TILE_COLUMNS = 4, 128
"""Tile of a low-rank direction."""
AFTER_ALL = 2**62
"""First tile of table rows that are no tensors."""


def add(
    weight: Tensor,
    combinations: Sequence[Combination],
    outputs: Sequence[Tensor],
    *,
    param_id: int,
    offsets: Sequence[int] | Tensor,
    bits: BitLayout,
    rounding_seed: int | None,
) -> None:
    """See `mezo_dist.directions.add.add`; ``offsets`` may be an int64 tensor on the GPU, for which nothing waits."""
    if not isinstance(offsets, Tensor) and len(offsets) == 1:
        part = Part(weight, tuple(outputs), param_id, weight.shape, offsets[0])
    else:
        where = offsets if isinstance(offsets, Tensor) else torch.tensor(offsets, dtype=torch.int64)
        part = Part(weight, tuple(outputs), param_id, weight.shape, starts=_upload(where, weight.device))
    add_parts([part], combinations, bits=bits, rounding_seed=rounding_seed)


def advance(weight: Tensor, updates: Sequence[Update], *, param_id: int, bits: BitLayout, offset: int) -> None:
    """See `mezo_dist.directions.add.advance`."""
    advance_parts([Part(weight, (weight,), param_id, weight.shape, offset)], updates, bits=bits)


def add_parts(
    parts: Sequence[Part], combinations: Sequence[Combination], *, bits: BitLayout, rounding_seed: int | None
) -> None:
    """`add` for many tensors: one launch for up to `MOST_PARTS` of the same dtypes.

    Args:
        parts: the tensors; each has one output per combination.
        combinations: the same for all of them.
        bits: bit layout of the directions.
        rounding_seed: for bf16 outputs that are to be rounded stochastically.
    """
    _check_known(bits)
    for some, chosen in _launches(parts, combinations):
        _launch_add(some, [(chosen, rounding_seed)], bits, many=False)


def advance_parts(parts: Sequence[Part], updates: Sequence[Update], *, bits: BitLayout) -> None:
    """`advance` for many tensors, each of which is its own output: one pass over them.

    Args:
        parts: the tensors.
        updates: (combination, seed of stochastic rounding or None), one after another.
        bits: bit layout of the directions.
    """
    _check_known(bits)
    todo = [([combination], seed) for combination, seed in updates if combination]
    for some, _ in _launches(parts, [ZERO]) if todo else ():
        _launch_add(some, todo, bits, many=True)


def scale_parts(parts: Sequence[Part], factor: float, *, rounding_seed: int | None) -> None:
    """``weight <- cast(factor * weight)`` for many tensors, each of which is its own output.

    Args:
        parts: the tensors.
        factor: rounded to fp32.
        rounding_seed: for bf16 weights that are to be rounded stochastically.
    """
    for some, _ in _launches(parts, [ZERO]):
        _launch_add(some, [([ZERO], rounding_seed)], GAUSSIAN, many=False, factor=factor)


def fill(bits: BitLayout, seeds: Sequence[int], param_id: int, size: int, device: torch.device) -> Tensor:
    """The first ``size`` values of many directions: fp32 [num_seeds, size].

    Args:
        bits: bit layout of the directions.
        seeds: the directions'.
        param_id: see `seeds.param_id`.
        size: number of elements.
        device: a GPU.
    """
    values = torch.empty(len(seeds), size, device=device)
    _launch_fill([_fill_row(values, bits, param_id, 0, 1.0)], _seeds(tuple(seeds), *_place(values)), bits)
    return values


def factors(
    rank: int, seeds: Sequence[int], param_id: int, shape: torch.Size, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The thin factors of a matrix's directions on a GPU; see `mezo_dist.directions.law.Law.factors`.

    Args:
        rank: number of columns of the factors.
        seeds: the directions'.
        param_id: see `seeds.param_id`.
        shape: the matrix's.
        device: a GPU.
    """
    whole = Part(torch.empty(0), (), param_id, shape)
    table = _seeds(tuple(seeds), *_place(torch.empty(0, device=device)))
    ((u, v),) = _factors([whole], rank, table, device)
    return u, v


def add_lowrank(
    parts: Sequence[Part], combinations: Sequence[Combination], *, rank: int, rounding_seed: int | None
) -> None:
    """`add_parts` of low-rank directions of matrices.

    Args:
        parts: matrices, shards or rows of them; each has one output per combination.
        combinations: the same for all of them.
        rank: number of columns of the factors.
        rounding_seed: for bf16 outputs that are to be rounded stochastically.
    """
    for some, chosen in _launches(parts, combinations):
        _launch_lowrank(some, [(chosen, rounding_seed)], rank, many=False)


def advance_lowrank(parts: Sequence[Part], updates: Sequence[Update], *, rank: int) -> None:
    """`advance_parts` of low-rank directions of matrices.

    Args:
        parts: matrices, or shards of them.
        updates: (combination, seed of stochastic rounding or None), one after another.
        rank: number of columns of the factors.
    """
    for some, _ in _launches(parts, [ZERO]):
        for group in _few_terms([([c], seed) for c, seed in updates if c]):
            _launch_lowrank(some, group, rank, many=True)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: object, **constants: object) -> None:
    """Every launch of a kernel goes through here."""
    kernel[grid](*arguments, **constants, **OPTIONS)


def _place(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, devices.stream_of(tensor.device)


def _check_known(bits: BitLayout) -> None:
    if bits.values not in (GAUSSIAN.values, RADEMACHER.values):
        raise ValueError(f"the GPU kernel does not know the bit layout {bits.name!r}")


def _few_terms(updates: list[tuple[list[Combination], int | None]]) -> Iterator[list[tuple[list[Combination], Any]]]:
    """``updates`` cut into groups of `MOST_TERMS` terms or one update."""
    group: list[tuple[list[Combination], Any]] = []
    for update in updates:
        if group and sum(len(c) for (c,), _ in group) + len(update[0][0]) > MOST_TERMS:
            yield group
            group = []
        group.append(update)
    if group:
        yield group


def _launches(
    parts: Sequence[Part], combinations: Sequence[Combination]
) -> Iterator[tuple[list[Part], list[Combination]]]:
    """What one launch each does: some tensors of the same dtypes, and some of their outputs. An output that is the
    weight itself comes last, for the others read what it was.

    Args:
        parts: the tensors.
        combinations: one per output.
    """
    parts = [part for part in parts if part.weight.numel()]
    order = lambda part: (part.weight.dtype, tuple(output.dtype for output in part.outputs))  # noqa: E731
    by_dtypes: dict[object, list[Part]] = {}
    for part in parts:
        by_dtypes.setdefault(order(part), []).append(part)
    for same in by_dtypes.values():
        for first in range(0, len(same), MOST_PARTS):
            some = same[first : first + MOST_PARTS]
            in_place = {
                v
                for part in some
                for v, output in enumerate(part.outputs)
                if devices.address(output) == devices.address(part.weight)
            }
            places = sorted(range(len(combinations)), key=lambda v: (v in in_place, v))
            for start in range(0, len(places), MOST_OUTPUTS):
                chosen = places[start : start + MOST_OUTPUTS]
                yield [part.with_outputs(chosen) for part in some], [combinations[v] for v in chosen]


def _launch_add(
    parts: Sequence[Part],
    updates: Sequence[tuple[Sequence[Combination], int | None]],
    bits: BitLayout,
    *,
    many: bool,
    factor: float | None = None,
) -> None:
    """Launch `gpu_kernels.add_kernel`.

    Args:
        parts: tensors of the same dtypes.
        updates: (one combination per output, seed of stochastic rounding or None); more than one only with ``many``.
        bits: bit layout of the directions.
        many: see the kernel.
        factor: what weights are multiplied by first, if not None.
    """
    weight, outputs = parts[0].weight, parts[0].outputs
    longest = max(part.weight.numel() // part.num_rows for part in parts)
    # A lane needs a whole block for 8 gaussian elements, but 128 lanes need only 8 blocks for 1024 bits.
    wide = bits.values is RADEMACHER.values and longest >= 2 * CHUNK and len(outputs) <= 2
    chunks = 2 if wide else 1
    rows, first = [], 0
    for part in parts:
        rows.append((first, *_flat_row(part, chunks), *map(devices.address, part.outputs)))
        first += part.num_rows * _tiles(part.weight.numel() // part.num_rows, chunks)
    with torch.cuda.device_of(weight):  # Triton launches on the current device; this does nothing to CPU tensors
        place = _place(weight)
        seeds, coefficients, rounding = _terms(_key(updates), *place)
        launch(
            gpu_kernels.add_kernel,
            (first,),
            _table(tuple(rows), *place),
            _half_table(*place),
            seeds,
            coefficients,
            rounding,
            len(seeds),
            bits.stream,
            updates[0][1] or 0,
            1.0 if factor is None else factor,
            GROUP=_power_of_two(len(rows)),
            SOURCE=CODES[weight.dtype],
            TARGETS=_targets(outputs),
            NUM_OUTPUTS=len(outputs),
            GAUSSIAN=bits.values is GAUSSIAN.values,
            STOCHASTIC=updates[0][1] is not None,
            MANY=many,
            SCALED=factor is not None,
            CHUNKS=chunks,
        )


def _launch_lowrank(
    parts: Sequence[Part], updates: Sequence[tuple[Sequence[Combination], int | None]], rank: int, *, many: bool
) -> None:
    """Make the factors, and launch `gpu_kernels.lowrank_kernel`.

    Args:
        parts: matrices of the same dtypes.
        updates: see `_launch_add`.
        rank: number of columns of the factors.
        many: see the kernel.
    """
    weight, outputs = parts[0].weight, parts[0].outputs
    with torch.cuda.device_of(weight):
        place = _place(weight)
        seeds, coefficients, rounding = _terms(_key(updates), *place)
        thin = _factors(parts, rank, seeds, weight.device)
        rows, first = [], 0
        for part, (u, v) in zip(parts, thin, strict=True):
            num_rows, columns = u.shape[1], v.shape[1]
            first_row = part.offset // columns if part.starts is None else 0
            tiles = -(-columns // TILE_COLUMNS)
            rows.append((
                first, devices.address(part.weight), 0, part.offset, part.weight.numel(), tiles, part.param_id,
                devices.address(u), devices.address(v), first_row, num_rows, columns,
                *map(devices.address, part.outputs),
            ))  # fmt: skip
            first += -(-num_rows // TILE_ROWS) * tiles
        launch(
            gpu_kernels.lowrank_kernel,
            (first,),
            _table(tuple(rows), *place),
            coefficients,
            rounding,
            len(seeds),
            updates[0][1] or 0,
            GROUP=_power_of_two(len(rows)),
            SOURCE=CODES[weight.dtype],
            TARGETS=_targets(outputs),
            NUM_OUTPUTS=len(outputs),
            RANK=rank,
            STOCHASTIC=updates[0][1] is not None,
            MANY=many,
            TILE_ROWS=TILE_ROWS,
            TILE_COLUMNS=TILE_COLUMNS,
        )


def _factors(parts: Sequence[Part], rank: int, seeds: Tensor, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """U and V of each matrix, of the rows that it has, by one launch.

    Args:
        parts: whole matrices (their weights are not looked at if empty), shards or rows.
        rank: number of columns of the factors.
        seeds: int64 [n] on the GPU.
        device: the GPU.

    Returns:
        fp32 [n, rows, rank] and [n, columns, rank]; V is divided by the square root of the rank.
    """
    pairs, rows = [], []
    for part in parts:
        columns = math.prod(part.shape[1:])
        first, count = 0, part.shape[0]
        if part.starts is not None:
            count = len(part.starts)
        elif part.weight.numel():
            first = part.offset // columns
            count = -(-(part.offset + part.weight.numel()) // columns) - first
        u = torch.empty(len(seeds), count, rank, device=device)
        v = torch.empty(len(seeds), columns, rank, device=device)
        starts = None if part.starts is None else part.starts // columns * rank
        rows.append(_fill_row(u, FACTOR_U, part.param_id, first * rank, 1.0, starts))
        rows.append(_fill_row(v, FACTOR_V, part.param_id, 0, math.sqrt(rank)))
        pairs.append((u, v))
    if seeds.numel():
        for k in range(0, len(rows), MOST_PARTS):
            _launch_fill(rows[k : k + MOST_PARTS], seeds, GAUSSIAN)
    return pairs


def _fill_row(
    values: Tensor, bits: BitLayout, param_id: int, offset: int, divisor: float, starts: Tensor | None = None
) -> tuple[int, tuple[int, ...], Tensor | None]:
    """Tiles and row of the table of `gpu_kernels.fill_kernel` for one tensor; ``starts`` comes along, to live as long.

    Args:
        values: fp32 [num_seeds, ...], to be filled.
        bits: bit layout of the directions.
        param_id: see `seeds.param_id`.
        offset: index of the first value in the flattened parameter.
        divisor: what values are divided by.
        starts: int64 on the GPU: index of the first value of each row; None: there is one row.
    """
    num_rows = 1 if starts is None else len(starts)
    length = math.prod(values.shape[1:]) // num_rows
    tiles = _tiles(length, 1)
    where = 0 if starts is None else devices.address(starts)
    code = int(torch.tensor(divisor, dtype=torch.float32).view(torch.int32))
    return (
        num_rows * tiles,
        (devices.address(values), where, offset, length, tiles, param_id, bits.stream, code, num_rows),
        starts,
    )


def _launch_fill(rows: Sequence[tuple[int, tuple[int, ...], Tensor | None]], seeds: Tensor, bits: BitLayout) -> None:
    """Launch `gpu_kernels.fill_kernel`.

    Args:
        rows: see `_fill_row`.
        seeds: int64 [n] on the GPU.
        bits: bit layout of the directions; streams are the rows' own.
    """
    firsts = [0, *itertools.accumulate(tiles for tiles, _, _ in rows)]
    with torch.cuda.device_of(seeds):
        place = _place(seeds)
        table = _table(tuple((first, *row) for first, (_, row, _) in zip(firsts, rows, strict=False)), *place)
        launch(
            gpu_kernels.fill_kernel,
            (firsts[-1], len(seeds)),
            table,
            _half_table(*place),
            seeds,
            GROUP=_power_of_two(len(rows)),
            GAUSSIAN=bits.values is GAUSSIAN.values,
            CHUNKS=1,
        )


def _flat_row(part: Part, chunks: int) -> tuple[int, ...]:
    length = part.weight.numel() // part.num_rows
    starts = 0 if part.starts is None else devices.address(part.starts)
    return devices.address(part.weight), starts, part.offset, length, _tiles(length, chunks), part.param_id


def _tiles(length: int, chunks: int) -> int:
    """Tiles that a row can touch, at worst."""
    return -(-(length + CHUNK - 1) // (chunks * CHUNK))


def _targets(outputs: Sequence[Tensor]) -> int:
    return sum(CODES[output.dtype] << (2 * v) for v, output in enumerate(outputs))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _key(
    updates: Sequence[tuple[Sequence[Combination], int | None]],
) -> tuple[tuple[tuple[Combination, ...], Any], ...]:
    return tuple((tuple(combinations), seed) for combinations, seed in updates)


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    return devices.upload([tensor], device)[0]


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


@functools.lru_cache(maxsize=64)
def _half_table(device: torch.device, stream: int) -> Tensor:
    """fp32 [32768]: the upper half of the gaussian table; the lower is its mirror image, negated.

    128 KiB instead of 256 can stay in the L1 cache of a big GPU, where the look-ups, all over the table, are cheapest.
    """
    return _upload(torch.from_numpy(gaussian_table()[TABLE_SIZE // 2 :].copy()), device)


@functools.lru_cache(maxsize=16384)
def _table(rows: tuple[tuple[int, ...], ...], device: torch.device, stream: int) -> Tensor:
    """int64 [power of two, columns] on the GPU. Cached: a run works on the same tensors in every step.

    Args:
        rows: see the columns in `gpu_kernels`.
        device: where the table is needed.
        stream: see `devices.stream_of`.
    """
    none = (AFTER_ALL, *[0] * (len(rows[0]) - 1))
    return _upload(torch.tensor([*rows, *[none] * (_power_of_two(len(rows)) - len(rows))], dtype=torch.int64), device)


@functools.lru_cache(maxsize=64)
def _seeds(seeds: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """int64 [n] on the GPU: the bits of uint64.

    Args:
        seeds: in any order.
        device: where they are needed.
        stream: see `devices.stream_of`.
    """
    return _upload(torch.tensor([*map(_signed, seeds)], dtype=torch.int64), device)


@functools.lru_cache(maxsize=64)
def _terms(
    updates: tuple[tuple[tuple[Combination, ...], int | None], ...], device: torch.device, stream: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The tables of terms, brought to the GPU as one. Cached: a step adds the same few combinations to all tensors.

    The seeds of an update are in ascending order, which is the order of every combination: one pass over the seeds
    serves all outputs. A coefficient is zero where an output has no such term.

    Args:
        updates: (one combination per output, seed of stochastic rounding or None) for each update.
        device: where the tables are needed.
        stream: see `devices.stream_of`.

    Returns:
        Seeds, int64 [k] (bits of uint64); coefficients, fp32 [k, outputs]; and int64 [k, 2]: whether an update ends
        with the term, and the seed of its rounding.
    """
    seeds: list[int] = []
    coefficients: list[list[float]] = []
    rounding: list[list[int]] = []
    for combinations, rounding_seed in updates:
        by_seed = [dict(combination.terms) for combination in combinations]
        mine = sorted({seed for terms in by_seed for seed in terms})
        seeds.extend(map(_signed, mine))
        coefficients.extend([terms.get(seed, 0.0) for terms in by_seed] for seed in mine)
        rounding.extend([int(seed == mine[-1]), _signed(rounding_seed or 0)] for seed in mine)
    k, width = len(seeds), len(updates[0][0])
    words = [torch.tensor(seeds, dtype=torch.int64), torch.tensor(rounding, dtype=torch.int64).view(-1)]
    numbers = torch.tensor(coefficients, dtype=torch.float32).view(-1)
    table = _upload(torch.cat([*(t.view(torch.uint8) for t in words), numbers.view(torch.uint8)]), device)
    first, second, third = table.split([8 * k, 16 * k, 4 * k * width])
    return first.view(torch.int64), third.view(torch.float32).view(k, width), second.view(torch.int64).view(k, 2)
