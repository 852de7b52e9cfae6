"""How settings call the values of the data, and which rows they choose by them (torch-free)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Value = bool | int | float | str | None
"""What settings may give as a value of the data."""


class ClassIndex(int):
    """A value of a column of class labels: a number that goes by the name of its class, too."""

    name: str

    def __new__(cls, index: int, name: str) -> ClassIndex:
        """The number ``index``, also called ``name``."""
        value = super().__new__(cls, index)
        value.name = name
        return value


def names_of(value: Any) -> tuple[str, ...]:
    """The texts by which settings may call a value of the data.

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


@dataclass(frozen=True)
class Where:
    """Which rows of the data set count, by the values of their fields; the others are left out before splits are cut.

    Values are given as in ``task.labels``: ``0`` is the number or the text, a class also goes by its name, and
    ``null`` is a field without a value. ``passage.source`` is a field inside another.
    """

    keep: dict[str, tuple[Value, ...]] = field(default_factory=dict)
    """``{genre: [fiction, travel]}``: only rows whose field has one of the values; with several fields, all of them."""
    drop: dict[str, tuple[Value, ...]] = field(default_factory=dict)
    """``{label: [-1]}``: no row whose field has one of the values."""

    def __post_init__(self) -> None:
        for name, conditions in (("keep", self.keep), ("drop", self.drop)):
            for key, values in conditions.items():
                if not values:
                    raise ValueError(f"task.where.{name}: {key}: give at least one value")
