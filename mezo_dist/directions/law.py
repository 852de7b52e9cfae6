"""`Law`: what every seed means on every parameter in a run.

Invariant: a shard, some rows or the whole of a parameter get the same bits, on any number of ranks.

For the element-wise laws (``gaussian``, ``rademacher``) a direction is a vector of independent entries. Under
``lowrank`` the direction of a matrix is ``z = U V^T / sqrt(rank)`` with gaussian factors (one row of U per row of the
matrix, one row of V per column; any range of rows can be generated alone), that of a vector is gaussian. Such a
direction need not exist as weights: a linear layer can apply it to its input, a different one to every sample
(`mezo_dist.engines.lockstep.persample`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mezo_dist.directions import lowrank
from mezo_dist.directions.add import add, advance
from mezo_dist.directions.bits import GAUSSIAN, RADEMACHER, BitLayout
from mezo_dist.directions.combination import ZERO, Combination

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
            if rows is None:
                pieces = lowrank.pieces_of_shard(offset, weight.numel(), shape)
            else:
                pieces = lowrank.pieces_of_rows(rows, shape)
            lowrank.add_lowrank(weight, combinations, outputs, self.rank, param_id, shape, pieces, rounding_seed)
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
        return lowrank.factors(self.rank, seeds, param_id, shape)

    def vector(self, seeds: Sequence[int], param_id: int, size: int) -> Tensor:
        """The directions of a 1-D parameter.

        Args:
            seeds: the directions'.
            param_id: see `seeds.param_id`.
            size: number of elements.

        Returns:
            fp32 [num_seeds, size].
        """
        return lowrank.fill(self._bits, seeds, param_id, 0, size)
