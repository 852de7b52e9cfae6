"""Fields of a row by their names, those inside other fields too, and the texts by which a config may call a value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mezo_dist.errors import UserError

Row = Mapping[str, Any]


class ClassIndex(int):
    """A value of a column of class labels: a number that goes by the name of its class, too."""

    name: str

    def __new__(cls, index: int, name: str) -> ClassIndex:
        """The number ``index``, also called ``name``."""
        value = super().__new__(cls, index)
        value.name = name
        return value


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
    raise UserError(f"{setting}: there is no field {name!r}, only {field_names(row)}")


def replaced(row: Row, name: str, value: Any) -> Row:
    """``row`` with another value of the field that `lookup` gives."""
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


def names_of(value: Any) -> tuple[str, ...]:
    """The texts by which a config may call a value of the data.

    A number goes by its digits, whether the data hold a number or a text; a whole one such as 1.0, into which tables
    with gaps turn 1, goes by both. A class goes by its number and its name, a boolean by ``true`` in any case.
    """
    if isinstance(value, ClassIndex):
        return str(int(value)), value.name
    if isinstance(value, bool):
        return str(value), str(value).lower(), str(value).upper()
    if isinstance(value, float) and value.is_integer():
        return str(int(value)), str(value)
    return ("null" if value is None else str(value),)


def shown(values: Iterable[Any]) -> str:
    """Values for a message, classes with their names: ``[0 (negative), 1 (positive)]``."""
    texts = [f"{int(v)} ({v.name})" if isinstance(v, ClassIndex) else repr(v) for v in values]
    return f"[{', '.join(texts)}]"
