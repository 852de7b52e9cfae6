"""Texts that continue a prompt, as tokens: which tokens are the prompt's, and which are to be predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mezo_dist.config.task import ANSWER
from mezo_dist.errors import UserError
from mezo_dist.tasks.fields import Row
from mezo_dist.tasks.kind import TextModel
from mezo_dist.tasks.text import TextEncoder, render_row

SLOT = "\ufdd0"
"""What stands between a prompt and what continues it while both are rendered: a noncharacter, so no text has it."""


@dataclass(frozen=True)
class Continuation:
    """A prompt and what continues it."""

    ids: tuple[int, ...]
    """Token ids of both."""
    start: int
    """Index of the first token that is not the prompt's."""

    def __len__(self) -> int:
        return len(self.ids)


def before_answer(template: str, row: Row) -> str:
    """The text of a prompt before ``{{ answer }}``, which must be its end.

    Raises:
        UserError: it is not.
    """
    text = render_row(template, row, **{ANSWER: SLOT})
    if text.count(SLOT) != 1:
        raise UserError("task.prompt: {{ answer }} must occur exactly once")
    before, after = text.split(SLOT)
    if after.strip():
        raise UserError(f"task.prompt: {{{{ answer }}}} must come last, not before {after!r:.100}")
    return before


def continued(texts: TextEncoder, before: str, after: str) -> Continuation:
    """See `all_continued`; one text that continues a prompt."""
    (only,) = all_continued(texts, before, [after])
    return only


def all_continued(texts: TextEncoder, before: str, endings: Sequence[str]) -> list[Continuation]:
    """The tokens of ``before`` and each of the endings together. Those that ``before`` has by itself are the prompt's.

    A tokenizer may join the end of a prompt and the start of what follows into one token: then that one is predicted.
    A space at the end of ``before`` goes with what follows. What the tokenizer appends to every text is left out.

    Args:
        texts: the tokenizer.
        before: the prompt.
        endings: what may continue it.
    """
    prompt, *whole = texts.tokenize_all([before.rstrip(" "), *[before + ending for ending in endings]])
    sequences = []
    for ids in whole:
        appended = shared(texts.of_nothing[::-1], ids[::-1])
        kept = ids[: len(ids) - appended]
        sequences.append(Continuation(tuple(kept), shared(prompt, kept)))
    return sequences


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest prefix that both have: two lists, or two tuples."""
    most = min(len(one), len(other))
    for guess in (most, most - 1):  # one is the start of the other, or they differ in the last token: often so
        if one[:guess] == other[:guess]:
            return max(guess, 0)
    least, most = 0, most - 2
    while least < most:  # slices compare faster than their elements do one by one
        middle = (least + most + 1) // 2
        if one[least:middle] == other[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least


def check_causal(model: TextModel, kind: str) -> None:
    """Raises UserError if a model does not predict a text token by token from the left."""
    if model.kind != "causal":
        raise UserError(
            f"task.kind: {kind} needs a causal language model, which predicts a text from left to right; this one is "
            f"{model.kind} (model.kind)"
        )
