"""Texts that differ in their last words only: what they have in common goes through the tokenizer once.

A prompt is tokenised with each of several label words after it. Most tokenizers cut a text before every space, whatever
else they do, and make tokens of each piece by itself. Of such a tokenizer, the tokens before the last space that the
texts share are the same in all of them, and those after it are a function of what stands there: they are known from the
rows before. Which tokenizers do that is read off their parts; all others, and texts without such a space, are tokenised
as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, final

Ids = list[int]
LONGEST = 200
"""Characters after the space, at most: longer ends are those of single rows."""
MOST_KNOWN = 1_000
"""Ends that are remembered."""
NEAR = "a"
"""What stands before the space where an end is looked at."""
NORMALIZERS = ("NFC", "Lowercase", "BertNormalizer")
"""Those that change a letter, whatever stands before the space next to it."""
CUTTERS = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer")
"""Those that cut at every space and look at nothing beyond it."""
PATTERNS = tuple(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
)
"""Patterns of Llama 3 and of Qwen: none of their parts goes on at a space behind anything but a space."""


@final
class Endings:
    """What the ends of texts become.

    Args:
        tokenizer: a fast one, of which a call is one of its backend.
        tokenise: token ids of texts, with what the tokenizer puts around every text.
    """

    def __init__(self, tokenizer: Any, tokenise: Callable[[Sequence[str]], list[Ids]]) -> None:
        self._tokenise = tokenise
        self._known: dict[tuple[str, ...], list[Ids] | None] = {}
        self._start = _start(tokenizer) if cuts_at_spaces(tokenizer.backend_tokenizer) else None

    def tokenised(self, before: str, endings: Sequence[str]) -> list[Ids]:
        """Token ids of ``before`` with each of the endings after it.

        Args:
            before: may be long.
            endings: two or more.
        """
        place = self._last_cut(before)
        tail = before[place:]
        if place and len(tail) + max(map(len, endings)) <= LONGEST:
            (first,) = self._tokenise([before + endings[0]])
            ends = self._ends(tuple(tail + ending for ending in endings))
            if ends is not None and first[-len(ends[0]) :] == ends[0]:
                start = first[: -len(ends[0])]
                return [first, *[start + end for end in ends[1:]]]
        return self._tokenise([before + ending for ending in endings])

    def _last_cut(self, before: str) -> int:
        """The place of the last space that surely is cut at; 0 if there is none."""
        if self._start is None:
            return 0
        place = before.rfind(" ")
        while place > 0 and not "!" <= before[place - 1] <= "~":
            place = before.rfind(" ", 0, place)
        return max(place, 0)

    def _ends(self, texts: tuple[str, ...]) -> list[Ids] | None:
        """The token ids of texts that begin with a space, behind anything, and of what is put at the end of every text.

        None if it cannot be said.
        """
        if texts not in self._known:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            assert self._start is not None
            self._known[texts] = self._looked_at(texts, self._start)
        return self._known[texts]

    def _looked_at(self, texts: Sequence[str], start: Ids) -> list[Ids] | None:
        """See `_ends`; ``start`` is that of the texts with `NEAR` before them."""
        try:
            whole = self._tokenise([NEAR + text for text in texts])
        except Exception:  # noqa: BLE001 (whatever keeps these texts from being tokens is told of the real ones)
            return None
        ends = [ids[len(start) :] for ids in whole if ids[: len(start)] == start]
        return ends if len(ends) == len(texts) and all(ends) else None


def _start(tokenizer: Any) -> Ids | None:
    """The tokens of `NEAR` and of what is put before every text; None if that cannot be told from what is put after, or
    it has no tokens."""
    try:
        near, around, whole = (
            tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
            for text, special in ((NEAR, False), ("", True), (NEAR, True))
        )
    except Exception:  # noqa: BLE001 (the package raises just this where a word is unknown and there is no token for it)
        return None
    sizes = [size for size in range(len(around) + 1) if around[:size] + near + around[size:] == whole]
    return around[: sizes[0]] + near if len(sizes) == 1 else None


def cuts_at_spaces(backend: Any) -> bool:
    """A space behind a visible ASCII character begins a piece whose tokens do not depend on what stands before it.

    Args:
        backend: of the package `tokenizers`.
    """
    for token in backend.get_added_tokens_decoder().values():
        if token.rstrip or any(letter.isspace() for letter in token.content):
            return False
    normalizers = _parts(backend.normalizer, "normalizers")
    if any(part["type"] not in NORMALIZERS for part in normalizers):
        return False
    is_cut = False
    for part in _parts(backend.pre_tokenizer, "pretokenizers"):
        if part["type"] in CUTTERS or (part["type"] == "ByteLevel" and part["use_regex"]) or _is_known_pattern(part):
            is_cut = True
        elif part["type"] != "Digits" and not (part["type"] == "ByteLevel" and is_cut):  # it writes spaces as letters
            return False
    return is_cut


def _is_known_pattern(part: dict[str, Any]) -> bool:
    if part["type"] != "Split" or part["behavior"] != "Isolated" or part["invert"]:
        return False
    return part["pattern"].get("Regex") in PATTERNS


def _parts(part: Any, inside: str) -> list[dict[str, Any]]:
    """The settings of a part of a tokenizer, or of the parts in it, in their order.

    Args:
        part: a normalizer or a pre-tokenizer, or None.
        inside: the setting of a sequence of them that holds its parts.
    """
    if part is None:
        return []
    try:
        state: dict[str, Any] = json.loads(part.__getstate__())
    except Exception:  # noqa: BLE001 (the package raises just this where a part is Python code of somebody's own)
        return [{"type": "unknown"}]
    if state["type"] != "Sequence":
        return [state]
    return list(state[inside])
