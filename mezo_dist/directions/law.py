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
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from mezo_dist.directions import lowrank
from mezo_dist.directions.add import add, advance, check, handles_parts, implementation
from mezo_dist.directions.bits import GAUSSIAN, RADEMACHER, BitLayout
from mezo_dist.directions.combination import ZERO, Combination
from mezo_dist.directions.parts import Part, kept_as, remembered

CPU = torch.device("cpu")
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
        self.add_parts(
            [Part(weight, tuple(outputs), param_id, shape, offset, rows)], combinations, rounding_seed=rounding_seed
        )

    def add_parts(
        self, parts: Sequence[Part], combinations: Sequence[Combination], *, rounding_seed: int | None = None
    ) -> None:
        """`add` for many tensors; on a GPU by one launch of a kernel for up to 32 of them.

        Args:
            parts: the tensors, on one device; each has one output per combination.
            combinations: the same for all of them.
            rounding_seed: for bf16 outputs that are to be rounded stochastically.
        """
        is_stochastic = rounding_seed is not None
        for kernels, thin, some in self._sorted(parts, any(combinations)):
            remembered(some, ("checked", is_stochastic), functools.partial(_check, some, is_stochastic=is_stochastic))
            if thin and handles_parts(kernels):
                kernels.add_lowrank(some, combinations, rank=self.rank, rounding_seed=rounding_seed)
            elif handles_parts(kernels):
                kernels.add_parts(some, combinations, bits=self._bits, rounding_seed=rounding_seed)
            elif thin:
                for part in some:
                    lowrank.add_lowrank(part, combinations, self.rank, rounding_seed)
            else:
                for part in some:
                    offsets = [part.offset] if part.rows is None else (part.rows * part.columns).tolist()
                    add(part.weight, combinations, part.outputs, param_id=part.param_id, bits=self._bits,
                        offsets=offsets, rounding_seed=rounding_seed)  # fmt: skip

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
        self.advance_parts([Part(weight, (weight,), param_id, shape, offset)], updates)

    def advance_parts(self, parts: Sequence[Part], updates: Sequence[tuple[Combination, int | None]]) -> None:
        """`advance` for many tensors, each of which is its own output; on a GPU by one launch for up to 32 of them.

        Args:
            parts: the tensors, on one device.
            updates: (combination, seed of stochastic rounding or None).
        """
        for kernels, thin, some in self._sorted(parts, True):
            if thin and handles_parts(kernels):
                kernels.advance_lowrank(some, updates, rank=self.rank)
            elif handles_parts(kernels):
                kernels.advance_parts(some, updates, bits=self._bits)
            elif len(updates) > 1 and not thin:
                for part in some:
                    advance(part.weight, updates, param_id=part.param_id, bits=self._bits, offset=part.offset)
            else:  # lowrank: an update is matrix products, and the matrix stays in the cache
                for part in some:
                    for combination, seed in updates:
                        self.add_parts([part], [combination], rounding_seed=seed)

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
        self.scale_parts([Part(weight, (weight,), param_id, weight.shape, offset)], factor, rounding_seed=rounding_seed)

    def scale_parts(self, parts: Sequence[Part], factor: float, *, rounding_seed: int | None = None) -> None:
        """`scale` for many tensors, each of which is its own output.

        Args:
            parts: the tensors, on one device.
            factor: rounded to fp32.
            rounding_seed: for bf16 weights that are to be rounded stochastically.
        """
        kernels = implementation(parts[0].weight.device.type)
        if handles_parts(kernels):
            kernels.scale_parts(parts, factor, rounding_seed=rounding_seed)
            return
        for part in parts:
            _scale(part, factor, rounding_seed)

    def _sorted(self, parts: Sequence[Part], moved: bool) -> Sequence[tuple[ModuleType, bool, Sequence[Part]]]:
        """The kernels of the parts' device, with the parts whose directions are products of thin factors (True), and
        the others. ``moved``: combinations are not all zero."""
        splits = moved and self.is_lowrank
        return remembered(parts, ("sorted", splits), functools.partial(_by_thinness, parts, splits))

    def factors(
        self, seeds: Sequence[int], param_id: int, shape: torch.Size, device: torch.device = CPU
    ) -> tuple[Tensor, Tensor]:
        """The thin factors of a matrix's directions: ``z = U V^T``.

        Args:
            seeds: the directions'.
            param_id: see `seeds.param_id`.
            shape: the matrix's; dimensions after the first count as columns.
            device: where they are wanted; a GPU makes them there.

        Returns:
            U [num_seeds, rows, rank] and V [num_seeds, columns, rank], fp32; V carries the 1 / sqrt(rank).
        """
        kernels = implementation(device.type)
        if handles_parts(kernels):
            u, v = kernels.factors(self.rank, seeds, param_id, shape, device)
        else:
            u, v = lowrank.factors(self.rank, seeds, param_id, shape)
        return u.to(device), v.to(device)

    def vector(self, seeds: Sequence[int], param_id: int, size: int, device: torch.device = CPU) -> Tensor:
        """The directions of a 1-D parameter.

        Args:
            seeds: the directions'.
            param_id: see `seeds.param_id`.
            size: number of elements.
            device: where they are wanted; a GPU makes them there.

        Returns:
            fp32 [num_seeds, size].
        """
        kernels = implementation(device.type)
        if handles_parts(kernels):
            values: Tensor = kernels.fill(self._bits, seeds, param_id, size, device)
            return values
        return lowrank.fill(self._bits, seeds, param_id, 0, size).to(device)

    def directions(
        self, seeds: Sequence[int], weights: Sequence[tuple[int, torch.Size]], device: torch.device = CPU
    ) -> list[tuple[Tensor, ...]]:
        """`factors` of matrices and `vector` of the others, under law lowrank; a GPU makes all of them together.

        Args:
            seeds: the directions'.
            weights: `seeds.param_id` and shape of each.
            device: where they are wanted.
        """
        kernels = implementation(device.type)
        if handles_parts(kernels):
            values: list[tuple[Tensor, ...]] = kernels.directions(self.rank, seeds, weights, device)
            return values
        return [
            self.factors(seeds, param_id, shape, device)
            if len(shape) >= 2
            else (self.vector(seeds, param_id, shape.numel(), device),)
            for param_id, shape in weights
        ]


def _by_thinness(parts: Sequence[Part], splits: bool) -> list[tuple[ModuleType, bool, Sequence[Part]]]:
    """See `Law._sorted`. ``splits``: directions of matrices are products of thin factors."""
    thin = [splits and len(part.shape) >= 2 for part in parts]
    sorted_parts: list[tuple[ModuleType, bool, Sequence[Part]]] = []
    for kind in (True, False):
        some = [part for part, is_thin in zip(parts, thin, strict=True) if is_thin == kind and part.weight.numel()]
        if some:
            sorted_parts.append((implementation(some[0].weight.device.type), kind, kept_as(parts, some)))
    return sorted_parts


def _check(parts: Sequence[Part], *, is_stochastic: bool) -> None:
    for part in parts:
        check(part.weight, part.outputs, is_stochastic=is_stochastic)


def _scale(part: Part, factor: float, rounding_seed: int | None) -> None:
    """See `Law.scale`, in plain torch."""
    flat = part.weight.detach().view(-1)
    for start in range(0, flat.numel(), SCALED_AT_ONCE):
        piece = flat[start : start + SCALED_AT_ONCE]
        scaled = piece.float() * factor
        if rounding_seed is None:
            piece.copy_(scaled)
        else:
            add(scaled, [ZERO], [piece], param_id=part.param_id, bits=GAUSSIAN, offsets=[part.offset + start],
                rounding_seed=rounding_seed)  # fmt: skip
