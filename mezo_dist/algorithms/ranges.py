"""Types and ranges of settings: what does not fit is refused by name, before any memory is asked for (torch-free).

The reader of config files checks types by itself; settings that are written in Python are checked here.
"""

from __future__ import annotations

import typing
from typing import Literal

MANY = 10**9
"""More steps, samples or tokens than any run has: a larger number is a slip, or meant to exhaust the memory."""


def check_ranges(section: object, prefix: str = "", **ranges: tuple[float, float]) -> None:
    """Check settings against their ranges. None, which says that a setting is off, is let pass.

    Args:
        section: the dataclass that holds the settings.
        prefix: what stands before their names in a config, such as ``train.``; empty for a section that stands in
            several places, of which the reader of configs knows the right one.
        ranges: setting -> smallest and largest value.

    Raises:
        ValueError: a value lies outside, or is not a number; the message names the setting.
    """
    for name, (least, most) in ranges.items():
        value = getattr(section, name)
        if value is None or least <= value <= most:
            continue
        limit = f"most {most:,}" if value > most else f"least {least:,}"
        raise ValueError(f"{prefix}{name}: must be at {limit}, not {value}")


def check_types(section: object, prefix: str = "") -> None:
    """Check the fields of a dataclass against their annotations: numbers, truth values, words of a choice, sections.

    Args:
        section: the dataclass that holds the settings.
        prefix: see `check_ranges`.

    Raises:
        ValueError: a value is of another type, or no word of its choice; the message names the setting.
    """
    for name, kind in typing.get_type_hints(type(section)).items():
        value = getattr(section, name)
        kinds = [kind] if typing.get_origin(kind) is Literal or not typing.get_args(kind) else typing.get_args(kind)
        if not any(_is_of(value, one) for one in kinds):
            raise ValueError(f"{prefix}{name}: must be {' or '.join(map(_in_words, kinds))}, not {value!r}")


def _is_of(value: object, kind: type) -> bool:
    if typing.get_origin(kind) is Literal:
        return isinstance(value, str) and value in typing.get_args(kind)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _in_words(kind: type) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(typing.get_args(kind))
    words = {int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    return words.get(kind) or f"a {kind.__name__}"
