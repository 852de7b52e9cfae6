"""From rows to token sequences: render the template, tokenise, truncate the text and nothing but the text."""

from __future__ import annotations

import logging
import reprlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mezo_dist.config.schema import ModelKind
from mezo_dist.config.task import ANSWER, Task
from mezo_dist.errors import UserError
from mezo_dist.tasks.rows import Row
from mezo_dist.tasks.templates import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
SILENT_S = 5.0
"""Encoding that takes longer than that says how far it is."""
LONG_TEXT = 50_000
"""Characters up to which a text is tokenised as a whole, however few of them the window takes."""
MARGIN_TOKENS = 64
"""Tokens that are cut off after the window: the last ones of a cut text may not be those of the whole."""


@dataclass(frozen=True)
class Sample:
    """One encoded sample."""

    ids: tuple[int, ...]
    """Token ids, special tokens included, no padding."""
    label: int
    """Class index."""
    position: int
    """Index into `ids` whose logits answer the prompt; -1 for a classifier."""
    types: tuple[int, ...] = ()
    """Token type ids, where the model has them."""


@dataclass(frozen=True)
class Encoder:
    """Turns rows into samples, for one task, tokenizer and kind of model."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    kind: ModelKind
    max_tokens: int
    """Longest sequence, special tokens included."""
    num_tokens: int | None = None
    """Tokens that the model knows; None if it does not say."""

    def encode(self, rows: Sequence[Row], split: str) -> list[Sample]:
        """Encode the rows of one split.

        Raises:
            UserError: a label is not in the task's list, a field is missing, or a prompt does not fit; says in which
                sample.
        """
        samples = []
        said_s = time.monotonic()
        for number, row in enumerate(rows):
            if time.monotonic() - said_s > SILENT_S:
                log.info("encoding the %s split: %d of %d samples are done", split, number, len(rows))
                said_s = time.monotonic()
            try:
                samples.append(self._sample(row))
            except UserError as error:
                raise UserError(f"{split} sample {number}, {reprlib.repr(dict(row))}: {error}") from error
            largest = max(samples[-1].ids)
            if self.num_tokens is not None and largest >= self.num_tokens:
                raise UserError(
                    f"{split} sample {number}: the tokenizer makes token {largest} of it, but the model knows "
                    f"{self.num_tokens} tokens: resize its embeddings (resize_token_embeddings)"
                )
        return samples

    def label_ids(self, row: Row) -> list[int]:
        """The token of each label word where the prompt of ``row`` ends (or has its mask).

        Raises:
            UserError: a label word is not one known token there, or two words share one.
        """
        word_of: dict[int, str] = {}
        ids, row = self._fit(row)
        for word in self.task.words:
            token = self._answer_token(ids, self._tokenize(self._prompt(row, word)), word)
            if token in word_of:
                raise UserError(f"task.labels: {word_of[token]!r} and {word!r} are the same token; choose other words")
            word_of[token] = word
        return list(word_of)

    def _sample(self, row: Row) -> Sample:
        label = self._label(row)
        if self.kind == "classifier":
            texts = [self._cut(_render(template, row)) for template in self.task.plain]
            encoded = self.tokenizer(*texts, truncation=True, max_length=self.max_tokens)
            if not encoded["input_ids"]:
                raise UserError("task.plain: the text is empty; leave the row out")
            return Sample(tuple(encoded["input_ids"]), label, -1, tuple(encoded.get("token_type_ids", ())))
        ids, _ = self._fit(row)
        if not ids:
            raise UserError("task.prompt: nothing stands before {{ answer }}; leave the row out")
        return Sample(tuple(ids), label, len(ids) - 1 if self.kind == "causal" else self._mask_position(ids))

    def _label(self, row: Row) -> int:
        if self.task.label not in row:
            raise UserError(f"task.label: there is no field {self.task.label!r}, only {sorted(row)}")
        known = [str(label.value) for label in self.task.labels]
        value = str(row[self.task.label])
        if value not in known:
            raise UserError(f"task.labels: the label is {value!r}, the task knows {known}; add it or leave the row out")
        return known.index(value)

    def _prompt(self, row: Row, word: str | None = None) -> str:
        """The prompt up to the answer (causal) or with the mask token (masked); with ``word`` filled in if given."""
        text = _render(self.task.prompt, {**row, ANSWER: _SLOT})
        if text.count(_SLOT) != 1:
            raise UserError("task.prompt: {{ answer }} must occur exactly once")
        before, after = text.split(_SLOT)
        if self.kind == "causal" and after.strip():
            raise UserError(f"task.prompt: {{{{ answer }}}} must come last for a causal model, not before {after!r}")
        if word is not None:
            return before + word + after
        # A space before an answer is part of the answer's token, or of none; a new line is a token of the prompt's.
        return before.rstrip(" ") + (self.tokenizer.mask_token + after if self.kind == "masked" else "")

    def _tokenize(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]  # not verbose: too long texts are our matter
        if self.kind == "causal":  # an end that the tokenizer appends would stand between prompt and answer
            while ids and ids[-1] in (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id):
                ids = ids[:-1]
        return ids

    def _cut(self, text: str) -> str:
        """``text``, but of a very long one no more than what surely fills the window: tokenising it takes seconds."""
        length = max(LONG_TEXT, 16 * self.max_tokens)
        while length < len(text):
            if len(self._tokenize(text[:length])) > self.max_tokens + MARGIN_TOKENS:
                return text[:length]
            length *= 2
        return text

    def _fit(self, row: Row) -> tuple[list[int], Row]:
        """Token ids of the prompt, and the row with the fields in ``task.truncate`` shortened until the prompt fits."""
        fields = {name: self._cut(str(row[name])) for name in self.task.truncate if row.get(name) is not None}
        while True:
            ids = self._tokenize(self._prompt({**row, **fields}))
            excess = len(ids) - self.max_tokens
            if excess <= 0:
                return ids, {**row, **fields}
            name = max(fields, key=lambda n: len(fields[n]), default=None)
            if name is None or not fields[name]:
                raise UserError(
                    f"task.prompt: it needs {len(ids)} tokens even without the text of {list(self.task.truncate)} "
                    f"(task.truncate), but train.max_tokens, or else the model's window, is {self.max_tokens}"
                )
            fields[name] = self._shorten(fields[name], excess)

    def _shorten(self, text: str, excess: int) -> str:
        """``text`` without its last ``excess`` tokens (at least one character less)."""
        if not self.tokenizer.is_fast:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return str(self.tokenizer.decode(ids[: max(0, len(ids) - excess)]))[: len(text) - 1].rstrip()
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [end for _, end in encoded["offset_mapping"]]
        keep = len(ends) - excess
        # Without space at its end: it could join what follows into another token.
        return text[: min(ends[keep - 1], len(text) - 1)].rstrip() if keep > 0 else ""

    def _mask_position(self, ids: Sequence[int]) -> int:
        places = [i for i, token in enumerate(ids) if token == self.tokenizer.mask_token_id]
        if len(places) != 1:
            raise UserError(f"task.prompt: {len(places)} mask tokens where one is needed (is one in the text?)")
        return places[0]

    def _answer_token(self, plain: list[int], filled: list[int], word: str) -> int:
        """The one token that ``word`` adds in its context: in some vocabularies a space belongs to the token."""
        if self.kind == "masked":
            place = self._mask_position(plain)
            new, rest = filled[place : place + 1 + len(filled) - len(plain)], filled[:place] == plain[:place]
        else:
            new, rest = filled[len(plain) :], filled[: len(plain)] == plain
        pieces = self.tokenizer.convert_ids_to_tokens(new)
        if len(new) != 1 or not rest or new[0] == self.tokenizer.unk_token_id:
            joined = "" if new and rest else ", or put a space before {{ answer }}"
            raise UserError(
                f"task.labels: {word!r} is not one token after this prompt but {pieces or 'a part of the last one'}; "
                f"choose a word that is one{joined}"
            )
        return int(new[0])


_SLOT = "\ufdd0"  # what stands for the answer until the prompt is known: a noncharacter, so no text has it


def _render(template: str, row: Row) -> str:
    return render(template, row, sorted(name for name in row if name != ANSWER))
