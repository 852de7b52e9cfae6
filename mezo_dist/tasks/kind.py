"""What a kind of task is: all that the training loop asks of one.

A kind turns rows into samples, samples into micro-batches, a forward pass into scores, and the scores of a split into
figures. Nothing else knows kinds: the engine runs forward passes, the communicator adds numbers, planners see losses.
Implementations are plain final classes in a folder of their own each; `mezo_dist.tasks.kinds` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from mezo_dist.config.schema import ModelKind
from mezo_dist.config.task import TaskSettings
from mezo_dist.models.frozen_cache import RunModel
from mezo_dist.models.frozen_groups import Group
from mezo_dist.tasks.batches import MicroBatch, Sample
from mezo_dist.tasks.encoding import EncodedRows
from mezo_dist.tasks.fields import Row
from mezo_dist.tasks.text import TextEncoder


@dataclass(frozen=True, eq=False)
class Scores:
    """What one forward pass says about each of the n samples of a micro-batch: tensors where the model is, which nobody
    has waited for (`mezo_dist.directions.devices.read`)."""

    loss: Tensor
    """fp32 [n]: sum of losses over the things that ``weight`` counts."""
    weight: Tensor
    """int64 [n]: what the loss is averaged over, 1 per sample or its number of target tokens."""
    payload: Tensor
    """fp32 [n, columns]: what a figure of merit or a joint batch loss needs (logits of the classes, scores
    of the options, numbers of right tokens). It crosses between ranks bit for bit."""


Forward = Callable[[nn.Module, MicroBatch], Scores]
"""Runs the model on one micro-batch."""


@dataclass(frozen=True)
class TextModel:
    """What encoding needs to know about a model."""

    tokenizer: Any
    kind: ModelKind
    max_tokens: int
    """Longest sequence, special tokens included."""
    num_tokens: int | None
    """Tokens that the model knows; None if it does not say."""


def text_encoder(task: TaskSettings, model: TextModel) -> TextEncoder:
    """What makes tokens of the texts of a task, for a model."""
    return TextEncoder(model.tokenizer, model.max_tokens, task.truncate, task.truncate_side, model.num_tokens)


@dataclass(frozen=True)
class Bench:
    """What a kind may try out on the model before training, to see which shortcuts it allows."""

    model: nn.Module
    first_row: Row
    """The first row of the training split."""
    probe: MicroBatch
    """Two training samples."""
    shorten: Callable[[Callable[[MicroBatch], Group]], RunModel]
    """How to call the model, given the inputs and positions of any micro-batch: past its frozen blocks if it can be."""
    once: Callable[[Callable[[nn.Module, MicroBatch], Tensor]], Tensor]
    """Runs a forward pass of the probe, also where weights are sharded."""


@dataclass(frozen=True)
class Answer:
    """What a model says about a sample, in words."""

    right: str
    """The right answer; empty where there is none."""
    said: str
    """The model's."""
    classes: tuple[int, int] | None = None
    """Number of the right class and of the model's, where all samples have the same classes (`TaskSettings.words`)."""


class TaskKind(Protocol):
    """One kind of task, for given settings and a given model's tokenizer."""

    sample: ClassVar[type[Any]]
    """The class of its samples: a frozen dataclass of plain numbers, texts and tuples (see `Sample`)."""
    payload_is_smooth: ClassVar[bool]
    """Small changes of weights change the payload a little (logits do, numbers of right tokens do not)."""

    def encode(self, rows: Sequence[Row], split: str) -> EncodedRows[Any]:
        """The samples of one split, made when they are asked for: a million of them need not be in memory.

        Raises:
            UserError: a row does not fit the task or the model; says which one of ``split``.
        """

    def collate(self, samples: Sequence[Any], slots: tuple[int, ...], pad_id: int) -> MicroBatch:
        """Samples as tensors.

        Args:
            samples: of one micro-batch.
            slots: their places in the batch.
            pad_id: token id that sequences are filled up with.
        """

    def forward(self, bench: Bench) -> Forward:
        """How to score a micro-batch. May call the model to see what shortcuts it allows. Collective."""

    def writer(self, bench: Bench) -> Forward | None:
        """How to write texts, where figures are about these: calls the model token by token, and its payload is the
        texts (its loss and weight are not looked at). None: what `forward` says is all."""

    def class_tokens(self, row: Row) -> list[int]:
        """The token of each class, where single tokens after (or in) the prompt of ``row`` stand for them; else
        empty."""

    def summarise(self, loss: float, payload: Tensor, batch: Sequence[MicroBatch]) -> Mapping[str, float]:
        """The figures of a split or batch, the task's metric among them (and the loss not).

        Args:
            loss: its mean loss.
            payload: fp32 [n, columns], by slot.
            batch: its micro-batches, for their targets.
        """

    def merits(self, payload: Tensor, batch: Sequence[MicroBatch]) -> Tensor:
        """fp64 [n]: numbers whose mean is the task's metric; only called if the settings say `metric_is_mean`."""

    def answers(self, payload: Tensor, batch: Sequence[MicroBatch]) -> list[Answer]:
        """What the model says about each sample, by slot, for people.

        Args:
            payload: fp32 [n, columns], by slot.
            batch: its micro-batches.
        """


__all__ = ["Answer", "Bench", "Forward", "Sample", "Scores", "TaskKind", "TextModel"]
