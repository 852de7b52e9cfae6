"""Batches: their order, how they are cut into micro-batches, and how those are dealt to ranks.

Invariant: which samples a step sees, how they are grouped and how they are padded is a function of (seed, step)
alone. Only then does a sample's loss have the same bits on any number of ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from mezo_dist.directions import devices
from mezo_dist.directions.seeds import shuffled
from mezo_dist.errors import UserError


class Sample(Protocol):
    """An encoded sample of any kind of task: a frozen dataclass of plain values, which a digest of the data is of."""

    @property
    def num_tokens(self) -> int:
        """Length of its longest sequence."""

    @property
    def rows(self) -> Sequence[tuple[int, ...]]:
        """Token ids of each of its sequences, as they become the rows of a micro-batch."""


SampleT = TypeVar("SampleT", bound=Sample)


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Samples that go through the model in one forward pass."""

    slots: tuple[int, ...]
    """Places of the samples in their batch."""
    inputs: dict[str, Tensor]
    """What the model is called with: ``input_ids``, ``attention_mask`` and, where it has them, ``token_type_ids``;
    int64 [rows, length], padded on the right to the longest row. A sample may have several rows."""
    targets: dict[str, Tensor]
    """What the kind of task needs beside them: labels, positions, masks."""
    columns: int = 1
    """Columns of the payload of its scores."""
    rows_per_sample: tuple[int, ...] = ()
    """Rows of each sample, one after another in ``inputs``; empty: one row each."""
    facts: tuple[Any, ...] = ()
    """What figures need to know of each sample and tensors do not hold, if anything (right texts, its row)."""
    seed: int = 0
    """Of what is drawn for its samples, with their slots: a function of the run's seed and the step."""

    @property
    def cost(self) -> int:
        """Tokens, padding included."""
        return self.inputs["input_ids"].numel()

    @property
    def row_slots(self) -> tuple[int, ...]:
        """Slot of the sample that each row of ``inputs`` is of."""
        if not self.rows_per_sample:
            return self.slots
        return tuple(s for s, rows in zip(self.slots, self.rows_per_sample, strict=True) for _ in range(rows))


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
def _epoch(num_samples: int, seed: int, epoch: int) -> Sequence[int]:
    """The order of the samples in one epoch.

    Args:
        num_samples: how many.
        seed: of the order.
        epoch: number of the epoch.
    """
    return shuffled(num_samples, seed, "order", epoch)


def cut(
    samples: Sequence[SampleT],
    micro_batch: int,
    pad_id: int,
    collate: Callable[[Sequence[SampleT], tuple[int, ...], int], MicroBatch],
    seed: int = 0,
) -> list[MicroBatch]:
    """Cut a batch into micro-batches of samples of similar length (less padding), shortest first.

    Args:
        samples: the batch, in order; a sample's place in it becomes its slot.
        micro_batch: samples per micro-batch; the last one may have fewer.
        pad_id: token id that sequences are filled up with, on the right.
        collate: makes a micro-batch of samples, their slots and ``pad_id``; see `mezo_dist.tasks.kind.TaskKind`.
        seed: see `MicroBatch`.
    """
    by_length = sorted(range(len(samples)), key=lambda slot: (samples[slot].num_tokens, slot))
    groups = [by_length[i : i + micro_batch] for i in range(0, len(by_length), micro_batch)]
    micro_batches = (collate([samples[slot] for slot in group], tuple(group), pad_id) for group in groups)
    return [replace(item, seed=seed) for item in micro_batches]


def on_device(micro_batches: Sequence[MicroBatch], device: torch.device) -> list[MicroBatch]:
    """The same with their tensors on ``device``, by one copy; they stay as they are where it is the host. What they
    hold stays known to the host (`devices.known`).

    Args:
        micro_batches: in host memory.
        device: where the model is.
    """
    if device.type == "cpu":
        return list(micro_batches)
    tensors = [tensor for item in micro_batches for part in (item.inputs, item.targets) for tensor in part.values()]
    copies = devices.upload(tensors, device)
    devices.remember(copies, tensors)
    there = iter(copies)
    return [
        replace(
            item,
            inputs={name: next(there) for name in item.inputs},
            targets={name: next(there) for name in item.targets},
        )
        for item in micro_batches
    ]


def deal(micro_batches: Sequence[MicroBatch], world_size: int) -> list[list[MicroBatch]]:
    """The micro-batches of every rank: costliest first to whoever has least, so that ranks finish together."""
    loads = [0] * world_size
    dealt: list[list[MicroBatch]] = [[] for _ in loads]
    for micro_batch in sorted(micro_batches, key=lambda m: (-m.cost, m.slots)):
        owner = min(range(world_size), key=lambda r: loads[r])
        loads[owner] += micro_batch.cost
        dealt[owner].append(micro_batch)
    return dealt


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """int64 [rows, length]: sequences as one tensor, filled up with ``value`` on the right."""
    length = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])


def model_inputs(ids: Sequence[Sequence[int]], pad_id: int, types: Sequence[Sequence[int]] = ()) -> dict[str, Tensor]:
    """The inputs of a model for sequences of tokens.

    Args:
        ids: token ids of each row.
        pad_id: what they are filled up with; the attention mask is 0 there.
        types: token type ids of each row; empty where the model has none.
    """
    inputs = {"input_ids": padded(ids, pad_id), "attention_mask": padded([[1] * len(row) for row in ids], 0)}
    return inputs | {"token_type_ids": padded(types, 0)} if types else inputs


def by_slot(batch: Sequence[MicroBatch], target: str) -> Tensor:
    """[n, ...]: a target that has one entry per sample, for all samples of a batch by their places in it."""
    values = torch.cat([micro_batch.targets[target] for micro_batch in batch])
    return values[torch.tensor([slot for micro_batch in batch for slot in micro_batch.slots]).argsort()]


def facts_by_slot(batch: Sequence[MicroBatch]) -> list[Any]:
    """The facts of all samples of a batch, in its order."""
    pairs = [pair for item in batch for pair in zip(item.slots, item.facts, strict=True)]
    return [facts for _, facts in sorted(pairs, key=lambda pair: pair[0])]
