"""What `gpu` tells kernels: tables of tensors, of seeds and of coefficients, on the GPU; and memory for factors.

They are remembered, as a run works on the same tensors in every step and adds the same few combinations to all of them.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mezo_dist.directions import devices
from mezo_dist.directions.bits import CHUNK, FACTOR_U, FACTOR_V, GAUSSIAN, TABLE_SIZE, BitLayout, gaussian_table
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.parts import Part

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""dtypes as kernels are told of them."""
TILE_CHUNKS = 4
"""Chunks of a tile."""
WHOLE_LINES = 64
"""fp32 numbers: tensors in one piece of memory start at multiples, as matrix products like best."""
AFTER_ALL = 2**62
"""First tile of table rows that are no tensors."""

workspaces: dict[tuple[torch.device, int], Tensor] = {}


def place(tensor: Tensor) -> tuple[torch.device, int]:
    """A device and its current stream: what is brought there is remembered for both."""
    return tensor.device, devices.stream_of(tensor.device)


@dataclass(frozen=True)
class Filled:
    """One tensor of values of directions, [directions, pieces * length], in a larger one."""

    place: int
    """Elements before it."""
    pieces: int
    length: int
    bits: BitLayout
    param_id: int
    offset: int = 0
    """Index of the first value in the flattened parameter, if it is one piece."""
    stride: int = 0
    """Else what numbers of rows are multiplied by for it."""
    divisor: float = 1.0
    """Values are divided by it."""

    @property
    def size(self) -> int:
        """Elements per direction."""
        return self.pieces * self.length


@dataclass(frozen=True)
class Group:
    """The tensors of one launch, as `gpu_kernels.add_kernel` is told of them."""

    table: Tensor
    """See `table_of`."""
    num_tiles: int
    weight: int
    """Address that those of weights count from."""
    output: int
    """Address that those of outputs count from."""
    rows: int
    """Address of the numbers of rows; 0: none."""
    thin: list[Filled]
    """Factors of low-rank directions, of `layout_of_factors`."""
    thin_size: int
    """Elements of all of them."""
    constants: dict[str, int]
    """What the kernel is compiled for."""


def group_of(parts: Sequence[Part], rank: int, num_thin: int, where: tuple[torch.device, int]) -> Group:
    """Some tensors, for a launch.

    Args:
        parts: the tensors, of the same dtypes.
        rank: of low-rank directions; 0: others.
        num_thin: number of low-rank directions.
        where: see `place`.
    """
    weight, outputs, numbers = parts[0].weight, parts[0].outputs, parts[0].rows
    thin, thin_size = layout_of_factors(parts, rank, num_thin)
    weights, targets = _relative([part.weight for part in parts]), _relative([o for p in parts for o in p.outputs])
    rows, first = [], 0
    for part, place, u, v in zip(parts, weights, thin[::2], thin[1::2], strict=True):
        length = part.weight.numel() // part.num_pieces
        tiles, stride = tiles_of(length, TILE_CHUNKS), 0 if numbers is None else part.columns
        factors = [0] * 5
        if rank:
            first_row = part.offset // part.columns if numbers is None else 0
            factors = [4 * u.place, 4 * v.place, first_row, u.size // rank, part.columns]
        rows.append((
            first, place, stride, part.offset, length, tiles, part.param_id,
            *factors, *itertools.islice(targets, len(outputs)),
        ))  # fmt: skip
        first += part.num_pieces * tiles
    constants = {
        "GROUP": power_of_two(len(parts)),
        "SOURCE": CODES[weight.dtype],
        "TARGETS": sum(CODES[output.dtype] << (2 * v) for v, output in enumerate(outputs)),
        "NUM_OUTPUTS": len(outputs),
        "HAS_ROWS": numbers is not None,
    }
    rows_at = 0 if numbers is None else devices.address(numbers)
    at, out = devices.address(weight), devices.address(outputs[0])
    return Group(table_of(tuple(rows), *where), first, at, out, rows_at, thin, thin_size, constants)


def layout_of_factors(parts: Sequence[Part], rank: int, num_seeds: int) -> tuple[list[Filled], int]:
    """Where U and V of each matrix go, of the rows that it has; and the number of elements of all.

    Args:
        parts: whole matrices (their weights are not looked at if empty), shards or rows.
        rank: number of columns of the factors.
        num_seeds: number of directions.
    """
    filled, place = [], 0
    for part in parts:
        columns = part.columns
        u = Filled(place, 1, part.shape[0] * rank, FACTOR_U, part.param_id)
        if part.rows is not None:
            u = Filled(place, len(part.rows), rank, FACTOR_U, part.param_id, stride=rank)
        elif part.weight.numel():
            first = part.offset // columns
            count = -(-(part.offset + part.weight.numel()) // columns) - first
            u = Filled(place, 1, count * rank, FACTOR_U, part.param_id, first * rank)
        place += u.size * num_seeds
        v = Filled(place, 1, columns * rank, FACTOR_V, part.param_id, divisor=math.sqrt(rank))
        place += v.size * num_seeds
        filled += [u, v]
    return filled, place


def layout_of_directions(
    weights: Sequence[tuple[int, torch.Size]], rank: int, num_seeds: int
) -> tuple[list[list[Filled]], int]:
    """Where U and V of each matrix go, and the entries of each vector, whole; and the number of elements of all.

    Args:
        weights: `seeds.param_id` and shape of each.
        rank: number of columns of the factors.
        num_seeds: number of directions.
    """
    place = 0
    filled: list[list[Filled]] = []
    for param_id, shape in weights:
        kinds = [(shape.numel(), GAUSSIAN, 1.0)]
        if len(shape) >= 2:
            kinds = [(shape[0] * rank, FACTOR_U, 1.0), (math.prod(shape[1:]) * rank, FACTOR_V, math.sqrt(rank))]
        filled.append([])
        for size, bits, divisor in kinds:
            filled[-1].append(Filled(place, 1, size, bits, param_id, divisor=divisor))
            place += -(-size * num_seeds // WHOLE_LINES) * WHOLE_LINES
    return filled, place


def workspace(size: int, device: torch.device, stream: int) -> Tensor:
    """Memory for the factors of one launch, which the next one overwrites; it grows, and is kept.

    Args:
        size: fp32 numbers.
        device: where.
        stream: see `devices.stream_of`.
    """
    kept = workspaces.get((device, stream))
    if kept is None or kept.numel() < size:
        kept = workspaces[device, stream] = torch.empty(max(size, 1), device=device)
    return kept


def _relative(tensors: Sequence[Tensor]) -> Iterator[int]:
    """Addresses of tensors, counted from that of the first one."""
    first = devices.address(tensors[0])
    return (devices.address(tensor) - first for tensor in tensors)


def tiles_of(length: int, chunks: int) -> int:
    """Tiles that a row can touch, at worst."""
    return -(-(length + CHUNK - 1) // (chunks * CHUNK))


def power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def key(
    updates: Sequence[tuple[Sequence[Combination], int | None]],
) -> tuple[tuple[tuple[Combination, ...], Any], ...]:
    return tuple((tuple(combinations), seed) for combinations, seed in updates)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    return devices.upload([tensor], device)[0]


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


@functools.lru_cache(maxsize=64)
def half_table(device: torch.device, stream: int) -> Tensor:
    """fp32 [32768]: the upper half of the gaussian table; the lower is its mirror image, negated.

    128 KiB instead of 256 can stay in the L1 cache of a big GPU, where the look-ups, all over the table, are cheapest.
    """
    return upload(torch.from_numpy(gaussian_table()[TABLE_SIZE // 2 :].copy()), device)


@functools.lru_cache(maxsize=16384)
def table_of(rows: tuple[tuple[int, ...], ...], device: torch.device, stream: int) -> Tensor:
    """int64 [power of two, columns] on the GPU. Cached: a run works on the same tensors in every step.

    Args:
        rows: see the columns in `gpu_kernels`.
        device: where the table is needed.
        stream: see `devices.stream_of`.
    """
    none = (AFTER_ALL, *[0] * (len(rows[0]) - 1))
    return upload(torch.tensor([*rows, *[none] * (power_of_two(len(rows)) - len(rows))], dtype=torch.int64), device)


@functools.lru_cache(maxsize=64)
def seeds_table(seeds: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """int64 [n] on the GPU: the bits of uint64.

    Args:
        seeds: in any order.
        device: where they are needed.
        stream: see `devices.stream_of`.
    """
    return upload(torch.tensor([*map(_signed, seeds)], dtype=torch.int64), device)


@functools.lru_cache(maxsize=64)
def terms_table(
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
    table = upload(torch.cat([*(t.view(torch.uint8) for t in words), numbers.view(torch.uint8)]), device)
    first, second, third = table.split([8 * k, 16 * k, 4 * k * width])
    return first.view(torch.int64), third.view(torch.float32).view(k, width), second.view(torch.int64).view(k, 2)
