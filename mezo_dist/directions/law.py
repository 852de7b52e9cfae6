"""`Law`: what every seed means on every parameter in a run.

Invariant: a shard, some rows or the whole of a parameter get the same bits, on any number of ranks.

For the element-wise laws (``gaussian``, ``rademacher``) a direction is a vector of independent entries. Under
``lowrank`` the direction of a matrix is ``z = U V^T / sqrt(rank)`` with gaussian factors (one row of U per row of the
matrix, one row of V per column; any range of rows can be generated alone), that of a vector is gaussian. Such a
direction need not exist as weights: a linear layer can apply it to its input, a different one to every sample
(`mezo_dist.engines.lockstep.persample`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mezo_dist.directions.add import add, advance
from mezo_dist.directions.bits import FACTOR_U, FACTOR_V, GAUSSIAN, RADEMACHER, BitLayout
from mezo_dist.directions.combination import ZERO, Combination

BLOCK = 64
"""Rows of a low-rank direction that one matrix product computes."""
BLOCKS_AT_ONCE = 64
"""Blocks of rows whose rows of U are generated together."""
SEEDS_AT_ONCE = 32
"""Directions that one call of `add` generates."""
SCALED_AT_ONCE = 1 << 20
"""Elements that are scaled at a time: 4 MiB of scratch."""

LawName = Literal["gaussian", "rademacher", "lowrank"]


@dataclass(frozen=True)
class Law:
    """The law of a run's directions: a distribution, and the numbers that belong to every seed.

    Args:
        name: ``gaussian``, ``rademacher`` or ``lowrank``.
        rank: number of columns of the thin factors; it matters to ``lowrank`` alone.

    Raises:
        ValueError: an unknown name, or a rank below 1.

    >>> import torch
    >>> weight = torch.zeros(3)
    >>> Law("rademacher").add(weight, [Combination.single(7, 0.5)], [weight], param_id=1, shape=weight.shape)
    >>> weight.abs()
    tensor([0.5000, 0.5000, 0.5000])
    """

    name: str
    rank: int = 1

    def __post_init__(self) -> None:
        if self.name not in ("gaussian", "rademacher", "lowrank"):
            raise ValueError(f"law: {self.name!r} is not one of gaussian, rademacher, lowrank")
        if self.rank < 1:
            raise ValueError(f"rank: must be at least 1, not {self.rank}")

    @property
    def version(self) -> str:
        """Changes whenever a seed would mean other numbers."""
        if self.name == "lowrank":
            return f"{GAUSSIAN.version}/lowrank-{self.rank}"
        return self._bits.version

    @property
    def is_lowrank(self) -> bool:
        """Directions of matrices are products of thin factors."""
        return self.name == "lowrank"

    @property
    def _bits(self) -> BitLayout:
        return RADEMACHER if self.name == "rademacher" else GAUSSIAN

    def add(
        self,
        weight: Tensor,
        combinations: Sequence[Combination],
        outputs: Sequence[Tensor],
        *,
        param_id: int,
        shape: torch.Size,
        offset: int = 0,
        rows: Tensor | None = None,
        rounding_seed: int | None = None,
    ) -> None:
        """Write ``cast(weight + combinations[v])`` to ``outputs[v]``; see `mezo_dist.directions.add.add`.

        Args:
            weight: fp32, bf16 or fp16: a whole parameter, a shard of it, or some of its rows (indices along its first
                dimension).
            combinations: one per output.
            outputs: shaped as ``weight``; one of them may be ``weight`` itself.
            param_id: see `seeds.param_id`.
            shape: the whole parameter's.
            offset: index of a shard's first element in the flattened parameter.
            rows: int64 [k], the rows that ``weight`` holds; None: a shard, or all.
            rounding_seed: for bf16 outputs that are to be rounded stochastically.
        """
        if self.is_lowrank and len(shape) >= 2 and any(combinations):
            pieces = _pieces_of_shard(offset, weight.numel(), shape) if rows is None else _pieces_of_rows(rows, shape)
            self._add_lowrank(weight, combinations, outputs, param_id, shape, pieces, rounding_seed)
            return
        offsets = [offset] if rows is None else (rows * math.prod(shape[1:])).tolist()
        add(
            weight,
            combinations,
            outputs,
            param_id=param_id,
            bits=self._bits,
            offsets=offsets,
            rounding_seed=rounding_seed,
        )

    def advance(
        self,
        weight: Tensor,
        updates: Sequence[tuple[Combination, int | None]],
        *,
        param_id: int,
        shape: torch.Size,
        offset: int = 0,
    ) -> None:
        """Add one combination after another to a parameter or a shard of it, in place: the same bits as `add` for each.

        Args:
            weight: a whole parameter, or a shard of it.
            updates: (combination, seed of stochastic rounding or None).
            param_id: see `seeds.param_id`.
            shape: the whole parameter's.
            offset: index of a shard's first element in the flattened parameter.
        """
        if len(updates) > 1 and not (self.is_lowrank and len(shape) >= 2):
            advance(weight, updates, param_id=param_id, bits=self._bits, offset=offset)
            return
        for combination, seed in updates:  # lowrank: an update is matrix products, and the matrix stays in the cache
            self.add(weight, [combination], [weight], param_id=param_id, shape=shape, offset=offset, rounding_seed=seed)

    def scale(
        self,
        weight: Tensor,
        factor: float,
        *,
        param_id: int,
        offset: int = 0,
        rounding_seed: int | None = None,
    ) -> None:
        """``weight <- cast(factor * weight)``, computed in fp32, in place.

        Args:
            weight: fp32, bf16 or fp16: a whole parameter, or a shard of it.
            factor: rounded to fp32 by torch.
            param_id: see `seeds.param_id`; stochastic rounding needs it.
            offset: index of a shard's first element in the flattened parameter.
            rounding_seed: for a bf16 weight that is to be rounded stochastically.
        """
        flat = weight.detach().view(-1)
        for start in range(0, flat.numel(), SCALED_AT_ONCE):
            piece = flat[start : start + SCALED_AT_ONCE]
            scaled = piece.float() * factor
            if rounding_seed is None:
                piece.copy_(scaled)
            else:
                offsets = [offset + start]
                add(scaled, [ZERO], [piece], param_id=param_id, bits=GAUSSIAN, offsets=offsets,
                    rounding_seed=rounding_seed)  # fmt: skip

    def factors(self, seeds: Sequence[int], param_id: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """The thin factors of a matrix's directions: ``z = U V^T``.

        Args:
            seeds: the directions'.
            param_id: see `seeds.param_id`.
            shape: the matrix's; dimensions after the first count as columns.

        Returns:
            U [num_seeds, rows, rank] and V [num_seeds, columns, rank], fp32; V carries the 1 / sqrt(rank).
        """
        rows, columns = shape[0], math.prod(shape[1:])
        u = self._factor(FACTOR_U, seeds, param_id, 0, rows)
        v = self._factor(FACTOR_V, seeds, param_id, 0, columns)
        return u, v / math.sqrt(self.rank)

    def vector(self, seeds: Sequence[int], param_id: int, size: int) -> Tensor:
        """The directions of a 1-D parameter.

        Args:
            seeds: the directions'.
            param_id: see `seeds.param_id`.
            size: number of elements.

        Returns:
            fp32 [num_seeds, size].
        """
        return _fill(self._bits, seeds, param_id, 0, size)

    def _factor(self, bits: BitLayout, seeds: Sequence[int], param_id: int, first_row: int, num_rows: int) -> Tensor:
        """Rows ``first_row ..`` of one factor of many directions, unscaled: fp32 [num_seeds, num_rows, rank].

        Args:
            bits: `FACTOR_U` or `FACTOR_V`.
            seeds: the directions'.
            param_id: see `seeds.param_id`.
            first_row: number of the first row.
            num_rows: number of rows.
        """
        flat = _fill(bits, seeds, param_id, first_row * self.rank, num_rows * self.rank)
        return flat.view(len(seeds), num_rows, self.rank)

    def _add_lowrank(
        self,
        weight: Tensor,
        combinations: Sequence[Combination],
        outputs: Sequence[Tensor],
        param_id: int,
        shape: torch.Size,
        pieces: Iterable[_Piece],
        rounding_seed: int | None,
    ) -> None:
        """``U diag(c) V^T`` over all directions of a combination, `BLOCK` rows at a time: one matrix product each.

        A product of another shape may be summed in another order. So all have the same shape, whatever the shard, and
        a row of a matrix gets the same bits wherever it lies.

        Args:
            weight: a shard of a matrix, or some of its rows.
            combinations: one per output.
            outputs: shaped as ``weight``.
            param_id: see `seeds.param_id`.
            shape: the whole matrix's.
            pieces: blocks of rows that ``weight`` consists of.
            rounding_seed: for bf16 outputs that are to be rounded stochastically.
        """
        columns = math.prod(shape[1:])
        source, targets = weight.view(-1), [output.view(-1) for output in outputs]
        seeds = sorted({seed for combination in combinations for seed, _ in combination.terms})
        right = self._factor(FACTOR_V, seeds, param_id, 0, columns) / math.sqrt(self.rank)
        rights = [_side_by_side(right, seeds, combination).T.contiguous() for combination in combinations]
        base = torch.zeros(BLOCK, columns)
        for piece, left in self._with_rows_of_u(pieces, seeds, param_id):
            here, inside = slice(piece.first, piece.first + piece.length), slice(piece.skip, piece.skip + piece.length)
            base.view(-1)[inside] = source[here]
            for combination, v, target in zip(combinations, rights, targets, strict=True):
                total = base
                if combination:
                    c = torch.tensor([c for _, c in combination.terms]).repeat_interleave(self.rank)
                    total = torch.addmm(base, _side_by_side(left, seeds, combination) * c, v)
                if rounding_seed is None:
                    target[here] = total.view(-1)[inside]
                else:
                    add(total.view(-1)[inside], [ZERO], [target[here]], param_id=param_id, bits=GAUSSIAN,
                        offsets=[piece.rows[0] * columns + piece.skip], rounding_seed=rounding_seed)  # fmt: skip

    def _with_rows_of_u(
        self, pieces: Iterable[_Piece], seeds: Sequence[int], param_id: int
    ) -> Iterator[tuple[_Piece, Tensor]]:
        """Each piece with its rows of U, filled up with zeros: [num_seeds, BLOCK, rank].

        They are generated for many pieces at once, because a chunk of the generator is longer than a block's rows.

        Args:
            pieces: of one shard (all consecutive), or of some rows.
            seeds: the directions'.
            param_id: see `seeds.param_id`.
        """
        remaining = iter(pieces)
        while some := list(itertools.islice(remaining, BLOCKS_AT_ONCE)):
            if isinstance(some[0].rows, range):  # a shard: each piece follows the one before
                first, last = some[0].rows[0], some[-1].rows[-1]
                left = self._factor(FACTOR_U, seeds, param_id, first, last + 1 - first)
            else:
                offsets = [row * self.rank for piece in some for row in piece.rows]
                left = _fill(FACTOR_U, seeds, param_id, offsets, self.rank).view(len(seeds), -1, self.rank)
            left = torch.nn.functional.pad(left, (0, 0, 0, -left.shape[1] % BLOCK))
            yield from zip(some, left.split(BLOCK, dim=1), strict=True)


@dataclass(frozen=True)
class _Piece:
    """The elements that one product is added to: those from ``skip`` on of some rows of the matrix."""

    rows: Sequence[int]
    """Numbers of the rows, at most `BLOCK`."""
    skip: int
    """Elements of these rows before the piece."""
    first: int
    """Index of the piece's first element in the tensor that `Law.add` was given."""
    length: int
    """Number of elements."""


def _pieces_of_shard(offset: int, length: int, shape: torch.Size) -> Iterator[_Piece]:
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
        yield _Piece(range(row, min(row + BLOCK, shape[0])), first - start, first - offset, stop - first)


def _pieces_of_rows(rows: Tensor, shape: torch.Size) -> Iterator[_Piece]:
    """Blocks of the rows ``rows`` (int64 [k]), in that order."""
    columns, numbers = math.prod(shape[1:]), rows.tolist()
    for k in range(0, len(numbers), BLOCK):
        some = numbers[k : k + BLOCK]
        yield _Piece(some, 0, k * columns, len(some) * columns)


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


def _fill(bits: BitLayout, seeds: Sequence[int], param_id: int, offset: int | list[int], length: int) -> Tensor:
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
