"""The batches of a `MeZOTrainer`'s step: micro-batches, and what their losses have to be multiplied by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from mezo_dist.directions.seeds import derive_seed
from mezo_dist.errors import UserError
from mezo_dist.tasks.batches import BatchOrder

Inputs = Mapping[str, Any]
"""What the model is called with."""


@dataclass(frozen=True, eq=False)
class Share:
    """This rank's micro-batches of a batch."""

    micro_batches: Sequence[Inputs]
    num_items: Tensor | int | None
    """``num_items_in_batch`` of `transformers.Trainer`: what losses that are normalised by it are divided by."""
    most: float
    """Micro-batches of all ranks over the number of ranks."""
    is_full: bool = False
    """It is a full batch: means of micro-batches count by what they are means of. (Trainer weighs those of a step
    equally.)"""


@final
class FullBatches:
    """The full batches of MeZO-SVRG's anchors: the training set, or a sample of it that is drawn for each anchor.

    Which samples an anchor sees is a function of (seed, step), and so is part of any checkpoint; they are those that
    `mezo-dist train` would take.

    Args:
        dataset: of samples, with a length.
        collate: makes inputs of a list of samples.
        size: samples of a full batch; all if None.
        micro_batch: samples per micro-batch.
        seed: of the run.
        rank: of this process.
        world_size: number of processes.

    Raises:
        UserError: the data has no length, or is smaller than the sample.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Inputs],
        size: int | None,
        *,
        micro_batch: int,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise UserError(
                "train_dataset: an anchor of MeZO-SVRG evaluates all samples, or a sample of them, so it needs a data "
                "set with a length, not a stream; use MeZO(...) for streams"
            )
        self.size = size or len(dataset)
        if not 0 < self.size <= len(dataset):
            raise UserError(f"full_size: {size} is not between 1 and the {len(dataset)} samples of the training set")
        self.num_micro_batches = -(-self.size // micro_batch)
        if self.num_micro_batches < world_size:
            raise UserError(
                f"full_size: {self.size} samples are {self.num_micro_batches} micro-batches, and each of the "
                f"{world_size} processes needs one"
            )
        self._dataset, self._collate, self._micro_batch = dataset, collate, micro_batch
        self._order = BatchOrder(len(dataset), self.size, derive_seed(seed, "full"))
        self._rank, self._world_size = rank, world_size

    def at(self, step: int) -> list[Inputs]:
        """This rank's micro-batches of the full batch of ``step``."""
        chosen = self._order.batch(step)
        parts = [chosen[i : i + self._micro_batch] for i in range(0, len(chosen), self._micro_batch)]
        return [self._collate([self._dataset[i] for i in part]) for part in parts[self._rank :: self._world_size]]
