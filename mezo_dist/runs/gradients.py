"""The gradient of a step's loss, for the first-order baselines: back-propagation over a batch, shared by the ranks.

Batches, micro-batches and scores are those of the other algorithms, and so is the loss that is logged: a sum that is
exact on any number of ranks. Sums of gradients are not: floating-point numbers are added in another order on another
number of ranks, so that runs on 1 and 2 processes differ in the last bits. All ranks of a run have the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mezo_dist.algorithms.base import Losses
from mezo_dist.baselines.backward import back_propagating
from mezo_dist.baselines.optimizer import WeightOptimizer
from mezo_dist.distributed.communicator import Communicator, fingerprint
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.loss_table import LossTable
from mezo_dist.errors import UserError
from mezo_dist.objectives.calibration import best_offsets, loss_at
from mezo_dist.objectives.joint import exact_logits
from mezo_dist.runs.evaluation import Evaluator, payload_bits, payload_of
from mezo_dist.tasks.batches import MicroBatch, by_slot, deal

Passes = Sequence[tuple[MicroBatch, bool]]
"""Micro-batches of this rank, and whether they count: a rank with fewer than others goes along on sharded layouts."""


@dataclass(frozen=True)
class Gradients:
    """Computes gradients, and keeps them beside the weights until the optimiser has taken its step.

    Args:
        evaluator: engine, forward passes and ranks.
        optimizer: gets the gradients.
        calibrated: the loss is the calibrated one.
        recompute: ``train.gradient_checkpointing``.
    """

    evaluator: Evaluator
    optimizer: WeightOptimizer
    calibrated: bool
    recompute: bool

    @property
    def cost(self) -> int:
        """Forward passes that a sample's loss and gradient count as: a backward pass is two, computing blocks again is
        one."""
        return 4 if self.recompute else 3

    @property
    def engine(self) -> Engine:
        """Owns the weights."""
        return self.evaluator.engine

    @property
    def comm(self) -> Communicator:
        """The ranks."""
        return self.evaluator.comm

    def losses(self, batch: Sequence[MicroBatch], mark: tuple[object, ...]) -> Losses | None:
        """The loss of a batch and the norm of its gradient, which is kept for the optimiser. Collective.

        Args:
            batch: all micro-batches; this rank takes its share.
            mark: see `Evaluator.losses`.

        Returns:
            None if the loss is not finite anywhere; then there is no gradient.

        Raises:
            UserError: the loss depends on no trainable weight.
        """
        self.optimizer.forget_gradients()
        back_propagate = self._calibrated if self.calibrated else self._plain
        with back_propagating(self.engine, recompute=self.recompute), self.comm.explained("back-propagation"):
            loss, weight = back_propagate(self._passes(batch), batch, mark)
        if loss is None:
            self.optimizer.forget_gradients()
            return None
        norm = self.optimizer.sum_gradients(self.comm, weight, fingerprint("gradient", *mark))
        return Losses(loss.mean, gradient_norm=norm)

    def _passes(self, batch: Sequence[MicroBatch]) -> Passes:
        dealt = deal(batch, self.comm.world_size)
        mine = dealt[self.comm.rank]
        missing = max(map(len, dealt)) - len(mine) if self.engine.layout.is_sharded else 0
        return [*((item, True) for item in mine), *((batch[0], False) for _ in range(missing))]

    def _plain(
        self, passes: Passes, batch: Sequence[MicroBatch], mark: tuple[object, ...]
    ) -> tuple[Losses | None, int]:
        """Back-propagate sums of losses, one micro-batch after another.

        Args:
            passes: this rank's.
            batch: all micro-batches of the batch.
            mark: see `losses`.

        Returns:
            The mean loss, and what it is a mean over.
        """
        table = LossTable(1, 0, self.comm.world_size)
        for item, counts in passes:
            scores = self.evaluator.forward(self.engine.model, item)
            if counts:
                table.add(0, item.slots, scores.loss.detach(), scores.weight)
            _backward(scores.loss.sum(), counts=counts)
        losses = table.total(self.comm, fingerprint("gradient", *mark))
        return losses, table.weight

    def _calibrated(
        self, passes: Passes, batch: Sequence[MicroBatch], mark: tuple[object, ...]
    ) -> tuple[Losses | None, int]:
        """Back-propagate the loss at the offsets that fit the batch best, which is the calibrated loss's gradient: the
        offsets minimise it, so that they do not count (the envelope theorem). What the backward pass needs is kept for
        all of this rank's micro-batches until the offsets are known. Arguments and result are those of `_plain`."""
        num_samples, columns = sum(len(item.slots) for item in batch), max(item.columns for item in batch)
        table = torch.zeros(num_samples, columns, dtype=torch.int64)
        graphs: list[tuple[MicroBatch, Tensor, bool]] = []
        for item, counts in passes:
            logits = self.evaluator.forward(self.engine.model, item).payload
            graphs.append((item, logits, counts))
            if counts:
                table[list(item.slots), : logits.shape[1]] = payload_bits(logits.detach())
        payload = payload_of(self.comm.round(table, fingerprint("payload", *mark)))

        def fitted(rows: Tensor) -> Tensor:
            logits, labels = exact_logits(rows), by_slot(batch, "label")
            offsets = best_offsets(logits, labels)
            return torch.cat([loss_at(logits, labels, offsets).unsqueeze(-1), offsets], dim=-1)

        values = self.evaluator.on_main(payload, fitted, (1 + columns,), mark)
        offsets = torch.zeros(columns) if values is None else values[1:].float()
        for item, logits, counts in graphs:  # also where there is no loss: sharded layouts wait for each backward pass
            label = item.targets["label"].to(logits.device)
            _backward(F.cross_entropy(logits + offsets.to(logits.device), label, reduction="sum"), counts=counts)
        return None if values is None else Losses((float(values[0]),)), num_samples


def _backward(loss: Tensor, *, counts: bool) -> None:
    if not loss.requires_grad:
        raise UserError("model.trainable: the loss depends on none of the weights that are to be trained")
    (loss if counts else 0.0 * loss).backward()
