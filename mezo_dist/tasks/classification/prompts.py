"""Classification: rows become prompts in which a label word is missing, and prompts become token sequences."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mezo_dist.config.kinds.classification import ClassificationTask
from mezo_dist.config.schema import ModelKind
from mezo_dist.config.task import ANSWER
from mezo_dist.config.values import ClassIndex, names_of
from mezo_dist.errors import UserError
from mezo_dist.tasks.continuation import shared
from mezo_dist.tasks.encoding import EncodedRows, encode_rows
from mezo_dist.tasks.fields import Row, lookup, shown
from mezo_dist.tasks.pieces import MOST_ENDS, Ends
from mezo_dist.tasks.text import TextEncoder, render_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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

    @property
    def num_tokens(self) -> int:
        """Length of `ids`."""
        return len(self.ids)

    @property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """See `mezo_dist.tasks.batches.Sample`."""
        return (self.ids,)


@dataclass(frozen=True)
class _Prompt:
    """A prompt as the model reads it."""

    ids: tuple[int, ...]
    answers: tuple[int, ...]
    """The token of each label word, where the answer goes."""
    place: int
    """Index of that token in the sequence of the filled-in prompt."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Encoder:
    """Turns rows into samples, for one task, tokenizer and kind of model."""

    task: ClassificationTask
    tokenizer: PreTrainedTokenizerBase
    kind: ModelKind
    max_tokens: int
    """Longest sequence, special tokens included."""
    num_tokens: int | None = None
    """Tokens that the model knows; None if it does not say."""

    def encode(self, rows: Sequence[Row], split: str) -> EncodedRows[Sample]:
        """The samples of one split.

        Raises:
            UserError: a label is not in the task's list, a field is missing, a prompt does not fit, or label words are
                other tokens than in the first row; says in which sample.
        """
        for row in rows[:1]:
            lookup(row, self.task.label, "task.label")  # no row has it, or all have

        def label_of(row: Row) -> int:
            if lookup(row, self.task.label, "task.label") is None:
                raise self._no_label(rows, split)
            return self.label(row)

        if self.kind == "classifier":
            return encode_rows(rows, split, lambda row: self._plain_sample(row, label_of(row)))
        words = self.task.words[:2]
        (first,) = encode_rows(rows[:1], split, lambda row: self._fit(row, words).answers)

        def sample(row: Row) -> Sample:
            label, prompt = label_of(row), self._fit(row, words)
            if prompt.answers != first:
                tokens, before = (self.tokenizer.convert_ids_to_tokens(list(ids)) for ids in (prompt.answers, first))
                raise UserError(
                    f"task.prompt: the label words are {tokens} here, but {before} in the first sample; put a space or "
                    "a new line before {{ answer }}"
                )
            if not prompt.ids:
                raise UserError("task.prompt: nothing stands before {{ answer }}; leave the row out (task.where)")
            return Sample(prompt.ids, label, prompt.place - 1 if self.kind == "causal" else prompt.place)

        return encode_rows(rows, split, sample)

    def label_ids(self, row: Row) -> list[int]:
        """The token of each label word where the prompt of ``row`` ends (or has its mask).

        Raises:
            UserError: a label word is not one known token there, or two words share one.
        """
        _, row = self._texts.fit(row, lambda row: self._prompt(row, self.task.words[:2]))
        return list(self._prompt(row, self.task.words).answers)

    @functools.cached_property
    def _texts(self) -> TextEncoder:
        task = self.task
        return TextEncoder(self.tokenizer, self.max_tokens, task.truncate, task.truncate_side, self.num_tokens)

    @functools.cached_property
    def _unknown(self) -> int | None:
        unknown: int | None = self.tokenizer.unk_token_id
        return unknown

    def _fit(self, row: Row, words: Sequence[str]) -> _Prompt:
        return self._texts.fit(row, lambda row: self._prompt(row, words))[0]

    # Labels

    def _no_label(self, rows: Sequence[Row], split: str) -> UserError:
        """What to do about rows without a label, and how many there are: they are counted only if there is one."""
        nulls = sum(lookup(row, self.task.label, "task.label") is None for row in rows)
        return UserError(
            f"task.label: the field {self.task.label!r} is null in {nulls} of the {len(rows)} samples of the "
            f"{split} split; leave these rows out with task.where: {{drop: {{{self.task.label}: [null]}}}}"
        )

    @functools.cached_property
    def _class_of(self) -> dict[str, int]:
        """Name of a label -> the first class that goes by it."""
        names = [(name, index) for index, label in enumerate(self.task.labels) for name in names_of(label.value)]
        return dict(reversed(names))

    def label(self, row: Row) -> int:
        """The class of a row. Raises UserError if the task does not know its label."""
        value = lookup(row, self.task.label, "task.label")
        for name in names_of(value):
            if name in self._class_of:
                return self._class_of[name]
        dropped = value.name if isinstance(value, ClassIndex) else value
        raise UserError(
            f"task.labels: the label is {shown([value])[1:-1]}, the task knows "
            f"{[str(label.value) for label in self.task.labels]}; add it, or leave such rows out with task.where: "
            f"{{drop: {{{self.task.label}: [{dropped!s:.100}]}}}}"
        )

    # Prompts

    def _plain_sample(self, row: Row, label: int) -> Sample:
        ids, types = self._texts.plain(self.task.plain, row)
        return Sample(ids, label, -1, types)

    def _parts(self, row: Row) -> tuple[str, str]:
        """The prompt before and after the answer."""
        text = render_row(self.task.prompt, row, **{ANSWER: _SLOT})
        parts = text.split(_SLOT)
        if len(parts) != 2:
            raise UserError("task.prompt: {{ answer }} must occur exactly once")
        before, after = parts
        if self.kind == "causal" and after.strip():
            raise UserError(
                f"task.prompt: {{{{ answer }}}} must come last for a causal model, not before {after!r:.100}"
            )
        # One space before a word belongs to its token in many vocabularies, and more are tokens of their own.
        space = before.endswith(" ") or (self.kind == "masked" and not before)
        return before.rstrip(" ") + " " * space, after

    def _prompt(self, row: Row, words: Sequence[str]) -> _Prompt:
        """The prompt, read off the texts with each of ``words`` filled in: they differ in the token of the word.

        What all of them share before that token belongs to the prompt, be it a new line or a space of its own. To the
        first word of a masked prompt belongs the space that words have in the middle of a text (as in LM-BFF).
        """
        before, after = self._parts(row)
        start, ends = self._texts.tokenize_endings(before, [word + after for word in words])
        known = self._answers.get(ends)
        place, tokens = self._read_off(words, ends, before) if known is None else known
        prompt = (*start, *ends[0][:place])
        if self.kind == "masked":
            mask = self.tokenizer.mask_token_id
            prompt = (*prompt, mask, *ends[0][place + 1 :])
            if prompt.count(mask) != 1:
                raise UserError(
                    f"task.prompt: {prompt.count(mask)} mask tokens where one is needed (is one in the text?)"
                )
        return _Prompt(prompt, tokens, len(start) + place)

    def _read_off(self, words: Sequence[str], ends: Ends, before: str) -> tuple[int, tuple[int, ...]]:
        """Where the token of the word is in the ends of texts, and that of each word.

        Args:
            words: of the labels, of which one is in each text.
            ends: tokens of the texts, or their ends.
            before: the text before the words.
        """
        place = _shared(ends)
        if len(ends) > 2 or place == len(ends[0]):
            _check_differ(words, ends)
        # After the answer a causal prompt has only what the tokenizer appends to every text.
        common = tuple(self._texts.of_nothing) if self.kind == "causal" else ends[0]
        after_answer = min(_shared_at_end([common, *ends]), min(map(len, ends)) - place) if common else 0
        answers = [ids[place : len(ids) - after_answer] for ids in ends]
        for word, tokens in zip(words, answers, strict=True):
            if len(tokens) != 1 or tokens[0] == self._unknown:
                raise UserError(self._not_one_token(word, tokens, before))
        if len(self._answers) >= MOST_ENDS:
            self._answers.clear()
        self._answers[ends] = place, tuple([tokens[0] for tokens in answers])
        return self._answers[ends]

    @functools.cached_property
    def _answers(self) -> dict[Ends, tuple[int, tuple[int, ...]]]:
        """What `_read_off` read off the ends of texts, most of which are the same ones."""
        return {}

    def _not_one_token(self, word: str, tokens: Sequence[int], before: str) -> str:
        """The message for a label word that is not one token.

        Args:
            word: the label word.
            tokens: what it becomes.
            before: the text before it.
        """
        pieces = self.tokenizer.convert_ids_to_tokens(list(tokens))
        hint = "" if not before or before[-1:].isspace() else ", or put a space before {{ answer }}"
        return (
            f"task.labels: {word!r} is not one token after this prompt but {pieces or 'a part of the last one'}; "
            f"choose a word that is one{hint}"
        )


_SLOT = "\ufdd0"  # what stands for the answer until the prompt is known: a noncharacter, so no text has it


def _check_differ(words: Sequence[str], filled: Ends) -> None:
    """Raises UserError where two words are the same tokens.

    Args:
        words: of the labels.
        filled: token ids of a prompt with each of them, or their ends.
    """
    for number, ids in enumerate(filled):
        if ids in filled[:number]:
            other = words[filled.index(ids)]
            raise UserError(f"task.labels: {other!r} and {words[number]!r} are the same token; choose other words")


def _shared(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens the sequences have in common at their start."""
    first, *others = sequences
    length = len(first)
    for other in others:
        length = min(length, shared(first, other))
    return length


def _shared_at_end(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens the sequences have in common at their end."""
    last = sequences[0][-1:]
    for ids in sequences:
        if ids[-1:] != last:
            return 0
    return _shared([ids[::-1] for ids in sequences])
