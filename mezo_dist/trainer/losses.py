"""How the losses of a `MeZOTrainer`'s micro-batches become Trainer's loss of the batch."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, final

from torch import nn
from transformers import Trainer

from mezo_dist.algorithms.base import Variant
from mezo_dist.distributed.join import join
from mezo_dist.engines.engine import Engine
from mezo_dist.errors import UserError
from mezo_dist.optim.losses import Loss, num_samples_of
from mezo_dist.trainer.batches import Inputs, Share

log = logging.getLogger(__name__)


@final
class TrainerLosses:
    """The losses that ``compute_loss`` of a trainer gives.

    Args:
        trainer: the trainer.
        engine: makes one for its model.
    """

    def __init__(self, trainer: Trainer, engine: Callable[[], Engine]) -> None:
        self._trainer, self._engine = trainer, engine
        self._divides: bool | None = None  # whether losses are divided by what they are told; None: not known

    def learn(self, share: Share) -> None:
        """Find out on a batch whether losses are divided by what they are told, unless that is known. Collective."""
        if self._divides is None and self._is_told(share):
            self._divides = self._try_dividing(share)
            if self._divides is False:
                log.warning(
                    "the losses are not divided by num_items_in_batch, which they are told: they are taken for means "
                    "of micro-batches (Trainer adds them up: its loss grows with gradient_accumulation_steps)"
                )

    def _is_told(self, share: Share) -> bool:
        """Losses are told what to divide by."""
        trainer = self._trainer
        return share.num_items is not None and (
            trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
        )

    def _try_dividing(self, share: Share) -> bool | None:
        """Whether losses are divided by ``num_items_in_batch``; None if none of this batch tells, for all are 0 or not
        finite. Many models take it and give means all the same (most classifiers): Trainer lets that be, but a loss,
        and with it the step, would grow with the number of micro-batches. Collective: the first micro-batch whose loss
        tells decides, on whichever rank it is. What is not known is asked again, so that a run that goes on from a
        checkpoint knows as much as it did.
        """
        trainer = self._trainer

        def both(model: nn.Module, inputs: Inputs) -> tuple[float, float]:
            assert share.num_items is not None
            told = (share.num_items, 2 * share.num_items)
            once, twice = (float(trainer.compute_loss(model, dict(inputs), num_items_in_batch=n).sum()) for n in told)
            return once, twice

        inputs = share.micro_batches
        for place in range(max(join().collect(lambda: len(inputs)))):
            here = self._engine().evaluate([Variant()], inputs[place : place + 1], both, most=1, filler=inputs[0])
            # 0: no label of this micro-batch counts
            told = [once != twice for ((once, twice),) in here if math.isfinite(once) and once != 0]
            votes = [vote for rank in join().collect(lambda told=told: told) for vote in rank]  # type: ignore[misc]
            if votes:
                return bool(votes[0])
        return None

    def loss(self, share: Share, model: nn.Module, inputs: Mapping[str, Any]) -> Loss:
        """The loss of a micro-batch such that the mean over those of all ranks is Trainer's loss of the batch (but for
        losses that Trainer adds up though they are means, see `learn`).

        Args:
            share: the batch that it belongs to.
            model: the model, or a variant of it.
            inputs: the micro-batch.

        Raises:
            UserError: losses of single samples would be averaged over processes.
        """
        trainer, normalised = self._trainer, self._is_told(share)
        # Without a number that it would not divide by: Trainer multiplies what it has told one by that of processes.
        num_items = None if self._divides is False else share.num_items
        loss = trainer.compute_loss(model, dict(inputs), num_items_in_batch=num_items)
        if loss.dim():
            is_multiplied = normalised and self._divides is not False and trainer.args.average_tokens_across_devices
            if is_multiplied and join().world_size > 1:
                raise UserError(
                    "average_tokens_across_devices: set it to False where the loss is a vector: losses of samples are "
                    "added up over processes without it"
                )
            return loss
        is_sum = getattr(trainer, "loss_is_scaled_for_ga", None)
        if is_sum is None:
            is_sum = normalised or (trainer.compute_loss_func is not None and not share.is_full)
        if is_sum and self._divides is not False:
            return loss.double() * share.most  # without another rounding
        return (loss, num_samples_of(inputs)) if share.is_full else loss
