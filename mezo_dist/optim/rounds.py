"""One round of an `Optimizer`'s step: a user's loss function on all variants, added up over the processes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, final

from torch import Tensor, nn

from mezo_dist.algorithms.base import Evaluation, Losses
from mezo_dist.distributed.communicator import Communicator, OutOfStepError
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.loss_table import LossTable
from mezo_dist.engines.probe import check_model
from mezo_dist.engines.probe_messages import SettingNames
from mezo_dist.errors import LostRankError, UserError
from mezo_dist.optim.losses import BatchT, LossFunction, loss_and_weight

log = logging.getLogger(__name__)

ARGUMENT_NAMES = SettingNames(
    model="model",
    compute="compute_dtype",
    freeze="leave them out by requires_grad_(False): {}",
    weights="cast the model itself to {}",
    hint="Optimizer(probe=False) skips this check.",
)
"""The probe's settings as an `Optimizer`'s user knows them."""


@dataclass(frozen=True, eq=False)
class MicroBatch(Generic[BatchT]):
    """What goes through the model in one forward pass."""

    content: BatchT
    slots: tuple[int, ...] = ()
    """Places of its samples in the batch of all processes, if samples are told apart."""


@final
class Rounds(Generic[BatchT]):
    """Evaluates rounds.

    Args:
        engine: owns the weights.
        comm: the processes.
        num_samples: number of samples of a micro-batch.
        probe: hold losses under a shift against really changed weights, before the first round.
    """

    def __init__(
        self, engine: Engine, comm: Communicator, num_samples: Callable[[BatchT], int], *, probe: bool
    ) -> None:
        self._engine, self._comm, self._num_samples, self._must_probe = engine, comm, num_samples, probe

    def count(self, batch: Sequence[BatchT]) -> tuple[int, int, int]:
        """Samples of the processes before this one, samples of all processes, and the largest number of micro-batches
        that one of them has. Collective."""
        counts = self._comm.collect(lambda: [sum(map(self._num_samples, batch)), len(batch)])
        return sum(n for n, _ in counts[: self._comm.rank]), sum(n for n, _ in counts), max(m for _, m in counts)

    def losses(
        self, request: Evaluation, loss: LossFunction[BatchT], batch: Sequence[BatchT], mark: int
    ) -> Losses | None:
        """Losses of all variants over the batches of all processes; None if one is not finite. Collective.

        Args:
            request: what to evaluate.
            loss: the user's function.
            batch: this process's micro-batches.
            mark: `fingerprint` of settings, step and number of the round, which must be the same on all processes.

        Raises:
            UserError: the loss function returned nothing usable, or a batch has another number of samples than
                directions. LostRankError: the forward passes of another process failed.
        """
        self._engine.model.eval()  # loops put models into train mode, epoch by epoch; dropout would be noise
        items, num_samples, most = self._items(request, batch)
        table = LossTable(len(request.variants), num_samples, self._comm.world_size)

        def forward(model: nn.Module, item: MicroBatch[BatchT]) -> tuple[Tensor, Tensor]:
            losses, weights = loss_and_weight(loss(model, item.content))
            if num_samples and len(losses) != len(item.slots):
                raise UserError(
                    f"{'per_sample' if request.each_sample else 'lr: auto'}: the loss function returned {len(losses)} "
                    f"losses for {len(item.slots)} samples; it must return one for each"
                )
            return losses, weights

        try:
            self._probe(request, items, forward)
            rows = self._engine.evaluate(
                request.variants, items, forward, most=most, filler=items[0] if items else None
            )
        except Exception:
            self._tell_others(table, mark)
            raise
        for item, row in zip(items, rows, strict=True):
            for variant, (losses, weights) in enumerate(row):
                table.add(variant, item.slots, losses, weights)
        result = table.total(self._comm, mark, request.pairs)
        return result if result is None or request.each_sample else replace(result, each=())

    def _items(self, request: Evaluation, batch: Sequence[BatchT]) -> tuple[list[MicroBatch[BatchT]], int, int]:
        """Micro-batches with the places of their samples, if those count; samples of all processes, or 0 if they do
        not; and the largest number of micro-batches that a process has."""
        if not request.tells_samples_apart and not self._engine.layout.is_sharded:
            return [MicroBatch(content) for content in batch], 0, len(batch)
        place, total, most = self.count(batch)
        if not batch and self._engine.layout.is_sharded:
            raise UserError("micro_batches: where weights are cut over the processes, each needs at least one")
        if not request.tells_samples_apart:
            return [MicroBatch(content) for content in batch], 0, most
        expected = max(len(variant.per_sample) for variant in request.variants)
        if request.each_sample and total != expected:
            raise UserError(f"batch_size: directions for {expected} samples, but the {request.batch} has {total}")
        items: list[MicroBatch[BatchT]] = []
        for content in batch:
            stop = place + self._num_samples(content)
            items.append(MicroBatch(content, tuple(range(place, stop))))
            place = stop
        return items, total, most

    def _probe(
        self,
        request: Evaluation,
        items: Sequence[MicroBatch[BatchT]],
        forward: Callable[[nn.Module, MicroBatch[BatchT]], tuple[Tensor, Tensor]],
    ) -> None:
        """Refuse a model or loss that would be evaluated wrongly, before the first step: `mezo_dist.engines.probe`.

        Args:
            request: the first round.
            items: this process's micro-batches.
            forward: gives losses and weights.
        """
        if self._must_probe and items:
            self._must_probe = False
            if self._engine.layout.is_sharded:
                log.info("losses under a shift are not probed: ranks of a sharded layout have no micro-batch in common")
                return
            check_model(
                self._engine,
                items[0],
                lambda model, item: forward(model, item)[0],
                other=items[1] if len(items) > 1 else None,
                per_sample=request.each_sample,
                processes=self._comm.ranks_here,
                refuse_flat=False,
                settings=ARGUMENT_NAMES,
            )

    def _tell_others(self, table: LossTable, mark: int) -> None:
        """Let the other processes end at once, where they would wait for this one's losses."""
        if self._comm.world_size > 1:
            table.fail()
            with contextlib.suppress(LostRankError, OutOfStepError):
                table.total(self._comm, mark)
