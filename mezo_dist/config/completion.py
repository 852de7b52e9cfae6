"""Shell completion: scripts for bash, zsh and fish, written from the commands and the settings (torch-free).

The scripts are static. A TAB starts no Python, whose imports would take a third of a second, and the command starts as
fast as without: argcomplete would do the former, and shtab's bash script does not complete `--law=gau`, as bash cuts
words at "=".
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mezo_dist.algorithms import EVERY
from mezo_dist.config.help import meanings
from mezo_dist.config.kinds import KINDS
from mezo_dist.config.settings import Setting, all_settings, choices
from mezo_dist.config.shipped import shipped_tasks

Shell = Literal["bash", "zsh", "fish"]
SHELLS: tuple[Shell, ...] = ("bash", "zsh", "fish")
FILE_SETTINGS = ("model.name", "task", "task.data", "layout.ds_config", "output.dir")
"""Settings whose values are paths."""
FILE_METAVARS = ("MODEL", "CONFIG", "RUN", "DATA", "TASK", "FILE", "FOLDER", "MODEL|CONFIG")
"""Words for arguments that are paths, or may be."""
LONGEST = 60
"""Characters of an explanation."""


@dataclass(frozen=True)
class Option:
    """What may stand in a command line."""

    name: str
    """With its dashes; empty for what has a place and no name."""
    values: tuple[str, ...] = ()
    """Words that it may be, or that may follow it."""
    takes_file: bool = False
    takes_value: bool = True
    about: str = ""


def script(shell: Shell, parser: argparse.ArgumentParser) -> str:
    """The script that a shell is to read.

    Args:
        shell: its name.
        parser: of the command line, without the settings of ``train``.
    """
    commands = {name: list(_options(command)) for name, command in _walk(parser)}
    commands["train"] = [Option("", takes_file=True), *_settings(), *TRAIN]
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](commands)


TRAIN = (
    Option("--dry-run", takes_value=False, about="check, take three steps, predict"),
    Option("--force-new", takes_value=False, about="replace the run in the folder"),
    Option("--help", takes_value=False, about="explain the settings"),
)


def _walk(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command (``tasks show``) with its parser; the first is the program itself."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, inner in action.choices.items():
                yield from _walk(inner, f"{name} {command}".strip())


def _options(parser: argparse.ArgumentParser) -> Iterator[Option]:
    for action in parser._actions:
        if action.help == argparse.SUPPRESS:
            continue
        metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
        values = tuple(map(str, action.choices or ()))
        takes_file = metavar in FILE_METAVARS
        about = _short(action.help or "")
        for name in [option for option in action.option_strings if option.startswith("--")] or [""]:
            yield Option(name, values, takes_file, action.nargs != 0, about)


def _settings() -> Iterator[Option]:
    """All settings, of every algorithm and kind of task; where they share a name, all values that one of them takes."""
    settings: dict[str, Option] = {}
    for algorithm in EVERY:
        for kind in KINDS:
            for setting in all_settings({"algorithm": algorithm, "task": kind}).values():
                if (setting.name != "task" and setting.is_section) or setting.name.startswith("origin."):
                    continue
                values = _values(setting)
                known = settings.get(setting.name)
                if known is not None:
                    values = tuple(dict.fromkeys([*known.values, *values]))
                takes_file = setting.name in FILE_SETTINGS
                settings[setting.name] = Option(f"--{setting.name}", values, takes_file, about=_meaning(setting))
    yield from settings.values()


def _values(setting: Setting) -> tuple[str, ...]:
    special = {"task": shipped_tasks, "algorithm.name": lambda: sorted(EVERY), "task.kind": lambda: list(KINDS)}
    return tuple(special.get(setting.name, lambda: choices(setting.kind))())


def _meaning(setting: Setting) -> str:
    if setting.name == "task":
        return "a task that ships, or a task file"
    return _short(meanings(setting.owner).get(setting.name.rpartition(".")[2], ""))


def _short(text: str) -> str:
    """The first sentence, or its beginning, without what shells would take for quotes."""
    sentence = re.split(r"(?<=[.:;])\s", " ".join(text.replace("`", "").replace("'", "").split()))[0].rstrip(".:;")
    return sentence if len(sentence) <= LONGEST else f"{sentence[: LONGEST - 3]}..."


def _bash(commands: dict[str, list[Option]]) -> str:
    """Words by command, values by command and option, in two functions of one ``case`` each."""
    words, values = list[str](), list[str]()
    for command, options in commands.items():
        names = [f"{o.name}=" if o.takes_value else o.name for o in options if o.name]
        words.append(f"    {shlex.quote(command)}) echo {shlex.quote(' '.join(names))} ;;")
        for option in options:
            listed = " ".join([*option.values, *(["FILES"] if option.takes_file else [])])
            if listed:
                values.append(f"    {shlex.quote(f'{command} {option.name}')}) echo {shlex.quote(listed)} ;;")
    parents = " ".join(sorted({command.split()[0] for command in commands if " " in command}))
    return (
        BASH.replace("@OPTIONS@", "\n".join(words)).replace("@VALUES@", "\n".join(values)).replace("@PARENTS@", parents)
    )


BASH = r"""# bash completion of mezo-dist, written by `mezo-dist completion bash`
_mezo_dist_options() {
  case "$1" in
@OPTIONS@
  esac
}
_mezo_dist_values() {
  case "$1" in
@VALUES@
  esac
}
_mezo_dist() {
  local word="${COMP_WORDS[COMP_CWORD]}" before="" command="" part i
  # bash makes words of their own of "=" and what follows it
  if [[ $word == "=" ]]; then word="" before="${COMP_WORDS[COMP_CWORD-1]}"
  elif ((COMP_CWORD > 1)) && [[ ${COMP_WORDS[COMP_CWORD-1]} == "=" ]]; then before="${COMP_WORDS[COMP_CWORD-2]}"
  elif ((COMP_CWORD > 1)) && [[ ${COMP_WORDS[COMP_CWORD-1]} == --* ]]; then before="${COMP_WORDS[COMP_CWORD-1]}"
  elif [[ $word == --*=* ]]; then before="${word%%=*}" word="${word#*=}"
  fi
  for ((i = 1; i < COMP_CWORD; i++)); do
    part="${COMP_WORDS[i]}"
    [[ $part == -* || $part == "=" || ${COMP_WORDS[i-1]} == "=" ]] && continue
    if [[ -z $command ]]; then command="$part"
    elif [[ " @PARENTS@ " == *" $command "* && -n $(_mezo_dist_options "$command $part") ]]; then
      command="$command $part"
    fi
  done
  COMPREPLY=()
  if [[ $word == -* && ( -z $before || -z $(_mezo_dist_values "$command $before") ) ]]; then
    mapfile -t COMPREPLY < <(compgen -W "$(_mezo_dist_options "$command")" -- "$word")
    compopt -o nospace 2>/dev/null
    [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} != *= ]] && compopt +o nospace 2>/dev/null
    return 0
  fi
  local values; values="$(_mezo_dist_values "$command $before")"
  if [[ " $values " == *" FILES "* ]]; then
    compopt -o filenames 2>/dev/null
    mapfile -t COMPREPLY < <(compgen -f -- "$word")
  fi
  mapfile -t -O "${#COMPREPLY[@]}" COMPREPLY < <(compgen -W "${values//FILES/}" -- "$word")
}
complete -F _mezo_dist mezo-dist
"""


def _zsh(commands: dict[str, list[Option]]) -> str:
    """A function for each command, by zsh's own `_arguments`; commands inside others by the function of the outer
    one."""
    functions = []
    for command, options in commands.items():
        inner = {name.rpartition(" ")[2]: name for name in commands if name and name.rpartition(" ")[0] == command}
        specs = [_zsh_spec(option) for option in options if option.name or not inner]
        tail = ""
        if inner:
            cases = " ".join(f"{name}) {_function(full)} ;;" for name, full in inner.items())
            specs += [f"'1:command:({' '.join(inner)})'", "'*::argument:->inner'"]
            tail = f'  [[ $state == inner ]] && case "$line[1]" in {cases} esac\n'
        listed = " \\\n    ".join(specs)
        functions.append(f"{_function(command)}() {{\n  local state line\n  _arguments -C \\\n    {listed}\n{tail}}}")
    return ZSH.replace("@FUNCTIONS@", "\n".join(functions))


ZSH = r"""#compdef mezo-dist
# zsh completion of mezo-dist, written by `mezo-dist completion zsh`
_mezo_dist_or_files() { _alternative "values:value:($*)" 'files:file:_files' }
@FUNCTIONS@
if [[ $funcstack[1] == _mezo-dist ]]; then _mezo_dist "$@"; else compdef _mezo_dist mezo-dist; fi
"""


def _function(command: str) -> str:
    return f"_mezo_dist_{command}".replace(" ", "_").rstrip("_")


def _zsh_spec(option: Option) -> str:
    """As `_arguments` takes it."""
    about, words = re.sub(r"([\[\]:\\])", r"\\\1", option.about), f"({' '.join(option.values)})"
    action = " "
    if option.values and option.takes_file:
        action = f" _mezo_dist_or_files {' '.join(option.values)}"  # a space: no further arguments
    elif option.values or option.takes_file:
        action = "_files" if option.takes_file else words
    if not option.name:
        return shlex.quote(f"*:argument:{action}")
    return shlex.quote(f"{option.name}=[{about}]:value:{action}" if option.takes_value else f"{option.name}[{about}]")


def _fish(commands: dict[str, list[Option]]) -> str:
    """A line for each option."""
    lines = ["# fish completion of mezo-dist, written by `mezo-dist completion fish`", "complete -c mezo-dist -f"]
    for command, options in commands.items():
        seen = "; and ".join(f"__fish_seen_subcommand_from {part}" for part in command.split())
        inner = [name.rpartition(" ")[2] for name in commands if name and name.rpartition(" ")[0] == command]
        if inner and command:
            seen += f"; and not __fish_seen_subcommand_from {' '.join(inner)}"
        for option in options:
            line = f"complete -c mezo-dist -n {shlex.quote(seen or '__fish_use_subcommand')}"
            if option.name:
                line += f" -l {option.name.removeprefix('--')}"
                line += (" -r -F" if option.takes_file else " -x") if option.takes_value else ""
                line += f" -d {shlex.quote(option.about)}" if option.about else ""
            else:
                line += " -F" if option.takes_file else ""
            if option.values:
                line += f" -a {shlex.quote(' '.join(option.values))}"
            lines.append(line)
    return "\n".join(lines) + "\n"
