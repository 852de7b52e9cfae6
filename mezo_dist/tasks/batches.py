"""Batches: their order, how they are cut into micro-batches, and how those are dealt to ranks.

Invariant: which samples a step sees, how they are grouped and how they are padded is a function of (seed, step)
alone. Only then does a sample's loss have the same bits on any number of ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mezo_dist.directions.seeds import derive_seed
from mezo_dist.errors import UserError
from mezo_dist.tasks.prompts import Sample


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Samples that go through the model in one forward pass, padded on the right to the longest of them."""

    slots: tuple[int, ...]
    """Places of the samples in their batch."""
    inputs: dict[str, Tensor]
    """``input_ids``, ``attention_mask`` and, where the model has them, ``token_type_ids``: int64 [n, length]."""
    positions: Tensor
    """int64 [n]: where the answer is read."""
    labels: Tensor
    """int64 [n]: class indices."""

    @property
    def cost(self) -> int:
        """Tokens, padding included."""
        return self.inputs["input_ids"].numel()


@dataclass(frozen=True)
class BatchOrder:
    """Minibatches without replacement: every epoch is a fresh permutation, a batch may span two epochs."""

    num_samples: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.batch_size > self.num_samples:
            raise UserError(
                f"train.batch_size {self.batch_size} is larger than the training split ({self.num_samples} samples)"
            )

    def batch(self, step: int) -> list[int]:
        """Indices of the samples of ``step``."""
        first = step * self.batch_size
        places = (divmod(place, self.num_samples) for place in range(first, first + self.batch_size))
        return [_epoch(self.num_samples, self.seed, epoch)[within] for epoch, within in places]


@functools.lru_cache(maxsize=2)
def _epoch(num_samples: int, seed: int, epoch: int) -> list[int]:
    """The order of the samples in one epoch.

    Args:
        num_samples: how many.
        seed: of the order.
        epoch: number of the epoch.
    """
    return sorted(range(num_samples), key=lambda i: derive_seed(seed, "order", epoch, i))


def cut(samples: Sequence[Sample], micro_batch: int, pad_id: int) -> list[MicroBatch]:
    """Cut a batch into micro-batches of samples of similar length (less padding), shortest first.

    Args:
        samples: the batch, in order; a sample's place in it becomes its slot.
        micro_batch: samples per micro-batch; the last one may have fewer.
        pad_id: token id that sequences are filled up with, on the right.
    """
    by_length = sorted(range(len(samples)), key=lambda slot: (len(samples[slot].ids), slot))
    groups = [by_length[i : i + micro_batch] for i in range(0, len(by_length), micro_batch)]
    return [_collate([samples[slot] for slot in group], tuple(group), pad_id) for group in groups]


def deal(micro_batches: Sequence[MicroBatch], world_size: int) -> list[list[MicroBatch]]:
    """The micro-batches of every rank: costliest first to whoever has least, so that ranks finish together."""
    loads = [0] * world_size
    dealt: list[list[MicroBatch]] = [[] for _ in loads]
    for micro_batch in sorted(micro_batches, key=lambda m: (-m.cost, m.slots)):
        owner = min(range(world_size), key=lambda r: loads[r])
        loads[owner] += micro_batch.cost
        dealt[owner].append(micro_batch)
    return dealt


def _collate(samples: Sequence[Sample], slots: tuple[int, ...], pad_id: int) -> MicroBatch:
    """A micro-batch, padded to its longest sample.

    Args:
        samples: of the micro-batch.
        slots: their places in the batch.
        pad_id: token id that sequences are filled up with.
    """
    length = max(len(sample.ids) for sample in samples)

    def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
        return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])

    inputs = {
        "input_ids": padded([sample.ids for sample in samples], pad_id),
        "attention_mask": padded([[1] * len(sample.ids) for sample in samples], 0),
    }
    if samples[0].types:
        inputs["token_type_ids"] = padded([sample.types for sample in samples], 0)
    return MicroBatch(
        slots,
        inputs,
        torch.tensor([sample.position for sample in samples]),
        torch.tensor([sample.label for sample in samples]),
    )
