"""YAML from anywhere, read into plain lists, dicts, text, numbers, booleans and None (torch-free).

Files of settings come from other people, and PyYAML takes more than settings need: tags that name Python objects,
aliases with which a few lines stand for more than any memory holds, and repeated keys, of which the last one wins. So
only PyYAML's parser is used, which reports what is written, and the values are built here from its events. No
constructor of PyYAML runs, so nothing in a file can name something to import or to call.

Plain words mean what they mean in YAML 1.2 and JSON: ``5e-5`` is a number (YAML 1.1 asks for a dot), ``no``, ``on`` and
``2024-01-01`` are text (they would be a boolean and a date, and ``no`` is a good label word).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from mezo_dist.errors import UserError
from mezo_dist.json_types import Json

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
_NULLS = ("", "~", "null", "Null", "NULL")
_BOOLEANS = {word: word.lower() == "true" for word in ("true", "True", "TRUE", "false", "False", "FALSE")}
_WHOLE = re.compile(r"[-+]?[0-9]+")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = {
    sign + word: float(sign + word.replace(".", ""))
    for word in (".inf", ".Inf", ".INF", ".nan", ".NaN", ".NAN")
    for sign in ("", "+", "-")
}


def read(path: Path, what: str) -> dict[str, Json]:
    """Read a file of settings.

    Args:
        path: the file.
        what: what to call it in messages, such as ``task file``.

    Raises:
        UserError: the file is missing, too large, or not a YAML mapping; see also `parse`.
    """
    source = f"{what} {path}"
    try:
        if not path.is_file():
            fault = "is not a file" if path.exists() else "does not exist"
            raise UserError(f"{source} {fault} (relative paths start at {Path.cwd()})")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise UserError(f"{source} is longer than {MAX_BYTES:,} bytes; settings take less")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not YAML: {error}") from error
    settings = parse(text, source)
    if not isinstance(settings, dict):
        content = "is empty" if settings is None else f"holds {shown(repr(settings))}"
        raise UserError(f"{source} {content}; it must hold settings, as in configs/quickstart.yaml")
    return settings


def parse(text: str, source: str) -> Json:
    """The value that a YAML text stands for.

    Args:
        text: one YAML document.
        source: where it comes from, for messages.

    Raises:
        UserError: the text is not YAML, nests too deep, sets a key twice, or uses tags or aliases.
    """
    try:
        events = yaml.parse(text, yaml.SafeLoader)
        documents = [_value(event, events, source) for event in events if isinstance(event, _STARTS)]
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not YAML: {error}") from error
    if len(documents) > 1:
        raise UserError(f"{source} holds {len(documents)} YAML documents; it must hold one")
    return documents[0] if documents else None


def dump(data: Mapping[str, Json]) -> str:
    """A YAML text that `read` and other readers of YAML take for ``data``, keys in their order."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def shown(value: object) -> str:
    """A value for a message, as it stands in YAML or JSON, cut where it is too long for one."""
    # A text that YAML would take for a number or the like stands in quotes.
    is_word = isinstance(value, str) and value and isinstance(_plain(value), str)
    text = str(value) if is_word else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:100]} ..."


_STARTS = (yaml.AliasEvent, yaml.ScalarEvent, yaml.SequenceStartEvent, yaml.MappingStartEvent)


def _value(event: yaml.Event, events: Iterator[yaml.Event], source: str, depth: int = 0) -> Json:
    """The value that begins with ``event``; the rest of its events are taken from ``events``.

    Args:
        event: the first event of the value.
        events: all events; the rest of the value is taken from them.
        source: where the text comes from, for messages.
        depth: how many collections the value lies in.
    """
    where = f"{source}, line {event.start_mark.line + 1 if event.start_mark else '?'}"
    if isinstance(event, yaml.AliasEvent):
        raise UserError(f"{where}: aliases (*{event.anchor}) are not taken; write the value out, or quote the text")
    if getattr(event, "tag", None) is not None:
        raise UserError(f"{where}: tags ({event.tag}) are not taken; leave it out")  # type: ignore[attr-defined]
    if depth > MAX_DEPTH:
        raise UserError(f"{where}: nested more than {MAX_DEPTH} deep; no setting is")
    if isinstance(event, yaml.SequenceStartEvent):
        return [_value(item, events, source, depth + 1) for item in _until(yaml.SequenceEndEvent, events)]
    if isinstance(event, yaml.MappingStartEvent):
        return _mapping(events, source, depth)
    assert isinstance(event, yaml.ScalarEvent)
    if event.style is not None:
        return event.value  # quoted, or a block of text
    try:
        return _plain(event.value)
    except ValueError as error:  # Python reads no whole number of more than 4,300 digits
        raise UserError(f"{where}: a number of {len(event.value):,} digits is too long") from error


def _mapping(events: Iterator[yaml.Event], source: str, depth: int) -> dict[str, Json]:
    """The mapping whose events come next.

    Args:
        events: all events; those of the mapping are taken from them.
        source: where the text comes from, for messages.
        depth: how many collections the mapping lies in.
    """
    mapping: dict[str, Json] = {}
    lines: dict[str, int] = {}
    for event in _until(yaml.MappingEndEvent, events):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if not isinstance(event, yaml.ScalarEvent) or not event.value:
            raise UserError(f"{source}, line {line}: the name of a setting must be text, before a colon")
        key = event.value
        if key in mapping:
            raise UserError(f"{source}: {key!r} is set twice, in line {lines[key]} and in line {line}")
        lines[key] = line
        mapping[key] = _value(next(events), events, source, depth + 1)
    return mapping


def _until(end: type[yaml.Event], events: Iterator[yaml.Event]) -> Iterator[yaml.Event]:
    """The first events of the items of a collection: whoever takes one takes the rest of the item from ``events``."""
    for event in events:
        if isinstance(event, end):
            return
        yield event


def _plain(word: str) -> str | int | float | bool | None:
    """What a word without quotes stands for. Raises ValueError for a number with too many digits."""
    if word in _NULLS:
        return None
    if word in _BOOLEANS:
        return _BOOLEANS[word]
    if _WHOLE.fullmatch(word):
        return int(word)
    if word in _NOT_FINITE:
        return _NOT_FINITE[word]
    return float(word) if _NUMBER.fullmatch(word) else word


class _Dumper(yaml.SafeDumper):
    """Quotes text that looks like a number to `_plain` too, such as a commit that happens to be called 12e7."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))
