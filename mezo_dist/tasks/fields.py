"""Fields of a row by their names, those inside other fields too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mezo_dist.config.values import ClassIndex
from mezo_dist.errors import UserError

Row = Mapping[str, Any]
MOST_SHOWN, LONGEST_SHOWN = 20, 60
"""Names or values in a message, and characters of each: a data file may have a million columns."""


def lookup(row: Row, name: str, setting: str) -> Any:
    """The value of a field; ``passage.text`` is the field ``text`` inside ``passage``, unless a field is called so.

    Args:
        row: by field.
        name: of the field.
        setting: which names it, for the message.

    Raises:
        UserError: there is no such field.
    """
    place: Any = row
    rest = name
    while isinstance(place, Mapping):
        if rest in place:
            return place[rest]
        head, dot, rest = rest.partition(".")
        if not dot or head not in place:
            break
        place = place[head]
    raise UserError(f"{setting}: there is no field {name!r}, only {listed(field_names(row))}")


def replaced(row: Row, name: str, value: Any) -> Row:
    """``row`` with another value of the field that `lookup` gives.

    Args:
        row: not changed.
        name: of the field; dots lead into fields that hold others.
        value: the new one.
    """
    if name in row or "." not in name:
        return {**row, name: value}
    head, _, rest = name.partition(".")
    return {**row, head: replaced(row[head], rest, value)}


def field_names(row: Row) -> list[str]:
    """Names of all fields, those inside others in the way `lookup` takes them."""
    names = []
    for name, value in row.items():
        names += [f"{name}.{inner}" for inner in field_names(value)] if isinstance(value, Mapping) else [str(name)]
    return sorted(names)


def listed(values: Iterable[object]) -> str:
    """Values for a message, as a list of texts: ``['a', 'b', ... and 7 more]``."""
    return _bracketed([repr(str(value)[:LONGEST_SHOWN]) for value in values])


def shown(values: Iterable[Any]) -> str:
    """Values for a message, classes with their names: ``[0 (negative), 1 (positive)]``."""
    texts = [f"{int(v)} ({v.name})" if isinstance(v, ClassIndex) else repr(v) for v in values]
    return _bracketed([text[:LONGEST_SHOWN] for text in texts])


def _bracketed(texts: list[str]) -> str:
    more = len(texts) - MOST_SHOWN
    return f"[{', '.join(texts[:MOST_SHOWN])}{f', ... and {more:,} more' if more > 0 else ''}]"
