"""Low-rank directions: ``z = U V^T / sqrt(rank)`` of a matrix, generated and added block of rows by block of rows.

U has one row per row of the matrix, V one per column, all gaussian. Any range of rows can be generated alone.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mezo_dist.directions.add import add
from mezo_dist.directions.bits import FACTOR_U, FACTOR_V, GAUSSIAN, BitLayout
from mezo_dist.directions.combination import ZERO, Combination
from mezo_dist.directions.kernels import reference
from mezo_dist.directions.parts import Part

BLOCK = 64
"""Rows of a low-rank direction that one matrix product computes."""
BLOCKS_AT_ONCE = 64
"""Blocks of rows whose rows of U are generated together."""
SEEDS_AT_ONCE = 32
"""Directions that one call of `add` generates."""


@dataclass(frozen=True)
class Piece:
    """The elements that one product is added to: those from ``skip`` on of some rows of the matrix."""

    rows: Sequence[int]
    """Numbers of the rows, at most `BLOCK`."""
    skip: int
    """Elements of these rows before the piece."""
    first: int
    """Index of the piece's first element in the tensor that is added to."""
    length: int
    """Number of elements."""


def pieces_of_shard(offset: int, length: int, shape: torch.Size) -> Iterator[Piece]:
    """Blocks of rows, cut at multiples of `BLOCK` whatever the shard.

    Args:
        offset: index of the shard's first element in the flattened matrix.
        length: elements of the shard.
        shape: the whole matrix's.
    """
    columns = math.prod(shape[1:])
    step = BLOCK * columns
    for start in range(offset // step * step if step else 0, offset + length, max(step, 1)):
        first, stop = max(start, offset), min(start + step, offset + length)
        row = start // columns
        yield Piece(range(row, min(row + BLOCK, shape[0])), first - start, first - offset, stop - first)


def pieces_of_rows(rows: Sequence[int], columns: int) -> Iterator[Piece]:
    """Blocks of some rows of a matrix, in their order."""
    for k in range(0, len(rows), BLOCK):
        some = rows[k : k + BLOCK]
        yield Piece(some, 0, k * columns, len(some) * columns)


def factors(rank: int, seeds: Sequence[int], param_id: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The thin factors of a matrix's directions; see `mezo_dist.directions.law.Law.factors`.

    Args:
        rank: number of columns of the factors.
        seeds: the directions'.
        param_id: see `seeds.param_id`.
        shape: the matrix's.
    """
    rows, columns = shape[0], math.prod(shape[1:])
    u = _factor(FACTOR_U, rank, seeds, param_id, 0, rows)
    v = _factor(FACTOR_V, rank, seeds, param_id, 0, columns)
    return u, v / math.sqrt(rank)


def _factor(bits: BitLayout, rank: int, seeds: Sequence[int], param_id: int, first_row: int, num_rows: int) -> Tensor:
    """Rows ``first_row ..`` of one factor of many directions, unscaled: fp32 [num_seeds, num_rows, rank].

    Args:
        bits: `FACTOR_U` or `FACTOR_V`.
        rank: number of columns of the factor.
        seeds: the directions'.
        param_id: see `seeds.param_id`.
        first_row: number of the first row.
        num_rows: number of rows.
    """
    flat = fill(bits, seeds, param_id, first_row * rank, num_rows * rank)
    return flat.view(len(seeds), num_rows, rank)


def add_lowrank(part: Part, combinations: Sequence[Combination], rank: int, rounding_seed: int | None) -> None:
    """``U diag(c) V^T`` over all directions of a combination, `BLOCK` rows at a time: one matrix product each.

    A product of another shape may be summed in another order. So all have the same shape, whatever the shard, and
    a row of a matrix gets the same bits wherever it lies. On devices without kernels of their own, as GPUs compute it.

    Args:
        part: a matrix, a shard or some of its rows, with one output per combination.
        combinations: one per output.
        rank: number of columns of the factors.
        rounding_seed: for bf16 outputs that are to be rounded stochastically.
    """
    shape, param_id = part.shape, part.param_id
    seeds = sorted({seed for combination in combinations for seed, _ in combination.terms})
    if part.weight.device.type != "cpu":
        u, v = (factor.to(part.weight.device) for factor in factors(rank, seeds, param_id, shape))
        by_seed = {seed: (u[k], v[k]) for k, seed in enumerate(seeds)}
        reference.add_lowrank(part, combinations, by_seed, rounding_seed)
        return
    columns = part.columns
    source, targets = part.weight.view(-1), [output.view(-1) for output in part.outputs]
    right = _factor(FACTOR_V, rank, seeds, param_id, 0, columns) / math.sqrt(rank)
    rights = [_side_by_side(right, seeds, combination).T.contiguous() for combination in combinations]
    base = torch.zeros(BLOCK, columns)
    for piece, left in _with_rows_of_u(_pieces(part, columns), rank, seeds, param_id):
        here, inside = slice(piece.first, piece.first + piece.length), slice(piece.skip, piece.skip + piece.length)
        base.view(-1)[inside] = source[here]
        for combination, v, target in zip(combinations, rights, targets, strict=True):
            total = base
            if combination:
                c = torch.tensor([c for _, c in combination.terms]).repeat_interleave(rank)
                total = torch.addmm(base, _side_by_side(left, seeds, combination) * c, v)
            if rounding_seed is None:
                target[here] = total.view(-1)[inside]
            else:
                add(total.view(-1)[inside], [ZERO], [target[here]], param_id=param_id, bits=GAUSSIAN,
                    offsets=[piece.rows[0] * columns + piece.skip], rounding_seed=rounding_seed)  # fmt: skip


def _pieces(part: Part, columns: int) -> Iterator[Piece]:
    """The blocks of rows that a part consists of."""
    if part.rows is None:
        return pieces_of_shard(part.offset, part.weight.numel(), part.shape)
    return pieces_of_rows(part.rows.tolist(), columns)


def _with_rows_of_u(
    pieces: Iterable[Piece], rank: int, seeds: Sequence[int], param_id: int
) -> Iterator[tuple[Piece, Tensor]]:
    """Each piece with its rows of U, filled up with zeros: [num_seeds, BLOCK, rank].

    They are generated for many pieces at once, because a chunk of the generator is longer than a block's rows.

    Args:
        pieces: of one shard (all consecutive), or of some rows.
        rank: number of columns of U.
        seeds: the directions'.
        param_id: see `seeds.param_id`.
    """
    remaining = iter(pieces)
    while some := list(itertools.islice(remaining, BLOCKS_AT_ONCE)):
        if isinstance(some[0].rows, range):  # a shard: each piece follows the one before
            first, last = some[0].rows[0], some[-1].rows[-1]
            left = _factor(FACTOR_U, rank, seeds, param_id, first, last + 1 - first)
        else:
            offsets = [row * rank for piece in some for row in piece.rows]
            left = fill(FACTOR_U, seeds, param_id, offsets, rank).view(len(seeds), -1, rank)
        left = torch.nn.functional.pad(left, (0, 0, 0, -left.shape[1] % BLOCK))
        yield from zip(some, left.split(BLOCK, dim=1), strict=True)


def _side_by_side(factor: Tensor, seeds: Sequence[int], combination: Combination) -> Tensor:
    """The factors of a combination's terms as one matrix.

    Args:
        factor: [num_seeds, n, rank].
        seeds: the directions that ``factor`` holds, ascending.
        combination: its seeds are some of ``seeds``.

    Returns:
        [n, number of terms * rank].
    """
    if len(combination) < len(seeds):
        place = {seed: k for k, seed in enumerate(seeds)}
        factor = factor[[place[seed] for seed, _ in combination.terms]]
    return factor.transpose(0, 1).reshape(factor.shape[1], -1)


@functools.lru_cache(maxsize=4096)
def _direction(seed: int) -> Combination:
    return Combination.single(seed, 1.0)


def fill(bits: BitLayout, seeds: Sequence[int], param_id: int, offset: int | list[int], length: int) -> Tensor:
    """The values of many directions at the same places.

    Args:
        bits: bit layout of the directions.
        seeds: the directions'.
        param_id: see `seeds.param_id`.
        offset: index of the first element in the flattened parameter, or of each piece's first element.
        length: elements of a piece.

    Returns:
        fp32 [num_seeds, number of pieces * length].
    """
    offsets = offset if isinstance(offset, list) else [offset]
    values = torch.empty(len(seeds), len(offsets) * length)
    zero = torch.zeros(len(offsets) * length)
    for first in range(0, len(seeds), SEEDS_AT_ONCE):
        some = seeds[first : first + SEEDS_AT_ONCE]
        outputs = list(values[first : first + SEEDS_AT_ONCE])
        add(zero, [_direction(seed) for seed in some], outputs, param_id=param_id, bits=bits, offsets=offsets)
    return values
