"""`add`, `advance`, `scale` and low-rank factors for tensors on a GPU: Triton kernels, the same bits as `reference`.

A program (`gpu_kernels`) works on one tile: it reads the weights once, then generates each direction once and adds it
to every output that has such a term, casts and stores. The bit layouts were chosen for this: neighbouring lanes hold
neighbouring elements, so that every load and store of weights and outputs is coalesced. One launch serves many tensors
(the parameters of a module, or those of a block that an update changes): a table on the GPU says where each of them
lies. Tables are remembered, for a run works on the same tensors in every step, so that a step sends its seeds and
coefficients to the GPU, and nothing else.

Its bits were equal to the reference's on an H200; they are checked in Triton's interpreter, and its code as compiled
for sm_80, sm_90 and sm_100. What limits it are instructions: some 40 for each element of both signs of a gaussian
direction, at two thirds of the speed of a copy (``examples/gpu/README.md``). So chunks that are whole are worked on
without masks and with 32-bit indices.

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
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mezo_dist.directions import devices
from mezo_dist.directions.bits import (
    GAUSSIAN,
    RADEMACHER,
    BitLayout,
)
from mezo_dist.directions.combination import ZERO, Combination
from mezo_dist.directions.kernels import gpu_inputs, gpu_kernels
from mezo_dist.directions.parts import Part, kept_as, remembered

Update = tuple[Combination, "int | None"]
"""A combination, and the seed of its stochastic rounding or None."""
OPTIONS = {"enable_fp_fusion": False, "num_warps": 4, "num_stages": 1}
"""num_stages: nothing can be pipelined; a program is short, and other programs hide its latency."""
LAWS = {"gaussian": 0, "rademacher": 1, "lowrank": 2}
MOST_PARTS = 32
"""Tensors of one launch."""
MOST_OUTPUTS = 8
"""Outputs of each tensor in one launch: their sums are in registers."""
MOST_TERMS = 64
"""Low-rank directions of one launch: their factors are in memory."""
TOGETHER = {0: 1, 1: 2, 2: 1}
"""Chunks that are worked on together, by law, if no more than two outputs want registers for their sums. Few calls of
the generator serve many rademacher elements."""


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
    if len(offsets) == 1:
        part = Part(weight, tuple(outputs), param_id, weight.shape, offsets[0])
    else:  # pieces that start anywhere are rows of one element
        starts = gpu_inputs.upload(torch.tensor(offsets, dtype=torch.int64), weight.device)
        part = Part(weight, tuple(outputs), param_id, torch.Size((1,)), rows=starts)
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
    law = law_of(bits)
    for some, chosen in _launches(parts, combinations):
        _launch_add(some, [(chosen, rounding_seed)], law, stream=bits.stream)


def advance_parts(parts: Sequence[Part], updates: Sequence[Update], *, bits: BitLayout) -> None:
    """`advance` for many tensors, each of which is its own output: one pass over them.

    Args:
        parts: the tensors.
        updates: (combination, seed of stochastic rounding or None), one after another.
        bits: bit layout of the directions.
    """
    law = law_of(bits)
    todo = [([combination], seed) for combination, seed in updates if combination]
    for some, _ in _launches(parts, [ZERO]) if todo else ():
        _launch_add(some, todo, law, stream=bits.stream, many=True)


def scale_parts(parts: Sequence[Part], factor: float, *, rounding_seed: int | None) -> None:
    """``weight <- cast(factor * weight)`` for many tensors, each of which is its own output.

    Args:
        parts: the tensors.
        factor: rounded to fp32.
        rounding_seed: for bf16 weights that are to be rounded stochastically.
    """
    for some, _ in _launches(parts, [ZERO]):
        _launch_add(some, [([ZERO], rounding_seed)], LAWS["gaussian"], factor=factor)


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
    filled = gpu_inputs.Filled(0, 1, size, bits, param_id)
    _launch_fill(values, [filled], gpu_inputs.seeds_table(tuple(seeds), *gpu_inputs.place(values)), bits)
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
    ((u, v),) = directions(rank, seeds, [(param_id, shape)], device)
    return u, v


def directions(
    rank: int,
    seeds: Sequence[int],
    weights: Sequence[tuple[int, torch.Size]],
    device: torch.device,
) -> list[tuple[Tensor, ...]]:
    """`factors` of matrices and `fill` of vectors, of all ``weights`` by few launches; see
    `mezo_dist.directions.law.Law.directions`.

    Args:
        rank: number of columns of the factors.
        seeds: the directions'.
        weights: `seeds.param_id` and shape of each.
        device: a GPU.
    """
    filled, size = gpu_inputs.layout_of_directions(weights, rank, len(seeds))
    values = torch.empty(size, device=device)
    seeds_there = gpu_inputs.seeds_table(tuple(seeds), *gpu_inputs.place(values))
    _launch_fill(values, [f for some in filled for f in some], seeds_there, GAUSSIAN)
    shapes = [(len(seeds), -1, rank) if len(shape) >= 2 else (len(seeds), -1) for _, shape in weights]
    return [
        tuple(values[f.place : f.place + f.size * len(seeds)].view(of_each) for f in some)
        for some, of_each in zip(filled, shapes, strict=True)
    ]


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
        _launch_add(some, [(chosen, rounding_seed)], LAWS["lowrank"], rank=rank)


def advance_lowrank(parts: Sequence[Part], updates: Sequence[Update], *, rank: int) -> None:
    """`advance_parts` of low-rank directions of matrices.

    Args:
        parts: matrices, or shards of them.
        updates: (combination, seed of stochastic rounding or None), one after another.
        rank: number of columns of the factors.
    """
    for some, _ in _launches(parts, [ZERO]):
        for group in _few_terms([([c], seed) for c, seed in updates if c]):
            _launch_add(some, group, LAWS["lowrank"], rank=rank, many=True)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: object, **constants: object) -> None:
    """Every launch of a kernel goes through here; ``constants`` go before `OPTIONS`."""
    kernel[grid](*arguments, **{**OPTIONS, **constants})


def law_of(bits: BitLayout) -> int:
    """Raises ValueError for a bit layout that kernels do not know."""
    for law in (GAUSSIAN, RADEMACHER):
        if bits.values is law.values:
            return LAWS[law.name]
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
) -> Iterator[tuple[Sequence[Part], list[Combination]]]:
    """What one launch each does: some tensors, and some of their outputs with the combinations that go there.

    Args:
        parts: the tensors.
        combinations: one per output.
    """
    number = len(combinations)
    for some, chosen in remembered(parts, ("launches", number), functools.partial(_dealt, parts, number)):
        yield some, [combinations[v] for v in chosen]


def _dealt(parts: Sequence[Part], num_outputs: int) -> list[tuple[Sequence[Part], list[int]]]:
    """What one launch each works on: some tensors of the same dtypes and rows, and the numbers of their outputs in
    ``parts``. An output that is the weight itself comes last, for the others read what it was.

    Args:
        parts: the tensors.
        num_outputs: of each of them.
    """
    alike: dict[object, list[Part]] = {}
    for part in parts:
        if part.weight.numel():
            alike.setdefault((part.weight.dtype, *(out.dtype for out in part.outputs), id(part.rows)), []).append(part)
    dealt: list[tuple[Sequence[Part], list[int]]] = []
    for same in alike.values():
        for first in range(0, len(same), MOST_PARTS):
            some = same[first : first + MOST_PARTS]
            in_place = {
                v
                for part in some
                for v, output in enumerate(part.outputs)
                if devices.address(output) == devices.address(part.weight)
            }
            places = sorted(range(num_outputs), key=lambda v: (v in in_place, v))
            for start in range(0, len(places), MOST_OUTPUTS):
                chosen = places[start : start + MOST_OUTPUTS]
                dealt.append((kept_as(parts, [part.with_outputs(chosen) for part in some]), chosen))
    return dealt


def _launch_add(
    parts: Sequence[Part],
    updates: Sequence[tuple[Sequence[Combination], int | None]],
    law: int,
    *,
    stream: int = 0,
    rank: int = 0,
    many: bool = False,
    factor: float | None = None,
) -> None:
    """Launch `gpu_kernels.add_kernel`, of low-rank directions after their factors were made.

    Args:
        parts: tensors of the same dtypes.
        updates: (one combination per output, seed of stochastic rounding or None); more than one only with ``many``.
        law: see `gpu_kernels`.
        stream: of the generator; not for low-rank directions.
        rank: of low-rank directions.
        many: see the kernel.
        factor: what weights are multiplied by first, if not None.
    """
    with torch.cuda.device_of(parts[0].weight):  # Triton launches on the current device; CPU tensors have none
        where = gpu_inputs.place(parts[0].weight)
        seeds, coefficients, rounding = gpu_inputs.terms_table(gpu_inputs.key(updates), *where)
        num_thin = len(seeds) if rank else 0
        group = remembered(
            parts, ("add", rank, num_thin, where), functools.partial(gpu_inputs.group_of, parts, rank, num_thin, where)
        )
        thin = 0
        if num_thin:
            workspace = gpu_inputs.workspace(group.thin_size, *where)
            _launch_fill(workspace, group.thin, seeds, GAUSSIAN, parts[0].rows)
            thin = devices.address(workspace)
        launch(
            gpu_kernels.add_kernel,
            (group.num_tiles,),
            group.table,
            group.weight,
            group.output,
            group.rows,
            thin,
            gpu_inputs.half_table(*where),
            seeds,
            coefficients,
            rounding,
            len(seeds),
            stream,
            updates[0][1] or 0,
            1.0 if factor is None else factor,
            **group.constants,
            LAW=law,
            RANK=rank,
            STOCHASTIC=updates[0][1] is not None,
            MANY=many,
            SCALED=factor is not None,
            DENSE=all(len(combination) == len(seeds) for combination in updates[0][0]),
            CHUNKS=TOGETHER[law] if len(parts[0].outputs) <= 2 else 1,
            TILE_CHUNKS=gpu_inputs.TILE_CHUNKS,
        )


def _launch_fill(
    values: Tensor, filled: Sequence[gpu_inputs.Filled], seeds: Tensor, bits: BitLayout, rows: Tensor | None = None
) -> None:
    """Launch `gpu_kernels.fill_kernel`.

    Args:
        values: fp32, that all of ``filled`` lie in.
        filled: where in it, and what.
        seeds: int64 [n] on the GPU.
        bits: whose values; streams are those of ``filled``.
        rows: int64 on the GPU, numbers of the rows that there are.
    """
    with torch.cuda.device_of(seeds):
        where = gpu_inputs.place(seeds)
        for start in range(0, len(filled), MOST_PARTS):
            table, first = [], 0
            for f in filled[start : start + MOST_PARTS]:
                tiles, divisor = gpu_inputs.tiles_of(f.length, 1), struct.unpack("<i", struct.pack("<f", f.divisor))[0]
                table.append((
                    first, 4 * f.place, f.stride, f.offset, f.length, tiles,
                    f.param_id, f.bits.stream, divisor, f.pieces,
                ))  # fmt: skip
                first += f.pieces * tiles
            launch(
                gpu_kernels.fill_kernel,
                (first, len(seeds)),
                gpu_inputs.table_of(tuple(table), *where),
                devices.address(values),
                0 if rows is None else devices.address(rows),
                gpu_inputs.half_table(*where),
                seeds,
                GROUP=gpu_inputs.power_of_two(len(table)),
                LAW=law_of(bits),
                HAS_ROWS=rows is not None,
            )
