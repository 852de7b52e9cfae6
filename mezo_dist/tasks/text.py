"""Texts: from the fields of a row, through a template, to tokens that fit the model's window.

This is what the kinds of tasks have in common: rendering, tokenising, and shortening the fields that ``task.truncate``
names (and nothing else) until what a kind makes of them fits.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, TypeVar

from mezo_dist.config.task import TruncateSide
from mezo_dist.errors import UserError
from mezo_dist.tasks.encoding import Texts, ask, is_among_rows
from mezo_dist.tasks.fields import Row, field_names, listed, lookup, replaced
from mezo_dist.tasks.pieces import Ends, Pieces
from mezo_dist.tasks.templates import render

log = logging.getLogger(__name__)
LONG_TEXT = 50_000
"""Characters up to which a text is tokenised as a whole, however few of them the window takes."""
MARGIN_TOKENS = 64
"""Tokens that are cut off beyond the window: those next to the cut may not be those of the whole text."""
LEAST_AT_ONCE, CHECKED = 4, 128
"""Texts from which on they are tokenised together; and every so manieth is tokenised by itself, too."""

S = TypeVar("S", bound=Sized)


def render_row(template: str, row: Row, **values: Any) -> str:
    """``template`` with the fields of ``row`` filled in, and ``values`` before them; without space around it.

    A field that a value hides, or whose name is none in jinja2, is ``row.answer`` or ``row['a name']``.
    """
    return render(template, row, values)


@dataclass(frozen=True)
class TextEncoder:
    """Tokenises texts for one model, and shortens fields until what is made of them fits its window."""

    tokenizer: Any
    max_tokens: int
    """Longest sequence, special tokens included."""
    truncate: tuple[str, ...] | None
    """Fields that may be shortened; None: ``text``, if there is such a field."""
    side: TruncateSide = "right"
    """The end of a field that is cut off."""
    num_tokens: int | None = None
    """Tokens that the model knows; None if it does not say."""

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text`` with the tokenizer's special tokens, however long.

        Raises:
            UserError: the model does not know one of them.
        """
        (ids,) = self.tokenize_all([text])
        return ids

    def tokenize_all(self, texts: Sequence[str]) -> list[list[int]]:
        """See `tokenize`; of several texts, in one go."""
        pieces = self._pieces if is_among_rows() else None
        if pieces is not None and pieces.is_of_use:
            tokens = [pieces.tokenised(text) for text in texts]
            if self._are_known(pieces):
                return tokens
        else:
            tokens = ask(self._ids, [(text,) for text in texts])
        for ids in tokens:
            self.check_known(ids)
        return tokens

    def tokenize_endings(self, before: str, endings: Sequence[str]) -> tuple[list[int], Ends]:
        """See `tokenize`; of ``before`` with each of several endings after it.

        Args:
            before: may be long.
            endings: one or more.

        Returns:
            Tokens that all of these texts begin with, and what follows them in each (which may begin alike, too).
        """
        pieces = self._pieces if is_among_rows() else None
        if pieces is None or not pieces.is_of_use:
            return [], tuple(map(tuple, self.tokenize_all([before + ending for ending in endings])))
        start, ends = pieces.with_endings(before, endings)
        if not self._are_known(pieces):
            for end in ends:
                self.check_known([*start, *end])
        return start, ends

    def _are_known(self, pieces: Pieces) -> bool:
        """All tokens that came out so far are ones that the model knows."""
        return self.num_tokens is None or pieces.largest < self.num_tokens

    @functools.cached_property
    def _pieces(self) -> Pieces | None:
        return Pieces(self.tokenizer, lambda texts: self._ids([(text,) for text in texts])) if self.is_plain else None

    @functools.cached_property
    def of_nothing(self) -> list[int]:
        """Token ids of an empty text: what the tokenizer puts around every text."""
        return list(self.tokenizer("", verbose=False)["input_ids"])

    def check_known(self, ids: Sequence[int]) -> None:
        """Raises UserError for a token that the model does not know."""
        largest = max(ids, default=0)
        if self.num_tokens is not None and largest >= self.num_tokens:
            raise UserError(
                f"the tokenizer makes token {largest} of it, but the model knows {self.num_tokens} tokens: resize its "
                "embeddings (resize_token_embeddings)"
            )

    def limit(self, text: str) -> str:
        """``text``, but of a very long one no more than what surely fills the window: tokenising it takes seconds."""
        length = max(LONG_TEXT, 16 * self.max_tokens)
        while length < len(text):
            part = text[:length] if self.side == "right" else text[-length:]
            if len(self.tokenizer(part, verbose=False)["input_ids"]) > self.max_tokens + MARGIN_TOKENS:
                return part
            length *= 2
        return text

    def fit(self, row: Row, encode: Callable[[Row], S]) -> tuple[S, Row]:
        """``encode(row)`` with the fields in ``truncate`` shortened, the longest first, until it fits the window.

        Args:
            row: by field.
            encode: what is made of a row. Its ``len`` is the length in tokens of the longest sequence in it.

        Returns:
            What ``encode`` made of the shortened row, and that row.

        Raises:
            UserError: it does not fit even without the text of these fields; or there is no such field, or no text in
                it, which is said whether anything is too long or not.
        """
        texts = self._truncatable(row)
        for name, text in texts.items():
            if len(text) > LONG_TEXT:
                texts[name] = self.limit(text)
            if texts[name] is not lookup(row, name, "task.truncate"):
                row = replaced(row, name, texts[name])
        while True:
            encoded = encode(row)
            excess = len(encoded) - self.max_tokens
            if excess <= 0:
                return encoded, row
            name = max(texts, key=lambda n: len(texts[n]), default="")
            if not texts.get(name):
                raise UserError(
                    f"task.prompt: it needs {len(encoded)} tokens even without the text of {list(texts)} "
                    f"(task.truncate), but train.max_tokens, or else the model's window, is {self.max_tokens}"
                )
            texts[name] = self.shorten(texts[name], excess)
            row = replaced(row, name, texts[name])

    def plain(self, templates: Sequence[str], row: Row) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids and token type ids (empty where there are none) of a text or a pair without prompt.

        Raises:
            UserError: the text is empty.
        """
        self.fit(row, lambda _: ())  # nothing is shortened, but the fields in task.truncate are checked
        encoded = self.truncated(*(self.limit(render_row(template, row)) for template in templates))
        if not encoded["input_ids"]:
            raise UserError("task.plain: the text is empty; leave the row out (task.where)")
        return tuple(encoded["input_ids"]), tuple(encoded.get("token_type_ids", ()))

    def truncated(self, *texts: str) -> Any:
        """The tokenizer's encoding of one text or a pair, cut by the tokenizer (of a pair, the longer one first)."""
        # For one pair whose second text is empty, a fast tokenizer takes it for a text; among several, for a pair.
        (encoded,) = ask(self._cut, [texts if all(texts[1:]) or not self.tokenizer.is_fast else texts[:1]])
        self.check_known(encoded["input_ids"])
        return encoded

    def _ids(self, texts: Sequence[Texts]) -> list[list[int]]:
        """Token ids of each of several texts.

        A fast tokenizer is asked past transformers' Python code, which takes as long again. What that code would have
        made of every `CHECKED`th text is compared; it also leaves the tokenizer as it has to be (nothing is cut).
        """
        if len(texts) < LEAST_AT_ONCE or not self.is_plain:
            # Not verbose: too long texts are our matter.
            return [self.tokenizer(text, verbose=False)["input_ids"] for (text,) in texts]
        checked = [self.tokenizer(text, verbose=False)["input_ids"] for (text,) in texts[::CHECKED]]
        ids = [one.ids for one in self.tokenizer.backend_tokenizer.encode_batch_fast([text for (text,) in texts])]
        if ids[::CHECKED] != checked:
            raise RuntimeError(f"{type(self.tokenizer).__name__} makes other tokens of a text than its backend does")
        return ids

    @functools.cached_property
    def is_plain(self) -> bool:
        """A call of the tokenizer is one of its backend, in Rust, and no code of a class of its own stands before."""
        from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

        if not isinstance(self.tokenizer, PreTrainedTokenizerFast):
            return False
        known = {"__call__": PreTrainedTokenizerBase, "_encode_plus": PreTrainedTokenizerFast}
        is_plain = all(getattr(type(self.tokenizer), name) is getattr(of, name, None) for name, of in known.items())
        if not is_plain:
            log.info("texts are tokenised one by one: %s has code of its own", type(self.tokenizer).__name__)
        return is_plain

    def _cut(self, texts: Sequence[Texts]) -> list[dict[str, list[int]]]:
        """See `truncated`; of several texts, or of several pairs."""
        usual, self.tokenizer.truncation_side = self.tokenizer.truncation_side, self.side
        options = {"truncation": True, "max_length": self.max_tokens}
        try:
            if not self.tokenizer.is_fast or len(texts) == 1:
                return [self.tokenizer(*one, **options) for one in texts]
            encoded = self.tokenizer(*map(list, zip(*texts, strict=True)), **options)
        finally:
            self.tokenizer.truncation_side = usual  # it is written down with the tokenizer
        return [{name: values[place] for name, values in encoded.items()} for place in range(len(texts))]

    def shorten(self, text: str, excess: int) -> str:
        """``text`` without ``excess`` tokens at its end, or at its start (at least one character less)."""
        if not self.tokenizer.is_fast:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if self.side == "left":
                kept = str(self.tokenizer.decode(ids[excess:]))
                return kept[max(0, len(kept) - len(text) + 1) :].lstrip()
            return str(self.tokenizer.decode(ids[: max(0, len(ids) - excess)]))[: len(text) - 1].rstrip()
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = encoded["offset_mapping"]
        if excess >= len(spans):
            return ""
        # Without space where it was cut: it could join what stands there into another token.
        if self.side == "left":
            return text[max(spans[excess][0], 1) :].lstrip()
        return text[: min(spans[-excess - 1][1], len(text) - 1)].rstrip()

    def _truncatable(self, row: Row) -> dict[str, str]:
        """The texts of the row that may be shortened, by field."""
        fields = [name for name in ("text",) if name in row] if self.truncate is None else self.truncate
        texts = {}
        for name in fields:
            value = lookup(row, name, "task.truncate")
            if type(value) is str:  # as nearly always
                texts[name] = value
                continue
            if isinstance(value, Mapping | list):
                inside = [field for field in field_names(row) if field.startswith(f"{name}.")]
                hint = f"; name a text in it: {listed(inside)}" if inside else ""
                raise UserError(f"task.truncate: the field {name!r} is no text but a {type(value).__name__}{hint}")
            if value is not None:
                texts[name] = str(value)
        return texts
