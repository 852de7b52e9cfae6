"""Forward passes over a batch, shared out over the ranks and summed exactly."""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mezo_dist.algorithms.base import Evaluation, Losses, Pair, Variant
from mezo_dist.directions import devices
from mezo_dist.distributed.communicator import Communicator, fingerprint
from mezo_dist.distributed.fixed_point import ONE, mean, to_fixed
from mezo_dist.engines.decoding import Way, evaluate_decoding
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.loss_table import LossTable
from mezo_dist.objectives.joint import Joint
from mezo_dist.runs.work_split import WorkSplit
from mezo_dist.tasks.batches import MicroBatch, on_device
from mezo_dist.tasks.kind import Forward, Scores
from mezo_dist.tasks.scoring import device_of

log = logging.getLogger(__name__)


Summarise = Callable[[float, Tensor, Sequence[MicroBatch]], Mapping[str, float]]
"""Figures of a split, of its mean loss, payload and micro-batches (`mezo_dist.tasks.kind.TaskKind.summarise`)."""


@dataclass(frozen=True)
class Writer:
    """How texts are written: a forward that calls the model for every token, and whose payload they are."""

    forward: Forward
    way: Way
    """How variants write."""


@dataclass(frozen=True)
class Evaluator:
    """An engine, a way to score micro-batches and the comm: all that a round of forward passes needs."""

    engine: Engine
    forward: Forward
    comm: Communicator
    width: int | None = 8
    """Micro-batches that go through the model together; if None, as many as `capacity` allows."""
    capacity: int = 1
    """Tokens, counted once for every pass that they are in, that may be in the model at a time; equal on all ranks."""
    work_split: WorkSplit | None = None
    """How rounds are split over the ranks; if None, every rank evaluates all variants."""
    joint: Joint | None = None
    """If not None: what makes losses of the scores of a whole batch; else they are means over samples."""
    writer: Writer | None = None
    """If not None: how texts are written, which figures and joint losses are about."""
    is_squared_error: bool = False
    """Losses are squares of what a number is wrong by, and not negative log-likelihoods; see `losses`."""

    def losses(self, request: Evaluation, batch: Sequence[MicroBatch], mark: tuple[object, ...]) -> Losses | None:
        """Evaluate a round. None if any loss, anywhere, is not finite (or has diverged): then no rank may update.

        Args:
            request: what to evaluate.
            batch: all micro-batches of the batch; this rank takes its part.
            mark: what the rank believes it is doing; ranks that differ are told (`Communicator.round`).
        """
        if self.joint is not None:
            return self._joint_losses(self.joint, request, batch, mark)
        num_samples = sum(len(micro_batch.slots) for micro_batch in batch) if request.tells_samples_apart else 0
        table = LossTable(len(request.variants), num_samples, self.comm.world_size)
        for micro_batch, scores in self._evaluate(request.variants, batch):
            for variant, score in scores:
                table.add(variant, micro_batch.slots, score.loss, score.weight)
        losses = table.total(self.comm, fingerprint(*mark, _describe(request)), request.pairs)
        if losses is None:
            return None
        if losses.curvature and self.is_squared_error:
            # The slope of e^2 along a direction is 2 e e', and its curvature 2 e'^2: on average, slopes squared over
            # 2 e^2.
            losses = replace(losses, curvature=losses.curvature / (2 * math.fsum(losses.mean) / len(losses.mean)))
        return losses if request.each_sample else replace(losses, each=())

    def compute(
        self,
        variants: Sequence[Variant],
        batch: Sequence[MicroBatch],
        function: Callable[[Tensor], Tensor],
        shape: Sequence[int],
        mark: tuple[object, ...],
        advance: Callable[[int], None] = lambda _: None,
    ) -> Tensor | None:
        """A function of what the model says about a whole batch, computed by rank 0, for all ranks.

        (Another machine's exp and log may have other last bits.)

        Args:
            variants: weights to evaluate.
            batch: all micro-batches; this rank takes its share.
            function: of payloads, fp32 [variants, n, columns] by slot.
            shape: of what it gives: fp64 numbers.
            mark: see `losses`.
            advance: called with the number of samples done (on this rank, times the number of ranks).

        Returns:
            fp64, multiples of 2^-32; None if a payload or a result, anywhere, is not finite or too large.
        """
        return self.on_main(self._payload(variants, batch, mark, advance), function, shape, mark)

    def on_main(
        self, payload: Tensor, function: Callable[[Tensor], Tensor], shape: Sequence[int], mark: tuple[object, ...]
    ) -> Tensor | None:
        """What rank 0 makes of a payload that all ranks have. Arguments and result are those of `compute`."""
        if not bool(to_fixed(payload)[1].all()):
            return None
        words, failed = torch.zeros(*shape, dtype=torch.int64), False
        if self.comm.rank == 0:
            words, sound = to_fixed(function(payload))
            failed = not bool(sound.all())
        total = self.comm.round(torch.cat([torch.tensor([failed]).long(), words.flatten()]), fingerprint("main", *mark))
        return None if int(total[0]) else total[1:].view(*shape).double() / ONE

    def score(
        self,
        batch: Sequence[MicroBatch],
        summarise: Summarise,
        advance: Callable[[int], None],
        adjust: Callable[[Scores, MicroBatch], Scores] | None = None,
    ) -> dict[str, float]:
        """Mean loss and figures of the current weights on a whole split.

        Args:
            batch: all micro-batches of the split.
            summarise: makes figures of its loss and payload.
            advance: called with the number of samples done (on this rank, times the number of ranks).
            adjust: changes the scores of a micro-batch before they count (offsets of classes).
        """
        if self.writer is not None:
            return self._score_texts(batch, summarise, advance)
        value, payload = self._mean_loss(batch, advance, adjust)
        return {"loss": value, **summarise(value, payload, batch)}

    def _score_texts(
        self, batch: Sequence[MicroBatch], summarise: Summarise, advance: Callable[[int], None]
    ) -> dict[str, float]:
        """`score` of what the model writes. Its loss is the one that is optimised: of completions, or the joint one."""
        mark = ("texts", len(batch))
        payload = self._payload([Variant()], batch, mark, advance)
        joint, figures = self.joint, {}
        if joint is None:
            value, _ = self._mean_loss(batch, lambda _: None)
        else:
            losses = self._joint(joint, payload, batch, mark)
            value = float("nan") if losses is None else losses.mean[0]
            if joint.is_reward:
                figures["reward"] = -value
        texts = payload[0, :, : _size(batch)[1]]
        # Comparing thousands of texts takes minutes: rank 0 does it for all.
        said = json.dumps(dict(summarise(value, texts, batch))) if self.comm.rank == 0 else ""
        return {"loss": value, **figures, **json.loads(self.comm.broadcast_text(said))}

    def _mean_loss(
        self,
        batch: Sequence[MicroBatch],
        advance: Callable[[int], None],
        adjust: Callable[[Scores, MicroBatch], Scores] | None = None,
    ) -> tuple[float, Tensor]:
        """Mean loss of the current weights, and the payload by slot: fp32 [n, columns]. See `score`."""
        num_samples, columns = _size(batch)
        table = torch.zeros(num_samples, 2 + columns, dtype=torch.int64)  # loss, weight, payload
        failed = 0
        for micro_batch, ((_, score),) in self._evaluate([Variant()], batch):
            if adjust is not None:
                score = adjust(score, micro_batch)
            loss, finite = to_fixed(score.loss)
            failed += int((~finite).sum())
            slots = torch.tensor(micro_batch.slots)
            table[slots, :2] = torch.stack([loss, score.weight.cpu()], dim=1)
            table[slots, 2 : 2 + score.payload.shape[1]] = payload_bits(score.payload)
            advance(len(micro_batch.slots) * self.comm.world_size)
        message = torch.cat([torch.tensor([failed]), table.flatten()])
        total = self.comm.round(message, fingerprint("score", num_samples, columns))
        table = total[1:].view(table.shape)
        value = mean(sum(table[:, 0].tolist()), sum(table[:, 1].tolist()))  # sums of int64 tensors wrap
        if int(total[0]):
            value = float("nan")
            if self.comm.rank == 0:
                log.warning(
                    "%d of %d losses are not finite, or far too large: their mean is NaN", total[0], num_samples
                )
        return value, payload_of(table[:, 2:])

    def _joint_losses(
        self, joint: Joint, request: Evaluation, batch: Sequence[MicroBatch], mark: tuple[object, ...]
    ) -> Losses | None:
        """`losses` where these are a function of the whole batch.

        Args:
            joint: the function.
            request: what to evaluate.
            batch: all micro-batches of the batch.
            mark: see `losses`.
        """
        assert joint.each_sample or not request.each_sample  # settings that ask for both are refused
        mark = (*mark, _describe(request))
        payload = self._payload(request.variants, batch, mark, lambda _: None)
        if request.pairs:
            return self._joint_with_curvature(joint, payload, request.pairs, batch, mark)
        losses = self._joint(joint, payload, batch, mark)
        return losses if losses is None or request.each_sample else Losses(losses.mean)

    def _joint_with_curvature(
        self,
        joint: Joint,
        payload: Tensor,
        pairs: Sequence[Pair],
        batch: Sequence[MicroBatch],
        mark: tuple[object, ...],
    ) -> Losses | None:
        """`_joint`, and the mean curvature along the directions of ``pairs``; one round for both.

        Args:
            joint: the function.
            payload: fp32 [variants, n, columns], by slot.
            pairs: of variants.
            batch: all micro-batches of the batch.
            mark: see `losses`.
        """
        function = joint.with_curvature
        assert function is not None  # settings that ask for more are refused
        values = self.on_main(payload, lambda rows: function(rows, batch, pairs), (len(payload) + 1,), mark)
        if values is None:
            return None
        *losses, curvature = values.tolist()
        return Losses(tuple(losses), curvature=curvature)

    def _joint(
        self, joint: Joint, payload: Tensor, batch: Sequence[MicroBatch], mark: tuple[object, ...]
    ) -> Losses | None:
        """Joint losses, of each sample too if there are such. Samples that have none do not count, and have 0 there.

        Args:
            joint: the function.
            payload: fp32 [variants, n, columns], by slot.
            batch: all micro-batches of the batch.
            mark: see `losses`.

        Returns:
            None if a loss is not finite, or no sample has one.
        """
        if not joint.each_sample:
            values = self.on_main(payload, lambda rows: joint.losses(rows, batch), (len(payload),), mark)
            return None if values is None else Losses(tuple(values.tolist()))

        def with_counts(rows: Tensor) -> Tensor:
            values = joint.losses(rows, batch)
            counts = ~values.isnan().any(dim=0)
            return torch.cat([torch.where(counts, values, 0.0), counts.double().unsqueeze(0)])

        table = self.on_main(payload, with_counts, (len(payload) + 1, payload.shape[1]), mark)
        if table is None or not table[-1].any():
            return None
        *each, counts = map(tuple, table.tolist())
        # Python's sums: those of a tensor depend on the machine.
        return Losses(tuple(sum(row) / sum(counts) for row in each), tuple(each))

    def _payload(
        self,
        variants: Sequence[Variant],
        batch: Sequence[MicroBatch],
        mark: tuple[object, ...],
        advance: Callable[[int], None],
    ) -> Tensor:
        """fp32 [variants, n, columns] by slot, the same on all ranks.

        Args:
            variants: what to evaluate.
            batch: all micro-batches of the batch.
            mark: see `losses`.
            advance: see `score`.
        """
        num_samples, columns = _size(batch)
        needs_loss = self.joint is not None and self.joint.needs_loss
        table = torch.zeros(len(variants), num_samples, columns + needs_loss, dtype=torch.int64)
        for micro_batch, scores in self._evaluate(variants, batch, writes=self.writer is not None):
            for variant, score in scores:
                table[variant, list(micro_batch.slots), : score.payload.shape[1]] = payload_bits(score.payload)
            advance(len(micro_batch.slots) * self.comm.world_size)
        if needs_loss:
            for micro_batch, scores in self._evaluate(variants, batch):
                for variant, score in scores:
                    table[variant, list(micro_batch.slots), columns] = payload_bits(score.loss / score.weight)
        return payload_of(self.comm.round(table, fingerprint("payload", *mark)))

    def _evaluate(
        self, variants: Sequence[Variant], batch: Sequence[MicroBatch], *, writes: bool = False
    ) -> Iterator[tuple[MicroBatch, list[tuple[int, Scores]]]]:
        """This rank's part of the round, as many micro-batches at a time as go through the model together.

        Args:
            variants: what to evaluate.
            batch: all micro-batches of the batch.
            writes: texts are written, in place of one forward pass.

        Returns:
            Each micro-batch with the scores of this rank's variants, whose places in ``variants`` come with them.
        """
        work = (self.work_split or WorkSplit(self.comm.world_size)).of_rank(self.comm.rank, variants, batch)
        width = self.width or max(1, self.capacity // (work.most_variants * max(item.cost for item in batch)))
        evaluate, forward = self.engine.evaluate_groups, self.forward
        if writes:
            assert self.writer is not None
            forward = self.writer.forward
            evaluate = functools.partial(evaluate_decoding, self.engine, self.writer.way)
        *items, filler = on_device([*work.micro_batches, batch[0]], device_of(self.engine.model))
        groups = evaluate(
            [variants[v] for v in work.variants],
            items,
            forward,
            most=work.most_micro_batches,
            filler=filler,
            width=width,
        )
        if filler is batch[0]:
            rows: Iterator[list[Scores]] = (row for group in groups for row in group)
        else:  # on a device: the host waits once, for all
            rows = iter(_on_host([row for group in groups for row in group]))
        for micro_batch, scores in zip(work.micro_batches, rows, strict=True):
            yield micro_batch, list(zip(work.variants, scores, strict=True))


def _on_host(rows: Sequence[Sequence[Scores]]) -> list[list[Scores]]:
    """Scores in host memory, by one copy."""
    tensors = (tensor for row in rows for score in row for tensor in (score.loss, score.weight, score.payload))
    parts = iter(devices.read([*tensors]))
    return [[Scores(next(parts), next(parts), next(parts)) for _ in row] for row in rows]


def _size(batch: Sequence[MicroBatch]) -> tuple[int, int]:
    """Samples of a batch, and columns of its payload."""
    return sum(len(item.slots) for item in batch), max(item.columns for item in batch)


def payload_bits(payload: Tensor) -> Tensor:
    """fp32 numbers as int64 ones, of which at most one rank's are not zero, so that sums keep every bit."""
    return payload.float().cpu().contiguous().view(torch.int32).long()


def payload_of(words: Tensor) -> Tensor:
    return words.to(torch.int32).view(torch.float32)


def _describe(request: Evaluation) -> object:
    variants = [[v.base, v.shift.to_json(), [shift.to_json() for shift in v.per_sample]] for v in request.variants]
    pairs = [[pair.ahead, pair.behind, pair.distance] for pair in request.pairs]
    return [variants, request.batch, request.each_sample, *([pairs] if pairs else [])]
