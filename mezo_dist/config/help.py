"""The text of ``mezo-dist train --help``: every setting, explained by the docstring under its field (torch-free)."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import itertools
import sys
import typing

from mezo_dist.algorithms import EVERY
from mezo_dist.config.kinds import DEFAULT_KIND, KINDS
from mezo_dist.config.settings import Chosen, Setting, all_settings, choices, choose, describe
from mezo_dist.config.task import TaskSettings
from mezo_dist.config.yaml_file import shown

EPILOG = "Settings of another algorithm: mezo-dist train --help --algorithm.name=NAME\n"


def help_text(algorithm: str = "mezo-svrg") -> str:
    """Every setting with its meaning, type and default, for the terminal.

    Raises:
        UserError: there is no such algorithm.
    """
    parser = argparse.ArgumentParser(
        usage="mezo-dist train CONFIG [--SETTING VALUE ...]",
        description="CONFIG is a YAML file of the settings below; those on the command line count more.",
        add_help=False,
    )
    groups = {"": parser.add_argument_group("general")}
    chosen = {"algorithm": choose("algorithm", algorithm, "command line"), "task": DEFAULT_KIND}
    for setting in all_settings(chosen).values():
        if setting.name == "task":
            setting = dataclasses.replace(setting, kind=TaskSettings)
        if setting.is_section:
            groups[setting.name] = parser.add_argument_group(setting.name, _about(setting.kind))
        if setting.name == "task" or not (setting.is_section or setting.owner in KINDS.values()):
            _add(groups[setting.name if setting.is_section else setting.name.rpartition(".")[0]], setting)
    kinds = (_kind_help(kind, {**chosen, "task": kind}) for kind in KINDS)
    return "\n".join([parser.format_help(), *kinds, EPILOG])


def _kind_help(kind: str, chosen: Chosen) -> str:
    """The settings that tasks of one kind have beside the common ones, by a parser of their own: kinds share names."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
    group = parser.add_argument_group(f"task, kind: {kind}", _about(KINDS[kind]))
    for setting in all_settings(chosen).values():
        if setting.owner is KINDS[kind]:
            _add(group, setting)
    return parser.format_help()


def _add(group: argparse._ArgumentGroup, setting: Setting) -> None:
    words, explanation = _explained(setting)
    group.add_argument(f"--{setting.name}", metavar=words, help=_plain(explanation))


def _about(section: type) -> str:
    return _plain((inspect.getdoc(section) or "").partition("\n\n")[0])


def _explained(setting: Setting) -> tuple[str, str]:
    """What stands for its value, and what is said about it."""
    if setting.name == "task":
        return "FILE", "Task file with the settings below, such as those in configs/tasks."
    if setting.name == "algorithm.name":
        listed = ",".join(sorted(EVERY))
        return f"{{{listed}}}", "The algorithm. Which other settings there are depends on it. (required)"
    listed = ",".join(choices(setting.kind))
    if setting.name == "task.kind" and setting.default != DEFAULT_KIND:
        return f"{{{listed}}}", f"{meanings(setting.owner)['kind']} (default: {DEFAULT_KIND}, so it must be set)"
    kind = "" if listed else f"{describe(setting.kind)}; "
    default = "required" if setting.default is dataclasses.MISSING else f"default: {shown(setting.default)}"
    return (
        f"{{{listed}}}" if listed else _metavar(setting.kind),
        f"{meanings(setting.owner)[setting.name.rpartition('.')[2]]} ({kind}{default})",
    )


def _metavar(kind: type) -> str:
    first = next((item for item in typing.get_args(kind) if item is not type(None)), kind)
    if typing.get_origin(kind) is tuple:
        return "[ITEM,...]"
    if typing.get_origin(kind) is dict:
        return "{FIELD:[ITEM,...]}"
    return {int: "N", float: "X"}.get(first, "TEXT")


def _plain(text: str) -> str:
    """Without markup, and with the percent signs that argparse asks for."""
    return text.replace("``", "`").replace("%", "%%")


def meanings(section: type) -> dict[str, str]:
    """Field -> the docstring under it. Python does not keep those, so they are read from the source."""
    body = _classes(section.__module__)[section.__qualname__].body
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


@functools.cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
