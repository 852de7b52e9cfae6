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
    if name in row:
        return row[name]
    place: Any = row
    for key in keys_of(row, name, setting):
        place = place[key]
    return place


def keys_of(row: Row, name: str, setting: str) -> list[str]:
    """The keys that lead to a field, one inside another; arguments and errors are those of `lookup`."""
    keys = _keys(row, name)
    if keys is None:
        raise UserError(f"{setting}: there is no field {name!r}, only {listed(field_names(row))}")
    return keys


def _keys(place: object, name: str) -> list[str] | None:
    """See `keys_of`; None if there is no such field. A key may have dots itself."""
    if not isinstance(place, Mapping):
        return None
    if name in place:
        return [name]
    for dot in (i for i, letter in enumerate(name) if letter == "." and name[:i] in place):
        inner = _keys(place[name[:dot]], name[dot + 1 :])
        if inner is not None:
            return [name[:dot], *inner]
    return None


def replaced(row: Row, name: str, value: Any) -> Row:
    """``row`` with another value of the field that `lookup` gives.

    Args:
        row: not changed.
        name: of the field; dots lead into fields that hold others.
        value: the new one.
    """
    key, *inner = _keys(row, name) or [name]
    return {**row, key: replaced(row[key], ".".join(inner), value) if inner else value}


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
