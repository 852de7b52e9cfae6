"""Reading configs: YAML files with command-line overrides, checked by pydantic (torch-free).

`yaml_file` reads the files. What is in them is checked by pydantic, against the dataclasses of `schema`, `task` and the
algorithms as they are: nothing but their annotations says what a setting may be. Strictly, as JSON: a whole number may
stand for a number and a list for a tuple, but text is no number, and no number is text. Every setting is known to the
dataclasses, so no mapping can name a class to import; faults come back as data (place, kind, value), all of them at
once, and are put into words here.

(jsonargparse, which was here before, imports what a mapping names as ``class_path`` before it looks at types, and its
faults had to be read out of its English sentences.)
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from mezo_dist.config import yaml_file
from mezo_dist.config.schema import RunConfig
from mezo_dist.config.settings import CHOICES, HELP, Chosen, Setting, all_settings, choose, describe, unknown
from mezo_dist.config.shipped import task_file
from mezo_dist.config.yaml_file import shown
from mezo_dist.errors import UserError
from mezo_dist.json_types import Json

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

OTHER_ALGORITHM = "--algorithm='{{name: {}, lr: ...}}' takes the place of the whole section"
MAX_FAULTS = 10
PATHS = {"model": "model.name", "task": "task.data", "layout": "layout.ds_config"}
"""Settings that may be paths, by the section of each."""
UNKNOWN = "unexpected_keyword_argument"
UNION_MEMBER = re.compile(r"bool|str|int|float|literal\[.*")
"""Where a value may have several types, pydantic reports a fault for each, whose place ends in the name of the type."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config file and apply overrides: ``--train.steps=10``, ``--train.steps 10`` or ``train.steps=10``.

    The task may be the path of a task file, or the name of one that ships. Another algorithm than the file's, whose
    settings are others, is given as a whole: ``--algorithm='{name: adamw, lr: 0.001}'``, or ``--algorithm=adamw`` and
    its settings one by one. Relative paths start at the folder of the file that they are written in; as an override,
    at the current one.

    Raises:
        UserError: a file is missing or not YAML, a setting is unknown, missing, of the wrong type or contradicts
            another one. The message says where it was given, names it, and the nearest one that exists.
    """
    return _loaded(yaml_file.read(Path(path), "config file"), Path(path).parent, str(path), overrides)


def from_settings(settings: Sequence[str]) -> RunConfig:
    """A config of settings alone, given as overrides are (see `load`), for algorithm ``mezo`` if none is named."""
    return _loaded({"algorithm": {"name": "mezo"}}, Path(), "the command line", settings)


def _loaded(data: dict[str, Json], folder: Path, source: str, overrides: Sequence[str]) -> RunConfig:
    """See `load`.

    Args:
        data: what the config file holds.
        folder: where relative paths in it start.
        source: its name, for messages.
        overrides: see `load`.
    """
    options = _options(overrides)
    origin = {section: os.path.realpath(folder) for section in PATHS}
    if "task" in options:
        data["task"], folder = options.pop("task"), Path()
    given = _Given(source, source, options)
    if "algorithm" in options:
        other = yaml_file.parse(options.pop("algorithm"), "command line: algorithm")
        data["algorithm"] = {"name": other} if isinstance(other, str) else other
        given = dataclasses.replace(given, algorithm="command line")
    if isinstance(file := data.get("task"), str):
        task = task_file(file, folder)
        data["task"], given = yaml_file.read(task, "task file"), dataclasses.replace(given, task=str(task))
        origin["task"] = os.path.realpath(task.parent)
    if isinstance(known := data.get("origin", {}), dict):  # of a config that was read before, and saved
        overridden = {section: os.getcwd() for section, setting in PATHS.items() if setting in options}
        data["origin"] = origin | known | overridden
    return _build(data, given)


def from_dict(data: Mapping[str, Json], source: str) -> RunConfig:
    """`RunConfig.to_dict` read back; errors, the same as those of `load`, name ``source``."""
    return _build(data, _Given(source, source, {}))


@dataclass(frozen=True)
class _Given:
    """Where settings were given, for messages."""

    config: str
    task: str
    options: Mapping[str, str]
    """Setting -> text, from the command line."""
    algorithm: str | None = None
    """Of the whole section, if not in the config."""

    def where(self, name: str) -> str:
        if name in self.options:
            return "command line"
        section = name.split(".")[0]
        return self.task if section == "task" else (section == "algorithm" and self.algorithm) or self.config


def _options(overrides: Sequence[str]) -> dict[str, str]:
    """Setting -> text; of two for the same setting the last counts."""
    options = {}
    items = iter(overrides)
    for item in items:
        name, equals, value = item.removeprefix("--").partition("=")
        follower = None if equals or not item.startswith("--") else next(items, None)
        if not equals and follower is None:
            raise UserError(f"command line: {item!r} is no setting with a value, as in --train.steps=10")
        options[name] = value if follower is None else follower
    return options


def _build(data: Mapping[str, Json], given: _Given) -> RunConfig:
    chosen = {section: _chosen(section, data.get(section), given) for section in CHOICES}
    settings = all_settings(chosen)
    options = {option: _read_option(option, text, settings, chosen) for option, text in given.options.items()}
    _check_values(data, "", given)
    _check_values(options, "", given)
    try:
        return _adapter().validate_json(json.dumps(_filled(data, options, settings)), strict=True, extra="forbid")
    except ValidationError as error:
        faults: dict[str, str] = {}
        for detail in sorted(error.errors(include_url=False), key=lambda detail: detail["type"] != UNKNOWN):
            name, text = _fault(detail, settings, chosen)
            faults.setdefault(name, f"{given.where(name)}: {text}")  # one of each setting
        more = [f"... and {len(faults) - MAX_FAULTS} more"] if len(faults) > MAX_FAULTS else []
        if "algorithm.name" in given.options and any(name.startswith("algorithm.") for name in faults):
            more.append(OTHER_ALGORITHM.format(given.options["algorithm.name"]))
        raise UserError("\n".join([*list(faults.values())[:MAX_FAULTS], *more, HELP])) from error


def _chosen(section: str, held: object, given: _Given) -> str:
    """The name of the algorithm, or the kind of the task, that the config chose.

    Args:
        section: ``algorithm`` or ``task``.
        held: what the files have there.
        given: where settings were given.
    """
    name = f"{section}.{CHOICES[section].tag}"
    value = held.get(CHOICES[section].tag) if isinstance(held, dict) else held
    if section == "task" and not isinstance(held, dict):
        value = None  # refused below, as what is no section
    return choose(section, given.options.get(name, value), given.where(name))


@functools.cache
def _adapter() -> TypeAdapter[RunConfig]:
    return TypeAdapter(RunConfig)


def _read_option(name: str, text: str, settings: Mapping[str, Setting], chosen: Chosen) -> Json:
    """The value that a text on the command line stands for: text as it is where text is wanted, else YAML.

    Args:
        name: of the setting, dotted.
        text: what was given for it.
        settings: all settings, by dotted name.
        chosen: the algorithm and the kind of task.
    """
    if name not in settings:
        raise UserError(f"command line: {unknown(name, settings, chosen)}\n{HELP}")
    if settings[name].is_section:
        raise UserError(f"command line: {name} is a group of settings; give them one by one\n{HELP}")
    if settings[name].is_text:
        return None if text == "null" and settings[name].is_nullable else text
    return yaml_file.parse(text, f"command line: {name}: {shown(text)}")


def _check_values(value: Json, name: str, given: _Given, depth: int = 0) -> None:
    """Raises UserError for text that cannot be written down, and for nesting that no setting has.

    Args:
        value: a setting's, or a section.
        name: its dotted name.
        given: where settings were given.
        depth: how many sections and lists it lies in.
    """
    if depth > yaml_file.MAX_DEPTH:
        raise UserError(f"{given.where(name)}: {shown(name)}: nested more than {yaml_file.MAX_DEPTH} deep")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{given.where(name)}: {name}: must be text in UTF-8, not {value!r}\n{HELP}") from error
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        _check_values(key, name, given, depth)
        _check_values(item, f"{name}.{key}".removeprefix("."), given, depth + 1)


def _filled(
    data: Mapping[str, Json], options: Mapping[str, Json], settings: Mapping[str, Setting]
) -> dict[str, object]:
    """All settings in nested dicts: those on the command line before those of the files before the defaults.

    What is no setting, and a value where a section should be, stays for pydantic to refuse.

    Args:
        data: what the files hold.
        options: values from the command line, by dotted name.
        settings: all settings, by dotted name.
    """
    full: dict[str, object] = dict(data)
    sections: dict[str, object] = {"": full}
    for name, setting in settings.items():
        parent, _, last = name.rpartition(".")
        section = sections.get(parent)
        if not isinstance(section, dict):
            continue
        if setting.is_section:
            held = section.get(last, {})
            section[last] = sections[name] = dict(held) if isinstance(held, dict) else held
        elif name in options:
            section[last] = options[name]
        elif setting.default is not dataclasses.MISSING:
            section.setdefault(last, _default(setting, section, options, settings))
    return full


def _default(
    setting: Setting, section: Mapping[str, object], options: Mapping[str, Json], settings: Mapping[str, Setting]
) -> object:
    """The default of a setting, given the others of its section: of two rates one that is not given is the other."""
    if not setting.goes_along:
        return setting.default
    parent = setting.name.rpartition(".")[0]
    rates = [name for name, other in settings.items() if other.goes_along and name.rpartition(".")[0] == parent]
    given = (options.get(name, section.get(name.rpartition(".")[2])) for name in rates)
    return next((rate for rate in given if isinstance(rate, int | float)), setting.default)


def _fault(detail: ErrorDetails, settings: Mapping[str, Setting], chosen: Chosen) -> tuple[str, str]:
    """The setting that pydantic complains about, and the complaint for people.

    Args:
        detail: one of pydantic's complaints.
        settings: all settings, by dotted name.
        chosen: the algorithm and the kind of task.
    """
    place = list(detail["loc"])
    if place[:1] and place[0] in CHOICES:
        place[1:2] = []  # the name of the algorithm, or the kind of the task
    if detail["type"] != UNKNOWN and place and UNION_MEMBER.fullmatch(str(place[-1])):
        place.pop()
    names = [".".join(map(str, place[:depth])) for depth in range(len(place) + 1)]
    if detail["type"] == UNKNOWN and (len(place) == 1 or (names[-2] in settings and settings[names[-2]].is_section)):
        return names[-1], unknown(names[-1], settings, chosen)
    depth = max(depth for depth, name in enumerate(names) if not depth or name in settings)
    name, inner = names[depth], place[depth:]
    if detail["type"] == "value_error":
        return _contradiction(str(detail["ctx"]["error"]), name, settings)
    if settings[name].is_section:
        fields = ", ".join(field.name for field in dataclasses.fields(settings[name].kind))
        return name, f"{name}: must hold settings ({fields}), not {shown(detail['input'])}"
    wanted = describe(settings[name].kind)
    states = {UNKNOWN: "is unknown", "missing": "is missing"}
    if inner:
        state = states.get(detail["type"], f"is {shown(detail['input'])}")
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in inner)
        return name, f"{name}: must be {wanted}; {path} {state}"
    if detail["type"] == "missing":
        return name, f"{name}: missing; it must be {wanted}"
    return name, f"{name}: must be {wanted}, not {shown(detail['input'])}"


def _contradiction(message: str, section: str, settings: Mapping[str, Setting]) -> tuple[str, str]:
    """What a section says about its own settings, which it names as they are called inside it.

    Args:
        message: the section's.
        section: its dotted name.
        settings: all settings, by dotted name.
    """
    subject, colon, rest = message.partition(":")
    name = f"{section}.{subject}" if f"{section}.{subject}" in settings else subject
    return name, f"{name}{colon}{rest}"
