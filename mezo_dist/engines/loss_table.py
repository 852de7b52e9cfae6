"""Losses of a round, added up exactly: over micro-batches, over ranks, in whatever order they come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from mezo_dist.algorithms.base import Losses, Pair
from mezo_dist.directions import devices
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.distributed.fixed_point import MAX_SUM, ONE, mean, to_fixed
from mezo_dist.errors import LostRankError, UserError

Row = Sequence[Sequence[int]]
"""For each sample, the sum of its losses in units of 1 / ONE, and its weight."""


@final
class LossTable:
    """Sums of losses and weights for every variant of a round, as fixed-point integers on this rank.

    Args:
        num_variants: variants of the round.
        num_samples: samples of the batch over all ranks, if each sample's loss is wanted; 0: one sum per variant.
        world_size: number of ranks whose tables are added.

    Attributes:
        weight: after `total`, what the first variant's loss is a mean over; 0 where there is none.
    """

    def __init__(self, num_variants: int, num_samples: int, world_size: int) -> None:
        self._each_sample = num_samples > 0
        self._table = torch.zeros(num_variants, max(num_samples, 1), 2, dtype=torch.int64)
        self._largest = MAX_SUM // world_size
        self._is_finite, self._failed = True, False
        self._on_device: list[tuple[int, tuple[int, ...], Tensor, Tensor]] = []
        self.weight = 0

    def add(self, variant: int, slots: tuple[int, ...], loss: Tensor, weight: Tensor) -> None:
        """Add the losses of one micro-batch under one variant.

        Args:
            variant: its number.
            slots: places of the samples in the batch; not looked at where one sum per variant is wanted.
            loss: fp32 or fp64 [n], sums over what ``weight`` counts.
            weight: int64 [n].
        """
        if loss.device.type == "cpu":
            self._add(variant, slots, loss, weight.cpu())
        else:  # the host does not wait for each of them, but for all in `total`
            self._on_device.append((variant, slots, loss, weight))

    def _add(self, variant: int, slots: tuple[int, ...], loss: Tensor, weight: Tensor) -> None:
        """`add` of what is in host memory.

        Args:
            variant: its number.
            slots: places of the samples in the batch.
            loss: fp32 or fp64 [n].
            weight: int64 [n].
        """
        fixed, is_finite = to_fixed(loss)
        row = self._table[variant]
        self._is_finite = self._is_finite and bool(is_finite.all()) and self._fits(row, fixed)
        columns = torch.tensor(slots) if self._each_sample else torch.zeros(len(fixed), dtype=torch.int64)
        row.index_add_(0, columns, torch.stack([fixed, weight], dim=1))

    def fail(self) -> None:
        """Make `total` raise on the other ranks: this one has run into an error and will not go on."""
        self._failed = True

    def total(self, comm: Communicator, mark: int, pairs: Sequence[Pair] = ()) -> Losses | None:
        """Means over all ranks, the same bits on each of them; None if a loss is not finite anywhere. Collective.

        Args:
            comm: the ranks.
            mark: `mezo_dist.distributed.communicator.fingerprint` of what is evaluated; see `Communicator.round`.
            pairs: variants along whose directions the curvature is wanted, which takes the losses of all samples.

        Raises:
            LostRankError: another rank called `fail`.
            UserError: no rank added a loss.
        """
        on_host = iter(devices.read([tensor for *_, loss, weight in self._on_device for tensor in (loss, weight)]))
        for variant, slots, *_ in self._on_device:
            self._add(variant, slots, next(on_host), next(on_host))
        self._on_device.clear()
        message = torch.cat([torch.tensor([not self._is_finite, self._failed]).long(), self._table.flatten()])
        total = comm.round(message, mark)
        if int(total[1]):
            raise LostRankError(f"{comm.place}: another rank failed in its forward passes; its own message says why")
        if int(total[0]):
            return None
        sums = total[2:].view(self._table.shape).tolist()
        if any(weight == 0 for row in sums for _, weight in row):
            raise UserError("the batch has no samples on any rank, so there is no loss")
        self.weight = sum(weight for _, weight in sums[0])
        means = tuple(mean(sum(loss for loss, _ in row), sum(weight for _, weight in row)) for row in sums)
        each = tuple(tuple(mean(loss, weight) for loss, weight in row) for row in sums) if self._each_sample else ()
        curvatures = [_fisher(sums[pair.ahead], sums[pair.behind], pair.distance) for pair in pairs]
        return Losses(means, each, math.fsum(curvatures) / len(curvatures) if curvatures else None)

    def _fits(self, row: Tensor, loss: Tensor) -> bool:
        """The sums stay below 62 bits, also after those of the other ranks are added."""
        magnitude = sum(abs(value) for value in loss.tolist()) + max(abs(value) for value in row[:, 0].tolist())
        return magnitude < self._largest


def _fisher(ahead: Row, behind: Row, distance: float) -> float:
    """The empirical Fisher matrix along a direction: the mean square of the slopes of single samples.

    It stands for the Hessian of a mean of negative log-likelihoods, which it equals on average at the weights that the
    data were drawn from. The slope of a text is the sum of those of its tokens. These are uncorrelated there, so that
    the square of their sum is the sum of their squares, and the mean over texts and tokens is that over all tokens.

    Args:
        ahead: for each sample, its loss in units of 1 / ONE and its weight.
        behind: the same at the other end.
        distance: between the ends, in lengths of the direction.
    """
    slopes = [(loss - other) / (ONE * distance) for (loss, _), (other, _) in zip(ahead, behind, strict=True)]
    return math.fsum(slope * slope for slope in slopes) / sum(weight for _, weight in ahead)
