"""Forward passes over a batch, shared out over the ranks and summed exactly."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from mezo_dist.algorithms.base import Evaluation, Losses, Variant
from mezo_dist.config.task import Metric
from mezo_dist.distributed.communicator import Communicator, fingerprint
from mezo_dist.distributed.fixed_point import ONE, mean, to_fixed
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.loss_table import LossTable
from mezo_dist.objectives.calibration import best_offsets, calibrated_loss
from mezo_dist.objectives.classification import Objective, Scores, cross_entropy
from mezo_dist.runs.work_split import WorkSplit
from mezo_dist.tasks.batches import MicroBatch
from mezo_dist.tasks.metrics import measure

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluator:
    """An engine, an objective and the comm: all that a round of forward passes needs."""

    engine: Engine
    objective: Objective
    comm: Communicator
    width: int | None = 8
    """Micro-batches that go through the model together; if None, as many as `capacity` allows."""
    capacity: int = 1
    """Tokens, counted once for every pass that they are in, that may be in the model at a time; equal on all ranks."""
    work_split: WorkSplit | None = None
    """How rounds are split over the ranks; if None, every rank evaluates all variants."""
    calibrated_classes: int = 0
    """If not 0: losses of batches are calibrated ones, over so many classes; see `mezo_dist.objectives.calibration`."""

    def losses(self, request: Evaluation, batch: Sequence[MicroBatch], mark: tuple[object, ...]) -> Losses | None:
        """Evaluate a round. None if any loss, anywhere, is not finite (or has diverged): then no rank may update.

        Args:
            request: what to evaluate.
            batch: all micro-batches of the batch; this rank takes its part.
            mark: what the rank believes it is doing; ranks that differ are told (`Communicator.round`).
        """
        if self.calibrated_classes:
            return self._calibrated_losses(request, batch, mark)
        num_samples = sum(len(micro_batch.slots) for micro_batch in batch)
        table = LossTable(len(request.variants), num_samples if request.each_sample else 0, self.comm.world_size)
        for micro_batch, scores in self._evaluate(request.variants, batch):
            for variant, score in scores:
                table.add(variant, micro_batch.slots, score.loss, score.weight)
        return table.total(self.comm, fingerprint(*mark, _describe(request)))

    def offsets(self, batch: Sequence[MicroBatch], advance: Callable[[int], None] = lambda _: None) -> torch.Tensor:
        """The best offset of every class for ``batch``, under the current weights; fp32 [classes], on all ranks.

        Zero if a logit is not finite. See `mezo_dist.objectives.calibration`; for ``advance``, `score`.
        """
        mark = ("offsets", len(batch))
        logits = self._logits([Variant()], batch, mark, advance)
        if logits is None:
            return torch.zeros(self.calibrated_classes)
        return self._from_main(lambda: best_offsets(logits[0], _labels(batch)), logits.shape[-1:], mark).float()

    def score(
        self,
        batch: Sequence[MicroBatch],
        metric: Metric,
        num_classes: int,
        advance: Callable[[int], None],
        offsets: torch.Tensor | None = None,
    ) -> dict[str, float]:
        """Mean loss and metric of the current weights on a whole split.

        Args:
            batch: all micro-batches of the split.
            metric: name of the figure of merit.
            num_classes: number of classes.
            advance: called with the number of samples done (on this rank, times the number of ranks).
            offsets: fp32 [classes], added to all logits; see `offsets`.
        """
        num_samples = sum(len(micro_batch.slots) for micro_batch in batch)
        table = torch.zeros(num_samples, 4, dtype=torch.int64)  # loss, weight, prediction, label
        failed = 0
        for micro_batch, ((_, score),) in self._evaluate([Variant()], batch):
            if offsets is not None:
                score = cross_entropy(score.logits + offsets, micro_batch.labels)
            loss, finite = to_fixed(score.loss)
            failed += int((~finite).sum())
            rows = torch.stack([loss, score.weight, score.prediction.cpu(), micro_batch.labels], dim=1)
            table[torch.tensor(micro_batch.slots)] = rows
            advance(len(micro_batch.slots) * self.comm.world_size)
        message = torch.cat([torch.tensor([failed]), table.flatten()])
        total = self.comm.round(message, fingerprint("score", num_samples, metric))
        loss, weight, prediction, label = total[1:].view(table.shape).unbind(dim=1)
        value = mean(sum(loss.tolist()), sum(weight.tolist()))  # sums of int64 tensors wrap
        if int(total[0]):
            value = float("nan")
            if self.comm.rank == 0:
                log.warning(
                    "%d of %d losses are not finite, or far too large: their mean is NaN", total[0], num_samples
                )
        return {"loss": value, metric: measure(metric, prediction, label, num_classes)}

    def _calibrated_losses(
        self, request: Evaluation, batch: Sequence[MicroBatch], mark: tuple[object, ...]
    ) -> Losses | None:
        """`losses` with calibration.

        Args:
            request: what to evaluate.
            batch: all micro-batches of the batch.
            mark: see `losses`.
        """
        assert not request.each_sample  # settings that ask for both are refused
        mark = (*mark, _describe(request))
        logits = self._logits(request.variants, batch, mark)
        if logits is None:
            return None
        losses = self._from_main(lambda: calibrated_loss(logits, _labels(batch)), logits.shape[:1], mark)
        return Losses(tuple(losses.tolist()))

    def _logits(
        self,
        variants: Sequence[Variant],
        batch: Sequence[MicroBatch],
        mark: tuple[object, ...],
        advance: Callable[[int], None] = lambda _: None,
    ) -> torch.Tensor | None:
        """fp64 [variants, samples, classes], the same on all ranks; None if any, anywhere, is not finite.

        Args:
            variants: what to evaluate.
            batch: all micro-batches of the batch.
            mark: see `losses`.
            advance: see `score`.
        """
        num_samples = sum(len(micro_batch.slots) for micro_batch in batch)
        table = torch.zeros(len(variants), num_samples, self.calibrated_classes, dtype=torch.int64)
        sound = True
        for micro_batch, scores in self._evaluate(variants, batch):
            for variant, score in scores:
                logits, finite = to_fixed(score.logits)
                sound = sound and bool(finite.all())
                table[variant, list(micro_batch.slots)] = logits
            advance(len(micro_batch.slots) * self.comm.world_size)
        message = torch.cat([torch.tensor([0 if sound else 1]), table.flatten()])
        total = self.comm.round(message, fingerprint("logits", *mark))
        return None if int(total[0]) else total[1:].view(table.shape).double() / ONE

    def _from_main(
        self, compute: Callable[[], torch.Tensor], shape: torch.Size, mark: tuple[object, ...]
    ) -> torch.Tensor:
        """What rank 0 computes, on all ranks: another machine's exp and log may have other last bits.

        Args:
            compute: called on rank 0 alone.
            shape: of its result.
            mark: see `losses`.
        """
        words = torch.zeros(shape, dtype=torch.int64)
        if self.comm.rank == 0:
            words, _ = to_fixed(compute())
        return self.comm.round(words, fingerprint("from main", *mark)).double() / ONE

    def _evaluate(
        self, variants: Sequence[Variant], batch: Sequence[MicroBatch]
    ) -> Iterator[tuple[MicroBatch, list[tuple[int, Scores]]]]:
        """This rank's part of the round, as many micro-batches at a time as go through the model together.

        Each with the scores of this rank's variants, whose places in ``variants`` come with them.
        """
        work = (self.work_split or WorkSplit(self.comm.world_size)).of_rank(self.comm.rank, variants, batch)
        width = self.width or max(1, self.capacity // (work.most_variants * max(item.cost for item in batch)))
        groups = self.engine.evaluate_groups(
            [variants[v] for v in work.variants],
            work.micro_batches,
            self.objective,
            most=work.most_micro_batches,
            filler=batch[0],
            width=width,
        )
        rows = (row for group in groups for row in group)
        for micro_batch, scores in zip(work.micro_batches, rows, strict=True):
            yield micro_batch, list(zip(work.variants, scores, strict=True))


def _describe(request: Evaluation) -> object:
    variants = [[v.base, v.shift.to_json(), [shift.to_json() for shift in v.per_sample]] for v in request.variants]
    return [variants, request.batch, request.each_sample]


def _labels(batch: Sequence[MicroBatch]) -> torch.Tensor:
    """int64 [n]: of the samples of a batch, by their places in it."""
    labels = torch.cat([micro_batch.labels for micro_batch in batch])
    return labels[torch.tensor([slot for micro_batch in batch for slot in micro_batch.slots]).argsort()]
