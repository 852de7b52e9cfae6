"""Thin factors of matrices and entries of vectors, by direction, as layers apply them to activations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from mezo_dist.directions import devices
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.law import Law
from mezo_dist.engines.hooked import Weight


@final
class Factors:
    """Thin factors of matrices and entries of vectors, by direction, as forwards per sample need them.

    Args:
        law: the run's directions (low-rank).
    """

    def __init__(self, law: Law) -> None:
        self.law = law
        self._kept: dict[tuple[object, ...], tuple[Tensor, ...]] | None = None
        self._tables: dict[tuple[object, ...], _Table] = {}
        self._prepared: dict[int, tuple[tuple[Combination, ...], _Table]] = {}
        self._coefficients: dict[tuple[object, ...], Tensor] = {}
        self.seeds: tuple[int, ...] = ()
        """The directions of all passes that run together, ascending."""
        self._together: dict[int, tuple[Tensor, ...]] = {}

    def prepare(self, all_shifts: Sequence[tuple[Combination, ...]], device: torch.device) -> None:
        """Bring the tables of passes that run together to their device, by one copy.

        Args:
            all_shifts: the directions of each pass's samples.
            device: where the passes run.
        """
        several = list(dict.fromkeys(all_shifts))
        seeds = tuple(sorted({seed for shifts in several for shift in shifts for seed, _ in shift.terms}))
        tables = [_Table.of(shifts, seeds) for shifts in several]
        tensors = iter(devices.upload([tensor for table in tables for tensor in vars(table).values()], device))
        there = [_Table(next(tensors), next(tensors), next(tensors)) for _ in tables]
        self._tables = {(shifts, seeds, device): table for shifts, table in zip(several, there, strict=True)}
        # Every module looks them up for every pass, and many combinations take long to compare.
        self._prepared = {id(shifts): (shifts, self._tables[shifts, seeds, device]) for shifts in all_shifts}
        self._coefficients, self.seeds = {}, seeds

    def table(self, shifts: tuple[Combination, ...], seeds: tuple[int, ...], device: torch.device) -> _Table:
        """Which directions samples have, among those of ``seeds``: made anew where it was not prepared, as where some
        passes have gone another way through the model than others.

        Args:
            shifts: of each sample.
            seeds: the directions that there are, ascending.
            device: where it is needed.
        """
        known = self._prepared.get(id(shifts))
        if known is not None and seeds == self.seeds and known[1].mixing.device == device:
            return known[1]
        key = (shifts, seeds, device)
        if key not in self._tables:
            self._tables[key] = _Table(*devices.upload([*vars(_Table.of(shifts, seeds)).values()], device))
        return self._tables[key]

    def coefficients(self, shifts: tuple[Combination, ...], seeds: tuple[int, ...], like: Tensor, rank: int) -> Tensor:
        """Coefficients of the samples' terms, each as many times as its direction has factors: [n, 1, terms * rank].

        Args:
            shifts: of each sample.
            seeds: the directions that there are, ascending.
            like: has the dtype and device that are needed.
            rank: number of factors of a direction.
        """
        table = self.table(shifts, seeds, like.device)
        key = (id(table), like.dtype, like.device, rank)
        if key not in self._coefficients:  # a table lives as long as they do
            c = table.coefficients.to(like.device, like.dtype)
            self._coefficients[key] = c.repeat_interleave(rank, dim=1).unsqueeze(1)
        return self._coefficients[key]

    def make_together(self, weights: Iterable[Weight]) -> None:
        """Make what `matrix` and `vector` will be asked for under `seeds`, in one go; until this is called again.

        Args:
            weights: on one device.
        """
        several = {weight.param_id: weight for weight in weights}
        self._together = {}
        if several and self._kept is None:
            device = next(iter(several.values())).tensor.device
            shapes = [(weight.param_id, weight.shape) for weight in several.values()]
            self._together = dict(zip(several, self.law.directions(self.seeds, shapes, device), strict=True))

    def start_keeping(self) -> None:
        """From now on remember what was made: a forward calls the model many times with the same directions."""
        self._kept = {}

    def stop_keeping(self) -> None:
        """Forget it."""
        self._kept = None

    def matrix(self, weight: Weight, seeds: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        """U and V, see `Law.factors`."""
        if seeds == self.seeds and weight.param_id in self._together:
            u, v = self._together[weight.param_id]
            return u, v
        key = (weight.param_id, tuple(seeds))
        u, v = self._get(key, lambda: self.law.factors(seeds, weight.param_id, weight.shape, device))
        return u, v

    def vector(self, weight: Weight, seeds: tuple[int, ...], device: torch.device) -> Tensor:
        """See `Law.vector`."""
        if seeds == self.seeds and weight.param_id in self._together:
            return self._together[weight.param_id][0]
        key = (weight.param_id, tuple(seeds))
        return self._get(key, lambda: (self.law.vector(seeds, weight.param_id, weight.shape.numel(), device),))[0]

    def of_shift(self, weight: Weight, shift: Combination, like: Tensor) -> tuple[Tensor, Tensor]:
        """U and V whose product U V^T is a shift of a matrix: the directions' factors side by side, V with their
        coefficients. In ``like``'s dtype and device: [rows, terms * rank], [columns, terms * rank]."""

        seeds = tuple(seed for seed, _ in shift.terms)

        def side_by_side(factor: Tensor) -> Tensor:
            return factor.transpose(0, 1).flatten(1).to(like.device, like.dtype).contiguous()

        def make() -> tuple[Tensor, Tensor]:
            u, v = self.law.factors(seeds, weight.param_id, weight.shape, like.device)
            return side_by_side(u), v

        u, v = self._get((weight.param_id, seeds, like.dtype, like.device), make)  # both signs have the same
        return u, side_by_side(v * _coefficients(shift, like.device).view(-1, 1, 1))

    def _get(self, key: tuple[object, ...], make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What ``make`` gives, or what it gave before for the same key, if that is remembered."""
        if self._kept is None:
            return make()
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


@dataclass(frozen=True)
class _Table:
    """Which directions the samples of a pass have. Samples with different numbers of terms have no ``index``."""

    index: Tensor
    """int64 [samples, terms]: place of each term's direction among those that there are."""
    coefficients: Tensor
    """fp32 [samples, terms]."""
    mixing: Tensor
    """fp32 [samples, directions]: coefficient of every direction for every sample."""

    @staticmethod
    def of(shifts: Sequence[Combination], seeds: Sequence[int]) -> _Table:
        """The table, on the host.

        Args:
            shifts: of each sample.
            seeds: the directions that there are, ascending.
        """
        place = {seed: k for k, seed in enumerate(seeds)}
        mixing = torch.zeros(len(shifts), len(seeds))
        for i, shift in enumerate(shifts):
            for seed, c in shift.terms:
                mixing[i, place[seed]] = c
        if len({len(shift) for shift in shifts}) > 1:
            return _Table(torch.empty(0, dtype=torch.int64), torch.empty(0), mixing)
        index = torch.tensor([[place[seed] for seed, _ in shift.terms] for shift in shifts], dtype=torch.int64)
        return _Table(index, torch.tensor([[c for _, c in shift.terms] for shift in shifts]), mixing)


@functools.lru_cache(maxsize=64)
def _coefficients(shift: Combination, device: torch.device) -> Tensor:
    return devices.upload([torch.tensor([c for _, c in shift.terms])], device)[0]
