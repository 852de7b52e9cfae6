"""What kind of task a data set looks like: fields, classes, texts. For ``mezo-dist init``, which writes it down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mezo_dist.config.values import ClassIndex
from mezo_dist.errors import UserError
from mezo_dist.tasks.fields import Row, field_names, lookup

LABEL_NAMES = ("label", "labels", "class", "category", "target", "sentiment", "answer", "gold")
"""Fields that hold classes, by the names that data sets give them, the likeliest first."""
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("instruction", "response"),
         ("question", "answer"), ("input", "output"), ("source", "target"))  # fmt: skip
"""Fields of what the model is given and what it is to write."""
CONVERSATIONS = ("messages", "conversations", "conversation", "chat")
MOST_CLASSES = 100
FEWEST_PER_CLASS = 3
"""Rows that a class has on average, at least: a field of more values than that holds texts or numbers, not classes."""


@dataclass(frozen=True)
class Guess:
    """A kind of task and the fields that it would read."""

    kind: Literal["classification", "completion"]
    texts: tuple[str, ...]
    """Fields with the texts that the model is given, in the order of the data."""
    answer: str | None = None
    """The field with the class, or with the text to write; None: the conversation, or the text itself."""
    conversation: str | None = None
    """The field with the conversation."""
    classes: tuple[bool | int | str, ...] = ()
    """Values of ``answer``, sorted."""
    names: Mapping[bool | int | str, str] = field(default_factory=dict)
    """Names that the data give to classes."""
    has_gaps: bool = False
    """Some rows have no class."""


def guess(rows: Sequence[Row]) -> Guess:
    """What rows look like.

    A conversation is one; else a field with few values and a usual name holds classes; else two fields with usual names
    are prompt and completion; else any field with few values holds classes; else the longest text is to be written.

    Args:
        rows: some of the training rows; the more, the surer.

    Raises:
        UserError: there is no text in them.
    """
    names = _in_order(rows[0])
    for name in CONVERSATIONS:
        if name in names and isinstance(rows[0][name], list):
            return Guess("completion", (), conversation=name)
    columns = {name: [lookup(row, name, "the data") for row in rows] for name in names}
    texts = [name for name, values in columns.items() if _is_text(values)]
    few = [name for name, values in columns.items() if _are_classes(values)]
    usual = [name for name in LABEL_NAMES if name in few]
    if usual and (givens := tuple(name for name in texts if name not in usual)):
        return _classification(usual[0], columns[usual[0]], givens)
    for given, answer in PAIRS:
        if given in texts and answer in texts and answer not in few:
            between = tuple(name for name in ("input", "context") if name in columns and name not in (given, answer))
            return Guess("completion", (given, *between), answer)
    for name in few:
        if givens := tuple(text for text in texts if text != name):
            return _classification(name, columns[name], givens)
    if not texts:
        raise UserError(f"no field holds texts, among {field_names(rows[0])}: a task needs one")
    return Guess("completion", (), max(texts, key=lambda name: sum(len(str(value)) for value in columns[name])))


def _in_order(row: Row, before: str = "") -> list[str]:
    """Names of all fields, in the order of the data; inner ones with a dot."""
    names = []
    for name, value in row.items():
        names += _in_order(value, f"{before}{name}.") if isinstance(value, Mapping) else [f"{before}{name}"]
    return names


def _is_text(values: Sequence[Any]) -> bool:
    """Strings with spaces in most of them."""
    strings = [value for value in values if isinstance(value, str)]
    return len(strings) > len(values) / 2 and sum(" " in value.strip() for value in strings) > len(strings) / 2


def _are_classes(values: Sequence[Any]) -> bool:
    """A few values, each of them several times: booleans, whole numbers or short strings."""
    known = [value for value in values if value is not None]
    if not known or not all(isinstance(value, (bool, int, str)) for value in known):
        return False
    counts = Counter(str(value) for value in known)
    return 2 <= len(counts) <= min(MOST_CLASSES, len(known) / FEWEST_PER_CLASS) and max(map(len, counts)) <= 40


def _classification(name: str, values: Sequence[Any], texts: tuple[str, ...]) -> Guess:
    known = {value for value in values if value is not None}
    names: dict[bool | int | str, str] = {int(value): value.name for value in known if isinstance(value, ClassIndex)}
    classes = sorted({int(v) if isinstance(v, ClassIndex) else v for v in known}, key=lambda v: (str(type(v)), v))
    return Guess("classification", texts, name, classes=tuple(classes), names=names, has_gaps=None in values)
