"""The gradient of a step's loss, for the first-order baselines: back-propagation over a batch, shared by the ranks.

Batches, micro-batches and scores are those of the other algorithms, and so is the loss that is logged: a sum that is
exact on any number of ranks. Sums of gradients are not: floating-point numbers are added in another order on another
number of ranks, so that runs on 1 and 2 processes differ in the last bits. All ranks of a run have the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mezo_dist.algorithms.base import Losses, Variant
from mezo_dist.baselines.backward import back_propagating
from mezo_dist.baselines.base import GradientOptimizer
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
    optimizer: GradientOptimizer
    calibrated: bool
    recompute: bool

    @property
    def cost(self) -> int:
        """Forward passes that a sample's loss and gradient count as: a backward pass is two, computing blocks again is
        one, and so is a pass of its own for the offsets."""
        return 3 + self.recompute + (self.calibrated and not self.optimizer.keeps_graphs)

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
        back_propagate = self._plain
        if self.calibrated:
            back_propagate = self._calibrated if self.optimizer.keeps_graphs else self._calibrated_in_turn
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
        with self._back_propagating():
            for item, counts in passes:
                scores = self.evaluator.forward(self.optimizer.model, item)
                if counts:
                    table.add(0, item.slots, scores.loss.detach(), scores.weight)
                self._backward(scores.loss.sum(), counts=counts)
            losses = table.total(self.comm, fingerprint("gradient", *mark))
        return losses, table.weight

    def _calibrated(
        self, passes: Passes, batch: Sequence[MicroBatch], mark: tuple[object, ...]
    ) -> tuple[Losses | None, int]:
        """Back-propagate the loss at the offsets that fit the batch best, which is the calibrated loss's gradient: the
        offsets minimise it, so that they do not count (the envelope theorem). What the backward pass needs is kept for
        all of this rank's micro-batches until the offsets are known. Arguments and result are those of `_plain`."""
        num_samples, columns = _size(batch)
        table = torch.zeros(num_samples, columns, dtype=torch.int64)
        graphs: list[tuple[MicroBatch, Tensor, bool]] = []
        with self._back_propagating():
            for item, counts in passes:
                logits = self.evaluator.forward(self.optimizer.model, item).payload
                graphs.append((item, logits, counts))
                if counts:
                    table[list(item.slots), : logits.shape[1]] = payload_bits(logits.detach())
            payload = payload_of(self.comm.round(table, fingerprint("payload", *mark)))
            values = self.evaluator.on_main(payload, lambda rows: _fitted(rows, batch), (1 + columns,), mark)
            offsets = torch.zeros(columns) if values is None else values[1:].float()
            for item, logits, counts in graphs:  # also where there is no loss: shards wait for each backward pass
                self._backward(_shifted_loss(logits, item, offsets), counts=counts)
        return None if values is None else Losses((float(values[0]),)), num_samples

    def _calibrated_in_turn(
        self, passes: Passes, batch: Sequence[MicroBatch], mark: tuple[object, ...]
    ) -> tuple[Losses | None, int]:
        """`_calibrated` where a backward pass has to follow its forward pass: the offsets come from forward passes of
        their own."""
        num_samples, columns = _size(batch)
        values = self.evaluator.compute(
            [Variant()], batch, lambda payload: _fitted(payload[0], batch), (1 + columns,), mark
        )
        if values is None:
            return None, num_samples
        with self._back_propagating():
            for item, counts in passes:
                logits = self.evaluator.forward(self.optimizer.model, item).payload
                self._backward(_shifted_loss(logits, item, values[1:].float()), counts=counts)
        return Losses((float(values[0]),)), num_samples

    @contextlib.contextmanager
    def _back_propagating(self) -> Iterator[None]:
        """Within, passes may be back-propagated through; they issue collectives of their own."""
        with self.comm.explained("back-propagation"), back_propagating(self.engine, recompute=self.recompute):
            yield

    def _backward(self, loss: Tensor, *, counts: bool) -> None:
        if not loss.requires_grad:
            raise UserError("model.trainable: the loss depends on none of the weights that are to be trained")
        self.optimizer.backward(loss if counts else 0.0 * loss)


def _size(batch: Sequence[MicroBatch]) -> tuple[int, int]:
    """Samples of a batch, and columns of their payload."""
    return sum(len(item.slots) for item in batch), max(item.columns for item in batch)


def _fitted(rows: Tensor, batch: Sequence[MicroBatch]) -> Tensor:
    """The calibrated loss of a batch, and the offsets that minimise it: fp64 [1 + columns].

    Args:
        rows: fp32 [n, columns], the payload of its samples by slot.
        batch: all micro-batches of the batch.
    """
    logits, labels = exact_logits(rows), by_slot(batch, "label")
    offsets = best_offsets(logits, labels)
    return torch.cat([loss_at(logits, labels, offsets).unsqueeze(-1), offsets], dim=-1)


def _shifted_loss(logits: Tensor, item: MicroBatch, offsets: Tensor) -> Tensor:
    """Sum of the losses of a micro-batch's samples, with offsets of the classes.

    Args:
        logits: [n, columns], of its samples.
        item: the micro-batch.
        offsets: fp32 [columns].
    """
    label = item.targets["label"].to(logits.device)
    return F.cross_entropy(logits + offsets.to(logits.device), label, reduction="sum")
