"""The settings that there are, by their dotted names: types, defaults, and words for people (torch-free)."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from mezo_dist.algorithms import EVERY
from mezo_dist.algorithms.auto_rate import IN_CONFIGS
from mezo_dist.config.kinds import DEFAULT_KIND, KINDS
from mezo_dist.config.schema import RunConfig
from mezo_dist.errors import UserError

HELP = "`mezo-dist train --help` lists every setting"
Chosen = Mapping[str, str]
"""What a config chose where the settings of a section depend on it: ``{"algorithm": its name, "task": its kind}``."""


@dataclass(frozen=True)
class Choice:
    """A section that is one of several dataclasses."""

    tag: str
    """The setting in it that says which."""
    sections: Mapping[str, type]
    """Value of that setting -> dataclass."""
    default: str | None = None
    """Its value where none is given."""


CHOICES = {
    "algorithm": Choice("name", {name: settings for name, (settings, _) in EVERY.items()}),
    "task": Choice("kind", KINDS, DEFAULT_KIND),
}


@dataclass(frozen=True)
class Setting:
    """A setting, or a section of settings."""

    name: str
    """Dotted, such as ``train.steps``; of a section, ``train``."""
    kind: type
    """Its type; that of a section is its dataclass."""
    default: object
    """`dataclasses.MISSING` where a value must be given."""
    goes_along: bool
    """Beside another such setting of its section that is given, it is by default the same; see `IN_CONFIGS`."""
    owner: type
    """The dataclass that it is declared in: its section, or what several sections share."""

    @property
    def is_section(self) -> bool:
        """It holds settings."""
        return dataclasses.is_dataclass(self.kind)

    @property
    def is_text(self) -> bool:
        """Its value is text (or null), so that text is never taken for anything else."""
        kinds = typing.get_args(self.kind) if self.is_nullable else (self.kind,)
        return all(kind in (str, type(None)) or typing.get_origin(kind) is Literal for kind in kinds)

    @property
    def is_nullable(self) -> bool:
        """It may be null."""
        return _is_nullable(self.kind)


def all_settings(chosen: Chosen) -> dict[str, Setting]:
    """Dotted name -> setting, sections before what they hold; those of the ``chosen`` algorithm and kind of task."""
    return {setting.name: setting for setting in _walk(RunConfig, "", None, chosen)}


def _walk(section: type, prefix: str, default: object, chosen: Chosen) -> Iterator[Setting]:
    """The settings of a section and of the sections inside it.

    Args:
        section: the dataclass.
        prefix: what stands before the names of its fields.
        default: the section's value by default; None if the defaults of its fields count.
        chosen: the algorithm and the kind of task.
    """
    kinds = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        name = prefix + field.name
        kind = CHOICES[name].sections[chosen[name]] if name in CHOICES else kinds[field.name]
        value = _default(field) if default is None else getattr(default, field.name)
        yield Setting(name, kind, value, IN_CONFIGS in field.metadata, _declares(section, field.name))
        if dataclasses.is_dataclass(kind):
            yield from _walk(
                typing.cast(type, kind), f"{name}.", None if value is dataclasses.MISSING else value, chosen
            )


def _declares(section: type, name: str) -> type:
    return next(owner for owner in section.__mro__ if name in inspect.get_annotations(owner))


def _default(field: dataclasses.Field[object]) -> object:
    if IN_CONFIGS in field.metadata:
        return field.metadata[IN_CONFIGS]
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def choose(section: str, given: object, where: str) -> str:
    """The value of the setting that says what ``section`` holds.

    Args:
        section: ``algorithm`` or ``task``.
        given: the value in the config; None if there is none.
        where: it was given, for the message.

    Raises:
        UserError: there is no such algorithm, or kind of task.
    """
    choice = CHOICES[section]
    if given is None and choice.default is not None:
        return choice.default
    if isinstance(given, str) and given in choice.sections:
        return given
    fault = "missing" if given is None else f"{given!r} does not exist"
    listed = ", ".join(sorted(choice.sections))
    raise UserError(f"{where}: {section}.{choice.tag}: {fault}; choose one of {listed}\n{HELP}")


def unknown(name: str, settings: Mapping[str, Setting], chosen: Chosen) -> str:
    """What to say about a name that is no setting: whose it is, the nearest one, or those that there are.

    Args:
        name: dotted name that was given.
        settings: all settings that there are, by dotted name.
        chosen: the algorithm and the kind of task of the config.
    """
    if name in settings:
        section, _, leaf = name.rpartition(".")
        return f"{name} must stand in its section {section}, as {leaf}"
    top = name.partition(".")[0]
    others = CHOICES[top].sections if top in CHOICES else ()
    owners = [other for other in others if name in all_settings({**chosen, top: other})]
    if owners:
        return f"{name} is a setting of {' and '.join(owners)}, not of {chosen[top]}; leave it out"
    section = name.rpartition(".")[0]
    beside = [other for other in settings if other.rpartition(".")[0] == section]
    for candidates in (beside, list(settings)):
        # Where several settings have the same last part, the one nearest to the top counts: it comes last and stays.
        leaves = {other.rpartition(".")[2]: other for other in sorted(candidates, key=lambda other: -other.count("."))}
        near = difflib.get_close_matches(name.rpartition(".")[2], leaves, n=1)
        if near:
            return f"unknown setting {name!r}; did you mean {leaves[near[0]]!r}?"
    there = beside or [other for other in settings if "." not in other]
    return f"unknown setting {name!r}; there are {', '.join(there)}"


def describe(kind: object) -> str:
    """What a value of a type looks like in a config file."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if kind in words:
        return words[kind]
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return f"a list of {describe(arguments[0])}"
    if typing.get_origin(kind) is dict:
        return f"a mapping of {describe(arguments[0])} to {describe(arguments[1])}"
    if typing.get_origin(kind) is Literal:
        return " or ".join(arguments)
    if dataclasses.is_dataclass(kind):
        return f"{{{', '.join(f'{name}: {describe(item)}' for name, item in typing.get_type_hints(kind).items())}}}"
    return " or ".join(describe(item) for item in arguments if item is not int or float not in arguments)


def choices(kind: object) -> list[str]:
    """The values that a type allows where they can be listed; else empty."""
    if kind is bool:
        return ["true", "false"]
    if typing.get_origin(kind) is Literal:
        return list(typing.get_args(kind))
    if _is_nullable(kind):
        rest = [choices(item) for item in typing.get_args(kind) if item is not type(None)]
        return [*rest[0], "null"] if len(rest) == 1 and rest[0] else []
    return []


def _is_nullable(kind: object) -> bool:
    return type(None) in typing.get_args(kind)
