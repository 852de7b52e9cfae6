"""`Field`: the random field of a run, that is, what every seed means on every parameter.

For the element-wise laws (``gaussian``, ``rademacher``) a direction is a vector of independent entries. Under
``lowrank`` the direction of a matrix is ``z = U V^T / sqrt(rank)`` with gaussian factors (one row of U per row of the
matrix, one row of V per column; any row range can be made alone), that of a vector is gaussian. Such a direction need
not exist as weights: a linear layer can apply it to its input, a different one to every sample
(`mezo_dist.engines.persample`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mezo_dist.directions.add import add
from mezo_dist.directions.combination import ZERO, Combination
from mezo_dist.directions.laws import FACTOR_U, FACTOR_V, GAUSSIAN, RADEMACHER, Law

ROWS_AT_ONCE = 4096
SEEDS_AT_ONCE = 32


@dataclass(frozen=True)
class Field:
    """The law of a run's directions. ``rank`` matters to ``lowrank`` alone."""

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
        return self._law.version

    @property
    def is_lowrank(self) -> bool:
        """Directions of matrices are products of thin factors."""
        return self.name == "lowrank"

    @property
    def _law(self) -> Law:
        return RADEMACHER if self.name == "rademacher" else GAUSSIAN

    def add(
        self,
        weight: Tensor,
        combinations: Sequence[Combination],
        outputs: Sequence[Tensor],
        *,
        param_id: int,
        shape: torch.Size,
        rows: Tensor | None = None,
        rounding_seed: int | None = None,
    ) -> None:
        """Write ``cast(weight + combinations[v])`` to ``outputs[v]``; see `mezo_dist.directions.add.add`.

        Args:
            weight: a whole parameter, or some of its rows (indices along its first dimension).
            combinations: one per output.
            outputs: shaped as ``weight``; one of them may be ``weight`` itself.
            param_id: see `seeds.param_id`.
            shape: of the whole parameter.
            rows: int64 [k], which rows ``weight`` holds; None: all.
            rounding_seed: for bf16 outputs that are to be rounded stochastically.
        """
        if self.is_lowrank and len(shape) >= 2:
            self._add_lowrank(weight, combinations, outputs, param_id, shape, rows, rounding_seed)
            return
        offsets = [0] if rows is None else (rows * math.prod(shape[1:])).tolist()
        add(
            weight,
            combinations,
            outputs,
            param_id=param_id,
            law=self._law,
            offsets=offsets,
            rounding_seed=rounding_seed,
        )

    def factors(self, seeds: Sequence[int], param_id: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """U [num_seeds, rows, rank] and V [num_seeds, columns, rank] of a matrix (fp32); V carries 1 / sqrt(rank)."""
        rows, columns = shape[0], math.prod(shape[1:])
        u = self._factor(FACTOR_U, seeds, param_id, 0, rows)
        v = self._factor(FACTOR_V, seeds, param_id, 0, columns)
        return u, v / math.sqrt(self.rank)

    def vector(self, seeds: Sequence[int], param_id: int, size: int) -> Tensor:
        """The directions of a 1-D parameter: fp32 [num_seeds, size]."""
        return _fill(self._law, seeds, param_id, 0, size)

    def _factor(self, law: Law, seeds: Sequence[int], param_id: int, first_row: int, num_rows: int) -> Tensor:
        flat = _fill(law, seeds, param_id, first_row * self.rank, num_rows * self.rank)
        return flat.view(len(seeds), num_rows, self.rank)

    def _add_lowrank(
        self,
        weight: Tensor,
        combinations: Sequence[Combination],
        outputs: Sequence[Tensor],
        param_id: int,
        shape: torch.Size,
        rows: Tensor | None,
        rounding_seed: int | None,
    ) -> None:
        """``U diag(c) V^T`` over all directions of a combination, row block by row block: one matrix product each."""
        columns = math.prod(shape[1:])
        source = weight.view(-1, columns)
        targets = [output.view(-1, columns) for output in outputs]
        seeds = sorted({seed for combination in combinations for seed, _ in combination.terms})
        right = self._factor(FACTOR_V, seeds, param_id, 0, columns) / math.sqrt(self.rank)
        rights = [_side_by_side(right, seeds, combination) for combination in combinations]
        for first in range(0, len(source), ROWS_AT_ONCE):
            block = slice(first, min(first + ROWS_AT_ONCE, len(source)))
            left = self._rows_of_u(seeds, param_id, block, rows)
            base = source[block].float()
            for combination, v, target in zip(combinations, rights, targets, strict=True):
                total = base
                if combination:
                    c = torch.tensor([c for _, c in combination.terms]).repeat_interleave(self.rank)
                    total = torch.addmm(base, _side_by_side(left, seeds, combination) * c, v.T)
                if rounding_seed is None:
                    target[block] = total
                else:
                    add(total, [ZERO], [target[block]], param_id=param_id, law=GAUSSIAN, offsets=[first * columns],
                        rounding_seed=rounding_seed)  # fmt: skip

    def _rows_of_u(self, seeds: Sequence[int], param_id: int, block: slice, rows: Tensor | None) -> Tensor:
        """[num_seeds, rows of the block, rank]"""
        if rows is None:
            return self._factor(FACTOR_U, seeds, param_id, block.start, block.stop - block.start)
        offsets = (rows[block] * self.rank).tolist()
        return _fill(FACTOR_U, seeds, param_id, offsets, self.rank).view(len(seeds), -1, self.rank)


def _side_by_side(factor: Tensor, seeds: Sequence[int], combination: Combination) -> Tensor:
    """The factors of a combination's terms as one matrix: [num_seeds, n, rank] -> [n, terms * rank]."""
    if len(combination) < len(seeds):
        place = {seed: k for k, seed in enumerate(seeds)}
        factor = factor[[place[seed] for seed, _ in combination.terms]]
    return factor.transpose(0, 1).reshape(factor.shape[1], -1)


@functools.lru_cache(maxsize=4096)
def _one(seed: int) -> Combination:
    return Combination.single(seed, 1.0)


def _fill(law: Law, seeds: Sequence[int], param_id: int, offset: int | list[int], length: int) -> Tensor:
    """Values of many directions at the same places: fp32 [num_seeds, number of offsets * length]."""
    offsets = offset if isinstance(offset, list) else [offset]
    made = torch.empty(len(seeds), len(offsets) * length)
    zero = torch.zeros(len(offsets) * length)
    for first in range(0, len(seeds), SEEDS_AT_ONCE):
        some = seeds[first : first + SEEDS_AT_ONCE]
        outputs = list(made[first : first + SEEDS_AT_ONCE])
        add(zero, [_one(seed) for seed in some], outputs, param_id=param_id, law=law, offsets=offsets)
    return made
