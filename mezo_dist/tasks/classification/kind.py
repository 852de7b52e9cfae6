"""`Classification`: a `mezo_dist.tasks.kind.TaskKind`."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from mezo_dist.config.kinds.classification import ClassificationTask
from mezo_dist.errors import UserError
from mezo_dist.models.frozen_groups import Group
from mezo_dist.tasks.batches import MicroBatch, by_slot, model_inputs
from mezo_dist.tasks.choice.kind import Choice
from mezo_dist.tasks.choice.options import encode_options
from mezo_dist.tasks.classification.label_words import LabelWords, classifier
from mezo_dist.tasks.classification.metrics import measure
from mezo_dist.tasks.classification.prompts import Encoder, Sample
from mezo_dist.tasks.continuation import before_answer
from mezo_dist.tasks.encoding import EncodedRows
from mezo_dist.tasks.fields import Row
from mezo_dist.tasks.kind import Answer, Bench, Forward, TaskKind, TextModel, text_encoder

log = logging.getLogger(__name__)


def classification(task: ClassificationTask, model: TextModel, first_row: Row) -> TaskKind:
    """Classification as `mezo_dist.tasks.kinds` has it: by label words that are tokens, or by a head, or as a choice.

    Label words of several tokens are scored as the options of a choice, by their mean log-probability (as MeZO does).
    """
    encoder = Encoder(task, model.tokenizer, model.kind, model.max_tokens, model.num_tokens)
    if model.kind == "causal" and _has_long_words(task, model, encoder, first_row):
        log.info("label words have several tokens (%s): they are scored as options of a choice", task.words)

        def measure_options(prediction: Tensor, label: Tensor) -> Mapping[str, float]:
            return {task.metric: measure(task.metric, prediction, label, len(task.labels))}

        texts = text_encoder(task, model)
        return Choice(texts, task.prompt, lambda _: task.words, lambda row, _: (encoder.label(row),), measure_options)
    return Classification(task, encoder)


def _has_long_words(task: ClassificationTask, model: TextModel, encoder: Encoder, row: Row) -> bool:
    """Label words are whole words after the prompt of ``row``, but not all of them single tokens."""
    texts, unknown = text_encoder(task, model), model.tokenizer.unk_token_id
    try:
        encoder.label_ids(row)
        return False
    except UserError:
        pass  # said again when samples are encoded, unless they are long words
    try:
        if not before_answer(task.prompt, row)[-1:].isspace():
            return False  # the end of the prompt and the word are one word
        encoded, _ = texts.fit(row, lambda row: encode_options(texts, task.prompt, task.words, row))
    except UserError:
        return False
    words = [ids[start:] for ids, start in zip(encoded.options, encoded.starts, strict=True)]
    return len(set(words)) == len(words) and max(map(len, words)) > 1 and all(unknown not in ids for ids in words)


@final
@dataclass(frozen=True)
class Classification:
    """One of a few classes. Payload: the logits of the classes."""

    task: ClassificationTask
    encoder: Encoder

    sample: ClassVar[type[Sample]] = Sample
    payload_is_smooth: ClassVar[bool] = True

    def encode(self, rows: Sequence[Row], split: str) -> EncodedRows[Sample]:
        """See `TaskKind`."""
        return self.encoder.encode(rows, split)

    def collate(self, samples: Sequence[Sample], slots: tuple[int, ...], pad_id: int) -> MicroBatch:
        """See `TaskKind`."""
        return collate(samples, slots, pad_id, columns=len(self.task.labels))

    def forward(self, bench: Bench) -> Forward:
        """See `TaskKind`."""
        run = bench.shorten(self._group)
        if self.encoder.kind == "classifier":
            return functools.partial(classifier, run=run)
        return LabelWords(bench.model, self.class_tokens(bench.first_row), bench.probe, run, bench.once)

    def writer(self, bench: Bench) -> None:
        """See `TaskKind`."""

    def class_tokens(self, row: Row) -> list[int]:
        """See `TaskKind`."""
        return [] if self.encoder.kind == "classifier" else self.encoder.label_ids(row)

    def summarise(self, loss: float, payload: Tensor, batch: Sequence[MicroBatch]) -> Mapping[str, float]:
        """See `TaskKind`."""
        metric, classes = self.task.metric, len(self.task.labels)
        return {metric: measure(metric, payload.argmax(dim=-1), by_slot(batch, "label"), classes)}

    def merits(self, payload: Tensor, batch: Sequence[MicroBatch]) -> Tensor:
        """See `TaskKind`."""
        return (payload.argmax(dim=-1) == by_slot(batch, "label")).double()

    def answers(self, payload: Tensor, batch: Sequence[MicroBatch]) -> list[Answer]:
        """See `TaskKind`."""
        words = self.task.words
        pairs = zip(by_slot(batch, "label").tolist(), payload.argmax(dim=-1).tolist(), strict=True)
        return [Answer(words[right], words[said], (right, said)) for right, said in pairs]

    def _group(self, batch: MicroBatch) -> Group:
        return batch.inputs, None if self.encoder.kind == "classifier" else batch.targets["position"]


def collate(samples: Sequence[Sample], slots: tuple[int, ...], pad_id: int, columns: int = 1) -> MicroBatch:
    """Samples as tensors: targets ``position``, int64 [n], where the answer is read, and ``label``, class indices.

    Args:
        samples: of one micro-batch.
        slots: their places in the batch.
        pad_id: token id that sequences are filled up with.
        columns: number of classes.
    """
    types = [sample.types for sample in samples] if samples[0].types else ()
    targets = {
        "position": torch.tensor([sample.position for sample in samples]),
        "label": torch.tensor([sample.label for sample in samples]),
    }
    return MicroBatch(slots, model_inputs([sample.ids for sample in samples], pad_id, types), targets, columns)
