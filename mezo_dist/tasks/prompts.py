"""From rows to token sequences: render the template, tokenise, truncate the text and nothing but the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from mezo_dist.errors import UserError
from mezo_dist.tasks.load import Row
from mezo_dist.tasks.task import ANSWER, Task

Kind = Literal["causal", "masked", "classifier"]
_SLOT = "\N{OBJECT REPLACEMENT CHARACTER}"


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
    """Turns rows into samples, for one task, tokeniser and kind of model."""

    task: Task
    tokenizer: Any
    kind: Kind
    max_tokens: int
    """Longest sequence, special tokens included."""

    def encode(self, rows: Sequence[Row], split: str) -> list[Sample]:
        """Encode the rows of one split.

        Raises:
            UserError: a label is not in the task's list, a field is missing, or a prompt does not fit.
        """
        return [self._sample(row, f"{split} row {number}") for number, row in enumerate(rows)]

    def label_ids(self, row: Row) -> list[int]:
        """The token of each label word where the prompt of ``row`` ends (or has its mask).

        Raises:
            UserError: a label word is more than one token there, or two words share one.
        """
        found: dict[int, str] = {}
        for word in self.task.words:
            token = self._answer_token(row, word)
            if token in found:
                raise UserError(f"task.labels: {found[token]!r} and {word!r} are the same token; choose other words")
            found[token] = word
        return list(found)

    def _sample(self, row: Row, where: str) -> Sample:
        label = self._label(row, where)
        if self.kind == "classifier":
            texts = [_render(template, row, where) for template in self.task.plain]
            encoded = self.tokenizer(*texts, truncation=True, max_length=self.max_tokens)
            return Sample(tuple(encoded["input_ids"]), label, -1, tuple(encoded.get("token_type_ids", ())))
        ids = self._fitting_ids(row, where)
        position = len(ids) - 1 if self.kind == "causal" else self._mask_position(ids, where)
        return Sample(tuple(ids), label, position)

    def _label(self, row: Row, where: str) -> int:
        if self.task.label not in row:
            raise UserError(f"task.label: {where} has no field {self.task.label!r}, only {sorted(row)}")
        known = [str(label.value) for label in self.task.labels]
        value = str(row[self.task.label])
        if value not in known:
            raise UserError(f"task.labels: {where} has label {value!r}, the task knows {known}; add it or drop the row")
        return known.index(value)

    def _prompt(self, row: Row, where: str, word: str | None = None) -> str:
        """The prompt up to the answer (causal) or with the mask token (masked); with ``word`` filled in if given."""
        text = _render(self.task.prompt, {**row, ANSWER: _SLOT}, where)
        if text.count(_SLOT) != 1:
            raise UserError("task.prompt: {{ answer }} must occur exactly once")
        if self.kind == "masked":
            return text.replace(_SLOT, self.tokenizer.mask_token if word is None else word)
        before, after = text.split(_SLOT)
        if after.strip():
            raise UserError(f"task.prompt: {{{{ answer }}}} must come last for a causal model, not before {after!r}")
        return before.rstrip() if word is None else before + word

    def _fitting_ids(self, row: Row, where: str) -> list[int]:
        """Token ids of the prompt; the fields in ``task.truncate`` are shortened until it fits."""
        fields = {name: str(row[name]) for name in self.task.truncate if name in row}
        while True:
            ids: list[int] = self.tokenizer(self._prompt({**row, **fields}, where))["input_ids"]
            excess = len(ids) - self.max_tokens
            if excess <= 0:
                return ids
            name = max(fields, key=lambda n: len(fields[n]), default=None)
            if name is None or not fields[name]:
                raise UserError(
                    f"{where}: the prompt needs {len(ids)} tokens even without the text of "
                    f"{list(self.task.truncate)}, but train.max_tokens or the model's window is {self.max_tokens}"
                )
            fields[name] = self._shorten(fields[name], excess)

    def _shorten(self, text: str, excess: int) -> str:
        """``text`` without its last ``excess`` tokens (at least one character less)."""
        if not self.tokenizer.is_fast:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            return str(self.tokenizer.decode(ids[: max(0, len(ids) - excess)]))[: len(text) - 1]
        ends = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        keep = len(ends) - excess
        return text[: min(ends[keep - 1][1], len(text) - 1)] if keep > 0 else ""

    def _mask_position(self, ids: Sequence[int], where: str) -> int:
        places = [i for i, token in enumerate(ids) if token == self.tokenizer.mask_token_id]
        if len(places) != 1:
            raise UserError(f"{where}: {len(places)} mask tokens in the prompt, one is needed (is one in the text?)")
        return places[0]

    def _answer_token(self, row: Row, word: str) -> int:
        """The one token that ``word`` adds; found in context, since spaces belong to tokens in some vocabularies."""
        bare = {**row, **{name: "" for name in self.task.truncate if name in row}}  # fits whatever the window
        plain = self.tokenizer(self._prompt(bare, "prompt"))["input_ids"]
        filled = self.tokenizer(self._prompt(bare, "prompt", word))["input_ids"]
        if self.kind == "masked":
            place = self._mask_position(plain, "prompt")
            new, rest = filled[place : place + 1 + len(filled) - len(plain)], filled[:place] == plain[:place]
        else:
            new, rest = filled[len(plain) :], filled[: len(plain)] == plain
        if len(new) != 1 or not rest:
            pieces = self.tokenizer.convert_ids_to_tokens(new)
            raise UserError(
                f"task.labels: {word!r} is not one token after this prompt but {pieces}; choose a word that is one"
            )
        return int(new[0])


_environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False)


def _render(template: str, row: Mapping[str, Any], where: str) -> str:
    try:
        return _environment.from_string(template).render(row).strip()
    except jinja2.TemplateError as error:
        fields = sorted(name for name in row if name != ANSWER)
        raise UserError(f"task template {template!r}: {error} ({where} has the fields {fields})") from error
