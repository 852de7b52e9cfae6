"""The text of ``mezo-dist train --help``: every setting, explained by the docstring under its field (torch-free)."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import sys
import typing
from collections.abc import Sequence

from mezo_dist.algorithms import EVERY
from mezo_dist.config.kinds import DEFAULT_KIND, KINDS
from mezo_dist.config.settings import Chosen, Setting, all_settings, choices, choose, describe
from mezo_dist.config.task import TaskSettings
from mezo_dist.config.yaml_file import shown
from mezo_dist.errors import UserError

EPILOG = "Settings of another algorithm: mezo-dist train --help --algorithm.name=NAME\n"
GENERAL = "general"
"""Name of the section of the settings that stand in none."""
USAGE = "mezo-dist train CONFIG [--dry-run] [--SETTING VALUE ...]\n       mezo-dist train --help [SECTION]"
ABOUT = """\
CONFIG is a YAML file of the settings below; those on the command line count more. With ``--dry-run`` everything is
checked, three steps are taken, the time and the memory of the run are predicted, and nothing is left behind.
``--force-new`` stands for --output.if_exists=replace. Sections: {}."""


def help_text(algorithm: str = "mezo-svrg", section: str | None = None) -> str:
    """Every setting with its meaning, type and default, for the terminal.

    Args:
        algorithm: the one whose settings are shown.
        section: dotted name of the only section, or setting, to show; all if None.

    Raises:
        UserError: there is no such algorithm, or no such section.
    """
    chosen = {"algorithm": choose("algorithm", algorithm, "command line"), "task": DEFAULT_KIND}
    settings = all_settings(chosen)
    sections = [setting.name for setting in settings.values() if setting.is_section]
    about = _plain(ABOUT.format(", ".join([GENERAL, *sections])))
    parser = argparse.ArgumentParser(usage=USAGE if section is None else argparse.SUPPRESS, add_help=False,
                                     description=about if section is None else None)  # fmt: skip
    held: dict[str, list[Setting]] = {GENERAL: [], **{name: [] for name in sections}}
    for setting in settings.values():
        if setting.name == "task":
            held["task"].append(dataclasses.replace(setting, kind=TaskSettings))
        elif not setting.is_section and setting.owner not in KINDS.values():
            held[setting.name.rpartition(".")[0] or GENERAL].append(setting)
    for name, inside in held.items():
        kind = TaskSettings if name == "task" else None if name == GENERAL else settings[name].kind
        _add_group(parser, name, kind, inside, section)
    kinds = [text for kind in KINDS if (text := _kind_help(kind, {**chosen, "task": kind}, section))]
    texts = [text for text in (parser.format_help(), *kinds) if text]
    if not texts:
        near = difflib.get_close_matches(str(section), [*sections, *settings], 1)
        hint = f"; did you mean {near[0]!r}" if near else ""
        if section in EVERY:
            hint = f"; give --algorithm.name={section} --help algorithm"
        raise UserError(
            f"--help: there is no section or setting {section!r}{hint}; sections are {', '.join([GENERAL, *sections])}"
        )
    return "\n".join(texts if section is not None else [*texts, EPILOG])


def _is_within(name: str, section: str | None) -> bool:
    """Whether a setting is in a section, or is what the section names."""
    if section == GENERAL:
        return "." not in name and name != "task"
    return section is None or name == section or name.startswith(f"{section}.")


def _kind_help(kind: str, chosen: Chosen, section: str | None) -> str:
    """The settings that tasks of one kind have beside the common ones, by a parser of their own: kinds share names.

    Args:
        kind: of the tasks.
        chosen: the kind, and an algorithm.
        section: see `help_text`.

    Returns:
        Empty if the section holds none of them.
    """
    inside = [setting for setting in all_settings(chosen).values() if setting.owner is KINDS[kind]]
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
    _add_group(parser, f"task, kind: {kind}", KINDS[kind], inside, section)
    return parser.format_help()


def _add_group(
    parser: argparse.ArgumentParser, title: str, kind: type | None, inside: Sequence[Setting], section: str | None
) -> None:
    """Add the settings of a section, if there are such.

    Args:
        parser: shows them.
        title: of the group.
        kind: the section's dataclass, if it is one.
        inside: settings that stand in it.
        section: see `help_text`; other settings are left out.
    """
    wanted = [setting for setting in inside if _is_within(setting.name, section)]
    if wanted:
        group = parser.add_argument_group(title, None if kind is None else _about(kind))
        for setting in wanted:
            _add(group, setting)


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
