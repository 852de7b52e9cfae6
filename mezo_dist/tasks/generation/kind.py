"""`Generation`: a `mezo_dist.tasks.kind.TaskKind`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from mezo_dist.config.kinds.generation import GenerationTask
from mezo_dist.directions.seeds import derive_seed
from mezo_dist.errors import UserError
from mezo_dist.tasks.batches import MicroBatch, facts_by_slot, model_inputs
from mezo_dist.tasks.chat import apply_chat_template
from mezo_dist.tasks.continuation import SLOT, check_causal, continued
from mezo_dist.tasks.encoding import EncodedRows, encode_rows
from mezo_dist.tasks.fields import Row, lookup
from mezo_dist.tasks.generation.decode import Decoding, decode
from mezo_dist.tasks.generation.figures import MEANS, bleu, of_text
from mezo_dist.tasks.kind import Answer, Bench, Forward, Scores, TextModel, text_encoder
from mezo_dist.tasks.scoring import TokenScores, device_of, token_targets
from mezo_dist.tasks.text import TextEncoder, render_row


@dataclass(frozen=True)
class Sample:
    """One encoded sample."""

    prompt: tuple[int, ...]
    """Token ids of what the model is given."""
    ids: tuple[int, ...]
    """Token ids of prompt and completion; of the prompt, where there is no completion."""
    start: int
    """Index in `ids` of the first token that the loss looks at."""
    room: int
    """Tokens that prompt and written text take, at most."""
    references: tuple[str, ...]
    """The right texts."""
    row: str
    """The row, as JSON, for rewards."""

    @property
    def num_tokens(self) -> int:
        """Length of `ids`."""
        return len(self.ids)

    @property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """See `mezo_dist.tasks.batches.Sample`."""
        return (self.ids,)

    def __len__(self) -> int:
        return max(len(self.ids), self.room)


@final
@dataclass(frozen=True)
class Generation:
    """A text that the model writes. Payload: its tokens, each + 1, filled up with zeros."""

    task: GenerationTask
    model: TextModel
    encoder: TextEncoder
    sample: ClassVar[type[Sample]] = Sample
    payload_is_smooth: ClassVar[bool] = False

    @staticmethod
    def of(task: GenerationTask, model: TextModel, _: Row) -> Generation:
        """See `mezo_dist.tasks.kinds`.

        Raises:
            UserError: the model is not a causal one, or its tokenizer lacks a chat template that the task needs.
        """
        check_causal(model, task.kind)
        if task.chat and not getattr(model.tokenizer, "chat_template", None):
            raise UserError("task.chat: the tokenizer has no chat template; leave it out, or use an instruction model")
        return Generation(task, model, text_encoder(task, model))

    def encode(self, rows: Sequence[Row], split: str) -> EncodedRows[Sample]:
        """See `TaskKind`."""
        return encode_rows(rows, split, lambda row: self.encoder.fit(row, lambda some: self._sample(some, row))[0])

    def collate(self, samples: Sequence[Sample], slots: tuple[int, ...], pad_id: int) -> MicroBatch:
        """See `TaskKind`. ``prompt`` and ``prompt_mask`` are int64 [n, length], padded on the left."""
        rows = [sample.ids for sample in samples]
        longest = max(len(sample.prompt) for sample in samples)
        gaps = [longest - len(sample.prompt) for sample in samples]
        targets = token_targets(rows, [list(range(sample.start, len(sample.ids))) for sample in samples])
        prompts = [[*[pad_id] * gap, *sample.prompt] for gap, sample in zip(gaps, samples, strict=True)]
        targets["prompt"] = torch.tensor(prompts)
        targets["prompt_mask"] = torch.tensor([[0] * gap + [1] * (longest - gap) for gap in gaps])
        facts = tuple((sample.references, sample.row) for sample in samples)
        return MicroBatch(slots, model_inputs(rows, pad_id), targets, self.task.max_new_tokens, facts=facts)

    def forward(self, bench: Bench) -> Forward:
        """See `TaskKind`: the loss of the completions; of the prompts, where there are none."""
        token_scores = TokenScores(bench)

        def score(model: nn.Module, batch: MicroBatch) -> Scores:
            chosen, _ = token_scores(model, batch)
            weight = batch.targets["is_target"].to(chosen.device).sum(dim=1)
            return Scores(-chosen.sum(dim=1), weight, torch.zeros(len(chosen), 1, device=chosen.device))

        return score

    def writer(self, bench: Bench) -> Forward:
        """See `TaskKind`."""
        tokenizer, task = self.model.tokenizer, self.task
        ends = {tokenizer.eos_token_id, *_generation_ends(bench.model)} - {None}
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        decoding = Decoding(task.max_new_tokens, tuple(sorted(ends)), pad_id, task.temperature, task.top_k)

        def write(model: nn.Module, batch: MicroBatch) -> Scores:
            device = device_of(model)
            inputs = {"input_ids": batch.targets["prompt"], "attention_mask": batch.targets["prompt_mask"]}
            seeds = [derive_seed(batch.seed, "text", slot) for slot in batch.slots]
            tokens = decode(
                model, {k: v.to(device) for k, v in inputs.items()}, decoding, seeds=seeds, ended=self._is_stopped
            )
            payload = torch.zeros(len(tokens), task.max_new_tokens)
            for row, some in zip(payload, tokens, strict=True):
                row[: len(some)] = torch.tensor(some) + 1
            nothing = torch.zeros(len(tokens))
            return Scores(nothing, nothing.long(), payload)

        return write

    def texts(self, payload: Tensor) -> list[str]:
        """What was written.

        Args:
            payload: fp32 [n, columns].
        """
        return [self._text([int(token) - 1 for token in row if token > 0]) for row in payload]

    def class_tokens(self, row: Row) -> list[int]:
        """See `TaskKind`."""
        return []

    def summarise(self, loss: float, payload: Tensor, batch: Sequence[MicroBatch]) -> Mapping[str, float]:
        """See `TaskKind`."""
        references = [facts[0] for facts in facts_by_slot(batch)]
        if not all(references):
            return {}
        texts = self.texts(payload)
        figures = {}
        for metric in MEANS:
            values = [of_text(metric, text, some) for text, some in zip(texts, references, strict=True)]
            figures[str(metric)] = sum(values) / len(values)
        return {**figures, "bleu": bleu(texts, references)}

    def merits(self, payload: Tensor, batch: Sequence[MicroBatch]) -> Tensor:
        """See `TaskKind`."""
        pairs = zip(self.texts(payload), facts_by_slot(batch), strict=True)
        return torch.tensor([of_text(self.task.metric, text, facts[0]) for text, facts in pairs], dtype=torch.float64)

    def answers(self, payload: Tensor, batch: Sequence[MicroBatch]) -> list[Answer]:
        """See `TaskKind`."""
        pairs = zip(self.texts(payload), facts_by_slot(batch), strict=True)
        return [Answer(facts[0][0] if facts[0] else "", text) for text, facts in pairs]

    def _text(self, tokens: Sequence[int]) -> str:
        text = self._decoded(tokens)
        ends = [text.index(stop) for stop in self.task.stop if stop in text]
        return text[: min(ends, default=len(text))].strip()

    def _is_stopped(self, tokens: Sequence[int]) -> bool:
        if not self.task.stop:  # decoding every text at every token takes time
            return False
        text = self._decoded(tokens)
        return any(stop in text for stop in self.task.stop)

    def _decoded(self, tokens: Sequence[int]) -> str:
        return str(self.model.tokenizer.decode(tokens, skip_special_tokens=True))

    def _sample(self, row: Row, whole_row: Row) -> Sample:
        text = render_row(self.task.prompt + SLOT + self.task.completion, row)
        if text.count(SLOT) != 1:
            raise UserError(f"task.prompt: a text has the character {SLOT!r}, which is none; leave the row out")
        before, after = text.split(SLOT)
        if not before.strip():
            raise UserError("task.prompt: the text is empty; leave the row out (task.where)")
        prompt, ids, start = self._chat(before, after) if self.task.chat else self._plain(before, after)
        end = self.model.tokenizer.eos_token_id
        if after.strip() and not self.task.end and start < len(ids) and end is not None:
            ids = (*ids, end)
        return Sample(
            prompt,
            ids,
            start,
            len(prompt) + self.task.max_new_tokens,
            self._references(whole_row, after),
            json.dumps(whole_row, default=str),
        )

    def _plain(self, before: str, after: str) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        prompt = continued(self.encoder, before.rstrip(" "), "").ids
        if not after.strip():
            return prompt, self._with_target(prompt), 1
        both = continued(self.encoder, before, after + self.task.end)
        return prompt, both.ids, max(1, both.start)

    def _with_target(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        """A prompt without completion, whose own loss stands in. One token alone predicts nothing: it gets an end."""
        end = self.model.tokenizer.eos_token_id
        return prompt if len(prompt) > 1 else (*prompt, prompt[0] if end is None else end)

    def _chat(self, before: str, after: str) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        tokenizer = self.model.tokenizer
        messages = [{"role": "user", "content": before}]
        text = apply_chat_template(tokenizer, messages, "task.chat", add_generation_prompt=True, tokenize=False)
        prompt = tuple(tokenizer(str(text), add_special_tokens=False, verbose=False)["input_ids"])
        if not prompt:
            raise UserError("task.chat: the chat template makes nothing of the prompt")
        self.encoder.check_known(prompt)
        if not after.strip():
            return prompt, self._with_target(prompt), 1
        completion = tokenizer(after.strip() + self.task.end, add_special_tokens=False, verbose=False)["input_ids"]
        self.encoder.check_known(completion)
        return prompt, (*prompt, *completion), len(prompt)

    def _references(self, row: Row, after: str) -> tuple[str, ...]:
        if self.task.references is None:
            return (after.strip(),) if after.strip() else ()
        value = lookup(row, self.task.references, "task.references")
        texts = tuple(str(one) for one in (value if isinstance(value, list | tuple) else [value]) if one is not None)
        if not texts:
            raise UserError(f"task.references: the field {self.task.references!r} holds no text (task.where)")
        return texts


def _generation_ends(model: nn.Module) -> list[int]:
    """End-of-text tokens that a model names beside its tokenizer's."""
    ends: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [end for end in (ends if isinstance(ends, list | tuple) else [ends]) if isinstance(end, int)]
