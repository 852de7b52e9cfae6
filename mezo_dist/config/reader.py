"""Reading configs: YAML files with command-line overrides, through jsonargparse (torch-free).

Strict, and with messages for people: jsonargparse checks the types; names are checked here before, since it words
unknown ones differently wherever they stand.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mezo_dist.algorithms import ALGORITHMS
from mezo_dist.config.schema import RunConfig
from mezo_dist.errors import UserError

if TYPE_CHECKING:
    import yaml
    from jsonargparse import ArgumentParser, Namespace

HELP = "`mezo-dist train --help` lists every setting"
MAX_BYTES = 1_000_000
MAX_DEPTH = 20
_BOOLS = ("True", "False")


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config file and apply overrides: ``--train.steps=10``, ``--train.steps 10`` or ``train.steps=10``.

    The task may be the path of a task file, relative to the config file's folder (as an override: to the current one).

    Raises:
        UserError: a file is missing or not YAML, a setting is unknown, missing, of the wrong type or contradicts
            another one. The message says where it was given, names it, and the nearest one that exists.
    """
    options = _options(overrides)
    data, folder = _read(Path(path), "config file"), Path(path).parent
    if "task" in options:
        data["task"], folder = options.pop("task"), Path()
    given = _Given(str(path), str(path), options)
    if isinstance(data.get("task"), str):
        task = folder / data["task"]
        data["task"], given = _read(task, "task file"), dataclasses.replace(given, task=str(task))
    return _build(data, given)


def from_dict(data: Mapping[str, Any], source: str) -> RunConfig:
    """`RunConfig.to_dict` read back; errors, the same as those of `load`, name ``source``."""
    return _build(data, _Given(source, source, {}))


def help_text(algorithm: str = "mezo-svrg") -> str:
    """Every setting with its meaning, type and default, for the terminal.

    Raises:
        UserError: there is no such algorithm.
    """
    algorithm = _algorithm_name({}, _Given("", "", {"algorithm.name": algorithm}))
    kinds = _settings(algorithm)
    made = _parser(algorithm)
    for name, group in (made.groups or {}).items():
        group.title, group.description = (name, group.title) if name in kinds else ("general", None)
    for action in made._actions:
        if action.dest == "task":
            action.metavar, action.help = "FILE", "Task file with the settings below, such as those in configs/tasks."
        elif dataclasses.is_dataclass(kinds.get(action.dest)) or action.dest not in kinds:
            action.help = argparse.SUPPRESS  # a section, or an option that only jsonargparse has
    return made.format_help().replace("``", "`")


@dataclass(frozen=True)
class _Given:
    """Where settings were given, for messages."""

    config: str
    task: str
    options: Mapping[str, str]

    def where(self, name: str) -> str:
        if any(f"{option}.".startswith(f"{name}.") for option in self.options):
            return "command line"
        return self.task if name.split(".")[0] == "task" else self.config


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


def _read(path: Path, what: str) -> dict[str, Any]:
    import jsonargparse
    import yaml

    if not path.is_file():
        raise UserError(f"{what} {path} does not exist (relative paths start at {Path.cwd()})")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{what} {path} is {path.stat().st_size:,} bytes; settings take less than {MAX_BYTES:,}")
    try:
        text = path.read_text(encoding="utf-8")
        _check_bombs(yaml.parse(text, yaml.SafeLoader), f"{what} {path}")
        data = jsonargparse.get_loader("yaml")(text)  # unlike yaml.safe_load, it takes 5e-5 for a number
        _check_repeats(yaml.compose(text, yaml.SafeLoader), f"{what} {path}")
    except UserError:
        raise
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
        TypeError,
    ) as error:  # TypeError: jsonargparse on keys of nothing
        raise UserError(f"{what} {path} is not YAML: {error}") from error
    if not isinstance(data, dict):
        found = "is empty" if data is None else f"holds {data!r}"
        raise UserError(f"{what} {path} {found}; it must hold settings, as in configs/quickstart.yaml")
    return data


def _check_bombs(events: Iterator[yaml.Event], source: str) -> None:
    """A few lines of aliases can stand for more than any memory holds, and deep nesting takes for ever to read."""
    import yaml

    depth = 0
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        where = f"{source}, line {event.start_mark.line + 1 if event.start_mark else '?'}"
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"{where}: aliases (*{event.anchor}) are not taken; write the value out")
        if depth > MAX_DEPTH:
            raise UserError(f"{where}: nested more than {MAX_DEPTH} deep; no setting is")


def _check_repeats(node: yaml.Node | None, source: str) -> None:
    """YAML readers let the last of two values win; here that is an error."""
    import yaml

    children = node.value if isinstance(node, yaml.CollectionNode) else []
    lines: dict[str, int] = {}
    for child in children:
        key, value = child if isinstance(child, tuple) else (None, child)
        if key is not None:
            line = key.start_mark.line + 1
            if key.value in lines:
                raise UserError(f"{source}: {key.value!r} is set twice, in line {lines[key.value]} and in line {line}")
            lines[key.value] = line
        _check_repeats(value, source)


def _build(data: Mapping[str, Any], given: _Given) -> RunConfig:
    algorithm = _algorithm_name(data, given)
    kinds = _settings(algorithm)
    for name in [*_names(data, "", kinds, given), *given.options]:
        if name not in kinds:
            raise UserError(f"{given.where(name)}: {_unknown(name, kinds, algorithm)}\n{HELP}")
    for name in given.options:
        if dataclasses.is_dataclass(kinds[name]):
            raise UserError(f"command line: {name} is a group of settings; give them one by one\n{HELP}")
    data = {**data, "algorithm": {**data.get("algorithm", {}), "name": algorithm}}
    made = _parser(algorithm)
    arguments = [f"--config={json.dumps(data)}", *(f"--{name}={value}" for name, value in given.options.items())]
    try:
        parsed = made.parse_args(arguments)
        _check_nulls(parsed, kinds)
        values = made.instantiate(parsed)
        return RunConfig(**{field.name: values[field.name] for field in dataclasses.fields(RunConfig)})
    except (argparse.ArgumentError, ValueError) as error:
        fault = _explain(str(error), kinds)
        raise UserError(f"{given.where(fault.split(':')[0])}: {fault}\n{HELP}") from error


def _parser(algorithm: str) -> ArgumentParser:
    """The parser of configs whose ``algorithm.name`` is ``algorithm``."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    made = jsonargparse.ArgumentParser(
        usage="mezo-dist train CONFIG [--SETTING VALUE ...]",
        description="CONFIG is a YAML file of the settings below; those on the command line count more.",
        epilog="Settings of another algorithm: mezo-dist train --help --algorithm.name=NAME",
        exit_on_error=False,
    )
    made.add_argument("--config", action="config")
    made.add_class_arguments(RunConfig, skip={"algorithm"})
    made.add_class_arguments(ALGORITHMS[algorithm][0], "algorithm", skip={"name"})
    groups = made.groups or {}
    groups["algorithm"].add_argument(
        "--algorithm.name",
        choices=sorted(ALGORITHMS),
        default=algorithm,
        help="The algorithm. Which other settings there are depends on it.",
    )
    return made


def _algorithm_name(data: Mapping[str, Any], given: _Given) -> str:
    """``algorithm.name``, looked up before the parser is built, since the algorithm's settings depend on it."""
    section = data.get("algorithm")
    name = given.options.get("algorithm.name", section.get("name") if isinstance(section, dict) else section)
    if name not in list(ALGORITHMS):  # a list: what is not hashable is no name either
        fault = "missing" if name is None else f"{name!r} does not exist"
        where = given.where("algorithm.name")
        raise UserError(f"{where}: algorithm.name: {fault}; choose one of {', '.join(sorted(ALGORITHMS))}\n{HELP}")
    return str(name)


def _settings(algorithm: str) -> dict[str, Any]:
    """Dotted name -> type of every setting; a section's type is its dataclass."""

    def walk(section: type, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, kind in typing.get_type_hints(section).items():
            kind = ALGORITHMS[algorithm][0] if prefix + name == "algorithm" else kind
            yield prefix + name, kind
            if dataclasses.is_dataclass(kind):
                yield from walk(kind, f"{prefix}{name}.")

    return dict(walk(RunConfig, ""))


def _names(section: Mapping[str, Any], prefix: str, kinds: Mapping[str, Any], given: _Given) -> Iterator[str]:
    """Dotted names of all settings in a file. Raises UserError for a value where a section of settings should be."""
    for key, value in section.items():
        name = f"{prefix}{key}"
        yield name
        if dataclasses.is_dataclass(kinds.get(name)):
            if not isinstance(value, dict):
                fields = ", ".join(field.name for field in dataclasses.fields(kinds[name]))
                raise UserError(f"{given.where(name)}: {name}: must hold settings ({fields}), not {value!r}\n{HELP}")
            yield from _names(value, f"{name}.", kinds, given)


def _unknown(name: str, kinds: Mapping[str, Any], algorithm: str) -> str:
    owners = [other for other in ALGORITHMS if name in _settings(other)]
    if owners:
        return f"{name} is a setting of {' and '.join(owners)}, not of {algorithm}; leave it out"
    section, _, leaf = name.rpartition(".")
    beside = [kind for kind in kinds if kind.rpartition(".")[0] == section]
    for candidates in (beside, list(kinds)):
        # Of settings with the same last part, the one nearest to the top: it comes last and stays.
        leaves = {kind.rpartition(".")[2]: kind for kind in sorted(candidates, key=lambda kind: -kind.count("."))}
        near = difflib.get_close_matches(leaf, leaves, n=1)
        if near:
            return f"unknown setting {name!r}; did you mean {leaves[near[0]]!r}?"
    return f"unknown setting {name!r}; there are {', '.join(beside or [k for k in kinds if '.' not in k])}"


def _check_nulls(parsed: Namespace, kinds: Mapping[str, Any]) -> None:
    for name, kind in kinds.items():
        if not dataclasses.is_dataclass(kind) and parsed[name] is None and type(None) not in typing.get_args(kind):
            raise ValueError(f"{name}: must be {_describe(kind)}, not null")


def _explain(message: str, kinds: Mapping[str, Any]) -> str:
    """jsonargparse's message about a value as ``setting: what it must be``."""
    names = re.findall(r'Parser key "([\w.]+)"', message)
    missing = re.search(r"arguments are required: (.*)", message)
    if names and names[0] in kinds:
        fault = f"{names[0]}: must be {_describe(kinds[names[0]])}"
        value = re.search(r"(?:Got|Given) value: (.*)", message)
        if value is None:
            return f"{fault}; {message.splitlines()[-1].strip()}"
        inner = f"; {names[-1]} is {value[1]}" if len(names) > 1 else f", not {value[1]}"
        return fault + inner + (" (quote yes, no, on, off: YAML reads true, false)" if value[1] in _BOOLS else "")
    return f"missing settings: {missing[1]}" if missing else message


def _describe(kind: Any) -> str:
    """What a value of a type looks like in a config file."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if kind in words:
        return words[kind]
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return f"a list of {_describe(arguments[0])}"
    if typing.get_origin(kind) is Literal:
        return " or ".join(arguments)
    if dataclasses.is_dataclass(kind):
        fields = [f"{name}: {_describe(item)}" for name, item in typing.get_type_hints(kind).items()]
        return f"{{{', '.join(fields)}}}"
    return " or ".join(_describe(argument) for argument in arguments)
