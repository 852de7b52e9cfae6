"""Texts from the tokens of their pieces, each of which goes through the tokenizer once.

Most tokenizers cut a text before every space, whatever else they do, and make tokens of each piece by itself. With such
a tokenizer the tokens of a text are those of its pieces, one after another, and what is put before and after every
text. A million rows have few different pieces, words mostly, and to look up their tokens takes a tenth of the time of
the tokenizer. Which tokenizers do that is read off their parts; all others make tokens of whole texts.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

from mezo_dist.tasks.encoding import Texts, ask

log = logging.getLogger(__name__)
Ids = list[int]
Ends = tuple[tuple[int, ...], ...]
LONGEST = 64
"""Characters of a piece that is remembered, at most: longer ones are those of single rows."""
MOST_KNOWN = 65_536
"""Pieces that are remembered: they take some 20 MB."""
MOST_ENDS = 1_000
"""Ends of texts that are remembered."""
LEAST_USES = 3
"""Times that a remembered piece has to be of use, on average, for pieces to be worth their own calls."""
CHECKED = 128
"""Every so manieth text is tokenised as a whole, too."""
NEAR = "|"
"""What stands before the space where a piece is looked at: few pieces have such a token."""
TOGETHER = 64
"""Pieces that are looked at in one text: in one of its own a word takes three times as long."""
_CUT = re.compile("(?<=[!-~]) ")
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
class Pieces:
    """The tokens of texts, piece by piece.

    Args:
        tokenizer: a fast one, of which a call is one of its backend.
        tokenise: token ids of texts, with what the tokenizer puts around every text.
    """

    def __init__(self, tokenizer: Any, tokenise: Callable[[Sequence[str]], list[Ids]]) -> None:
        self._name = type(tokenizer).__name__
        self._tokenise = tokenise
        around = _around(tokenizer) if cuts_at_spaces(tokenizer.backend_tokenizer) else None
        self.is_of_use = around is not None
        """False: `tokenised` and `with_endings` may not be called (any more)."""
        self._before, self._near, self._after = around or ([], [], [])
        self.largest = 0
        """No token that came out so far is larger."""
        self._between: Ids = []
        """Tokens of `NEAR` behind a space."""
        if self.is_of_use:
            start, (ids,) = [*self._before, *self._near], tokenise([f"{NEAR} {NEAR}"])
            size = len(ids) - len(self._after)
            self.is_of_use = ids[: len(start)] == start and ids[size:] == self._after
            self._between = ids[len(start) : size]
        self._first: dict[str, Ids] = {}
        """Start of a text -> its tokens, and those put before every text."""
        self._other: dict[str, Ids] = {}
        """Piece without the space that it begins with -> its tokens."""
        self._ends: dict[tuple[str, ...], Ends] = {}
        """Last piece and endings -> see `_looked_at`."""
        self._num_texts = self._num_looked_up = 0

    def tokenised(self, text: str) -> Ids:
        """Token ids of a text, with what the tokenizer puts around it."""
        first, *others = pieces_of(text)
        ids = self._ids(first, others) + self._after
        self._check(text, lambda: ids)
        return ids

    def with_endings(self, before: str, endings: Sequence[str]) -> tuple[Ids, Ends]:
        """See `tokenised`; of ``before`` with each of the endings after it.

        Args:
            before: may be long.
            endings: one or more.

        Returns:
            Tokens that all of these texts begin with, and what follows them in each.
        """
        first, *others = pieces_of(before)
        if not others:
            return [], tuple(tuple(self.tokenised(before + ending)) for ending in endings)
        last = others.pop()
        start = self._ids(first, others)
        known = self._ends.get((last, *endings))
        ends = self._looked_at(last, endings) if known is None else known
        self._check(before + endings[0], lambda: [*start, *ends[0]])
        return start, ends

    def _looked_at(self, last: str, endings: Sequence[str]) -> Ends:
        """The tokens of the last piece of a text with each of the endings after it, and of what is put after them."""
        ends = []
        for ending in endings:
            pieces = pieces_of(f"{NEAR} {last}{ending}")[1:]  # an ending may have spaces
            ends.append((*self._ids(None, pieces), *self._after))
        if len(self._ends) >= MOST_ENDS:
            self._ends.clear()
        key = (last, *endings)
        self._ends[key] = tuple(ends)
        return self._ends[key]

    def _ids(self, first: str | None, others: Sequence[str]) -> Ids:
        """The tokens of the start of a text, or of what follows one (None), without what is put after every text.

        Args:
            first: its first piece.
            others: those after it.
        """
        self._num_looked_up += len(others) + 1
        other = self._other
        try:
            ids = [] if first is None else self._first[first].copy()
            for piece in others:
                ids += other[piece]
        except KeyError:
            return self._learnt(first, others)
        return ids

    def _learnt(self, first: str | None, others: Sequence[str]) -> Ids:
        """See `_ids`; of pieces some of which are not known."""
        known = {piece: self._other[piece] for piece in others if piece in self._other}  # these may be forgotten below
        head = None if first is None else self._first.get(first)
        new = [piece for piece in dict.fromkeys(others) if piece not in known]
        heads = [] if first is None or head is not None else [("", first)]
        answers: list[Ids] = ask(self._look_at, [*heads, *[(NEAR, piece) for piece in new]])
        if heads:
            head = answers[0]
        known |= zip(new, answers[len(heads) :], strict=True)
        return [*(head or []), *[token for piece in others for token in known[piece]]]

    def _look_at(self, pieces: Sequence[Texts]) -> list[Ids]:
        """The tokens of pieces, each after what it stands behind: `NEAR`, or nothing if it is the start of a text."""
        tokens: dict[Texts, Ids] = {}
        for near, piece in pieces:
            known = self._other if near else self._first
            if piece in known:
                tokens[near, piece] = known[piece]
        new = [one for one in dict.fromkeys(pieces) if one not in tokens]
        learnt: dict[Texts, Ids] = {}
        heads = [piece for near, piece in new if not near]
        for piece, ids in zip(heads, self._tokenise(heads) if heads else [], strict=True):
            learnt["", piece] = self._within(ids, self._before, piece)
        others = [piece for near, piece in new if near]
        learnt |= {(NEAR, piece): ids for piece, ids in self._behind_others(others)}
        for (near, piece), ids in learnt.items():
            self._remember(self._other if near else self._first, piece, ids)
        tokens |= learnt
        return [tokens[one] for one in pieces]

    def _behind_others(self, pieces: Sequence[str]) -> Iterator[tuple[str, Ids]]:
        """Pieces that do not begin a text, with their tokens: many go through the tokenizer in one text.

        Not those that are not cut from what follows, which are the last ones of texts.
        """
        size = TOGETHER if len(self._between) == 1 else 1
        inner = [piece for piece in pieces if "!" <= piece[-1:] <= "~"]
        pending = [inner[start : start + size] for start in range(0, len(inner), size)]
        pending += [[piece] for piece in pieces if not "!" <= piece[-1:] <= "~"]
        while pending:
            groups, pending = pending, []
            answers = self._tokenise([self._behind_near(group) for group in groups])
            for group, ids in zip(groups, answers, strict=True):
                tokens = self._apart(group, ids)
                if tokens is None:
                    pending += [group[: len(group) // 2], group[len(group) // 2 :]]
                else:
                    yield from zip(group, tokens, strict=True)

    def _behind_near(self, group: Sequence[str]) -> str:
        """A text of pieces with `NEAR` before and between them."""
        return " ".join(part for piece in group for part in (NEAR, piece))

    def _apart(self, group: Sequence[str], ids: Ids) -> list[Ids] | None:
        """The tokens of each piece of `_behind_near`; None if they cannot be told apart.

        Args:
            group: the pieces.
            ids: tokens of the text.
        """
        start = [*self._before, *self._near]
        ids = self._within(ids, start, self._behind_near(group))[len(start) :]
        if len(group) == 1:
            return [ids]
        places = [place for place, token in enumerate(ids) if token == self._between[0]]
        if len(places) != len(group) - 1:
            return None  # a piece has that token, too
        return [
            ids[one:other]
            for one, other in zip([0, *[place + 1 for place in places]], [*places, len(ids)], strict=True)
        ]

    def _within(self, ids: Ids, before: Ids, text: str) -> Ids:
        """The tokens of a text without those that are put after it.

        Args:
            ids: all of them.
            before: what they have to begin with.
            text: of the message.
        """
        size = len(ids) - len(self._after)
        if size < len(before) or ids[: len(before)] != before or ids[size:] != self._after:
            raise self._differs(text)
        self.largest = max(self.largest, max(ids, default=0))
        return ids[:size]

    def _remember(self, known: dict[str, Ids], piece: str, ids: Ids) -> None:
        """Remember a piece, if it is short.

        Args:
            known: where.
            piece: as it is called there.
            ids: its tokens.
        """
        if len(piece) > LONGEST:
            return
        if len(self._first) + len(self._other) >= MOST_KNOWN:
            if self._num_looked_up < (LEAST_USES + 1) * MOST_KNOWN:
                log.debug("texts are tokenised as wholes: most of their pieces are in one of them only")
                self.is_of_use = False
            self._first.clear()
            self._other.clear()
            self._num_looked_up = 0
        known[piece] = ids

    def _check(self, text: str, ids: Callable[[], Ids]) -> None:
        """Of every `CHECKED`th text: raises RuntimeError if as a whole it has other tokens than ``ids()``."""
        self._num_texts += 1
        if self._num_texts % CHECKED == 1 and ask(self._whole, [(text,)]) != [ids()]:
            raise self._differs(text)

    def _whole(self, texts: Sequence[Texts]) -> list[Ids]:
        return self._tokenise([text for (text,) in texts])

    def _differs(self, text: str) -> RuntimeError:
        return RuntimeError(f"{self._name} makes other tokens of {text[:80]!r} than of its pieces, cut at spaces")


def pieces_of(text: str) -> list[str]:
    """A text, cut before every space behind a visible ASCII character; those spaces are left out."""
    if text.isascii() and text.isprintable() and "  " not in text and text[:1] != " ":
        return text.split(" ")  # the same, at once
    return _CUT.split(text)


def _around(tokenizer: Any) -> tuple[Ids, Ids, Ids] | None:
    """The tokens that are put before every text, those of `NEAR`, and those put after every text; None if these cannot
    be told apart, or `NEAR` has no tokens."""
    try:
        near, around, whole = (
            tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
            for text, special in ((NEAR, False), ("", True), (NEAR, True))
        )
    except Exception:  # noqa: BLE001 (the package raises just this where a word is unknown and there is no token for it)
        return None
    sizes = [size for size in range(len(around) + 1) if around[:size] + near + around[size:] == whole]
    return (around[: sizes[0]], near, around[sizes[0] :]) if len(sizes) == 1 else None


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
