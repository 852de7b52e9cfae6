"""`Completion`: a `mezo_dist.tasks.kind.TaskKind`."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from mezo_dist.config.kinds.completion import CompletionTask
from mezo_dist.errors import UserError
from mezo_dist.tasks.batches import MicroBatch, model_inputs
from mezo_dist.tasks.completion.conversation import ASSISTANT, check_template, encode_conversation
from mezo_dist.tasks.continuation import SLOT, check_causal, continued
from mezo_dist.tasks.encoding import EncodedRows, encode_rows
from mezo_dist.tasks.fields import Row, lookup
from mezo_dist.tasks.kind import Answer, Bench, Forward, Scores, TextModel, text_encoder
from mezo_dist.tasks.scoring import TokenScores, target_texts, token_targets
from mezo_dist.tasks.text import TextEncoder, render_row

log = logging.getLogger(__name__)
MOST_LOSS = math.log(sys.float_info.max)
"""The largest loss whose perplexity is a number."""


@dataclass(frozen=True)
class Sample:
    """One encoded sample."""

    ids: tuple[int, ...]
    """Token ids, no padding."""
    spans: tuple[tuple[int, int], ...]
    """(start, stop) of the runs of target tokens in `ids`. The first token is never one: nothing predicts it."""

    @property
    def num_tokens(self) -> int:
        """Length of `ids`."""
        return len(self.ids)

    @property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """See `mezo_dist.tasks.batches.Sample`."""
        return (self.ids,)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> list[int]:
        """Indices of the target tokens."""
        return [place for start, stop in self.spans for place in range(start, stop)]


@final
@dataclass(frozen=True)
class Completion:
    """A text that the model is to write. Payload: numbers of right and of all target tokens."""

    task: CompletionTask
    model: TextModel
    texts: TextEncoder
    sample: ClassVar[type[Sample]] = Sample
    payload_is_smooth: ClassVar[bool] = False

    @staticmethod
    def of(task: CompletionTask, model: TextModel, first_row: Row) -> Completion:
        """See `mezo_dist.tasks.kinds`.

        Raises:
            UserError: the model is not a causal one, its window is shorter than the task's, or its tokenizer lacks a
                chat template or an end-of-text token that the task needs.
        """
        check_causal(model, task.kind)
        if task.messages is not None or task.chat:
            check_template(model.tokenizer, "task.messages" if task.messages is not None else "task.chat")
        elif task.end and model.tokenizer.eos_token_id is None:
            raise UserError("task.end: the tokenizer has no end-of-text token; set it to false")
        if task.window is not None and task.window > model.max_tokens:
            raise UserError(
                f"task.window: {task.window} tokens are more than train.max_tokens, or else the model's window, "
                f"which is {model.max_tokens}"
            )
        kind = Completion(task, model, text_encoder(task, model))
        kind._warn_if_joined(first_row)
        return kind

    def encode(self, rows: Sequence[Row], split: str) -> EncodedRows[Sample]:
        """See `TaskKind`."""
        if self.task.messages is not None:
            return encode_rows(rows, split, self._conversation)
        if self.task.window is not None:
            return self._all_windows(rows, split)
        encode = self._turns if self.task.chat else self._continuation
        return encode_rows(rows, split, lambda row: self.texts.fit(row, encode)[0])

    def collate(self, samples: Sequence[Sample], slots: tuple[int, ...], pad_id: int) -> MicroBatch:
        """See `TaskKind`."""
        rows = [sample.ids for sample in samples]
        return MicroBatch(slots, model_inputs(rows, pad_id), token_targets(rows, [s.targets for s in samples]), 2)

    def forward(self, bench: Bench) -> Forward:
        """See `TaskKind`."""
        token_scores = TokenScores(bench)

        def score(model: nn.Module, batch: MicroBatch) -> Scores:
            chosen, right = token_scores(model, batch)
            weight = batch.targets["is_target"].to(chosen.device).sum(dim=1)
            return Scores(-chosen.sum(dim=1), weight, torch.stack([right.sum(dim=1), weight], dim=1).float())

        return score

    def writer(self, bench: Bench) -> None:
        """See `TaskKind`."""

    def class_tokens(self, row: Row) -> list[int]:
        """See `TaskKind`."""
        return []

    def summarise(self, loss: float, payload: Tensor, batch: Sequence[MicroBatch]) -> Mapping[str, float]:
        """See `TaskKind`."""
        right, targets = (int(total) for total in payload.double().sum(dim=0))  # counts: exact
        perplexity = math.inf if loss >= MOST_LOSS else math.exp(loss)
        return {"perplexity": perplexity, "token-accuracy": right / targets}

    def merits(self, payload: Tensor, batch: Sequence[MicroBatch]) -> Tensor:
        """See `TaskKind`."""
        raise NotImplementedError("long completions count more than short ones, so the metric is no mean over samples")

    def answers(self, payload: Tensor, batch: Sequence[MicroBatch]) -> list[Answer]:
        """See `TaskKind`. The model writes nothing; it is asked for each token of the right text."""
        right = [texts[0] for texts in target_texts(batch, self.model.tokenizer)]
        counts = payload.long().tolist()
        return [
            Answer(text, f"{hit} of {total} tokens right") for text, (hit, total) in zip(right, counts, strict=True)
        ]

    def _continuation(self, row: Row) -> Sample:
        """A prompt with its completion, or a whole document."""
        before, after = self._texts_of(row)
        sequence = continued(self.texts, before, after)
        end = [self.model.tokenizer.eos_token_id] if self.task.end else []
        ids, start = (*sequence.ids, *end), max(sequence.start, 1)
        if sequence.start == len(sequence) or start >= len(ids):
            raise UserError("task.completion: the text is empty; leave the row out (task.where)")
        return Sample(ids, ((start, len(ids)),))

    def _texts_of(self, row: Row) -> tuple[str, str]:
        """Prompt and completion. Rendered as one: only at its ends is space taken off."""
        text = render_row(self.task.prompt + SLOT + self.task.completion, row)
        if text.count(SLOT) != 1:
            raise UserError(f"task.completion: a text has the character {SLOT!r}, which is none; leave the row out")
        before, after = text.split(SLOT)
        return before, after

    def _warn_if_joined(self, row: Row) -> None:
        if not self.task.prompt or self.task.chat:
            return
        try:
            before, after = self._texts_of(row)
        except UserError:
            return  # said when samples are encoded
        if continued(self.texts, before, after).start < continued(self.texts, before.rstrip(" "), "").start:
            log.warning(
                "task.completion: its first token and the last one of the prompt are one: %r and %r; a space between "
                "them stands at the start of the completion",
                before[-10:].split(" ")[-1],
                after[:10].split(" ")[0],
            )

    def _all_windows(self, rows: Sequence[Row], split: str) -> EncodedRows[Sample]:
        """The windows of all documents of a split."""

        def finish(num_windows: int) -> None:
            if not num_windows:
                raise UserError(f"task.completion: the {split} split has no text of two tokens or more")
            log.info("%s split: %d documents are %d windows of text", split, len(rows), num_windows)

        return EncodedRows(rows, split, self._windows, finish)

    def _windows(self, row: Row) -> list[Sample]:
        """A whole document, cut. A window of one token has no target, and is left out."""
        window = self.task.window
        assert window is not None
        ids = self._document(row)
        parts = [ids[first : first + window] for first in range(0, len(ids), window)]
        return [Sample(part, ((1, len(part)),)) for part in parts if len(part) > 1]

    def _document(self, row: Row) -> tuple[int, ...]:
        sequence = continued(self.texts, "", render_row(self.task.completion, row))
        return (*sequence.ids, *([self.model.tokenizer.eos_token_id] if self.task.end else []))

    def _turns(self, row: Row) -> Sample:
        """Prompt and completion as turns of a conversation."""
        prompt, answer = self._texts_of(row)
        for name, text in (("prompt", prompt), ("completion", answer)):
            if not text.strip():
                raise UserError(f"task.{name}: the text is empty; leave the row out (task.where)")
        turns = [{"role": "user", "content": prompt.strip()}, {"role": ASSISTANT, "content": answer.strip()}]
        return self._encoded(turns, "task.chat")

    def _conversation(self, row: Row) -> Sample:
        assert self.task.messages is not None
        sample = self._encoded(lookup(row, self.task.messages, "task.messages"), "task.messages")
        if len(sample) > self.model.max_tokens:
            raise UserError(
                f"task.messages: the conversation has {len(sample)} tokens, but train.max_tokens, or else the model's "
                f"window, is {self.model.max_tokens}; leave such rows out"
            )
        return sample

    def _encoded(self, messages: Any, setting: str) -> Sample:
        """A conversation.

        Args:
            messages: its turns.
            setting: that asks for it, for messages.
        """
        ids, targets = encode_conversation(self.model.tokenizer, messages, setting)
        self.texts.check_known(ids)
        spans = _runs([place for place in targets if place > 0])
        if not spans:
            raise UserError(f"{setting}: the assistant's turns have no tokens; leave the row out")
        return Sample(tuple(ids), spans)


def _runs(places: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(start, stop) of runs of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for place in places:
        if runs and runs[-1][1] == place:
            runs[-1] = (runs[-1][0], place + 1)
        else:
            runs.append((place, place + 1))
    return tuple(runs)
