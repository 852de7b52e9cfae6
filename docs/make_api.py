"""Write docs/api.md: every public name of mezo_dist, with its signature and docstring.

python docs/make_api.py
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from pathlib import Path

import mezo_dist

TARGET = Path(__file__).with_name("api.md")
GROUPS = {
    "Training in a loop of your own": ["Optimizer", "shard", "join", "replay"],
    "Training in Hugging Face's Trainer": ["MeZOTrainer"],
    "Settings of the algorithms": ["MeZO", "MeZOSVRG", "MeZOSVRGReleased", "Schedule", "Annealing", "Momentum"],
    "Minimising any function": ["minimize", "Draw", "Minimum"],
    "Runs from config files": ["train", "load_run", "evaluate", "export"],
    "For those who go deeper": ["Law", "Combination", "Communicator"],
    "Errors": ["UserError", "LostRankError", "OutOfStepError", "Stopped"],
}


def document() -> str:
    """The contents of docs/api.md."""
    parts = [
        "# Public names\n",
        "All of these are attributes of `mezo_dist` and are loaded when they are first used. This page is written by "
        "`python docs/make_api.py` from the docstrings; a test holds it against them.\n",
    ]
    for title, names in GROUPS.items():
        parts.append(f"## {title}\n")
        parts += [_entry(name) for name in names]
    return "\n".join(parts)


def _entry(name: str) -> str:
    value = getattr(mezo_dist, name)
    methods = [
        f"#### `{name}.{method}`\n\n{_block(function, method)}"
        for method, function in vars(value).items()
        if inspect.isclass(value) and inspect.isfunction(function) and not method.startswith("_")
    ]
    return "\n".join([f"### `{name}`\n\n{_block(value, name)}", *methods])


def _block(value: object, name: str) -> str:
    signature = "" if inspect.isclass(value) and issubclass(value, Exception) else _signature(value)
    kind = "class" if inspect.isclass(value) else "def"
    return f"```text\n{kind} {name}{signature}\n\n{inspect.getdoc(value) or ''}{_fields(value)}\n```\n"


def _signature(value: object) -> str:
    """A parameter a line, as people write them."""
    signature = inspect.signature(value)  # type: ignore[arg-type]
    lines, keyword_only = [], False
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            lines.append("*")
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        keyword_only = keyword_only or stars == "*"
        annotation = "" if parameter.annotation is parameter.empty else f": {parameter.annotation}"
        lines.append(f"{stars}{parameter.name}{annotation}{_default(parameter)}")
    returns = signature.return_annotation
    arrow = "" if returns in (signature.empty, None, "None") or inspect.isclass(value) else f" -> {returns}"
    return f"(\n{''.join(f'    {line},{chr(10)}' for line in lines)}){arrow}" if lines else f"(){arrow}"


def _default(parameter: inspect.Parameter) -> str:
    default = parameter.default
    if default is parameter.empty:
        return ""
    if repr(default) == "<factory>":
        return " = ..."
    return f" = {getattr(default, '__name__', None) or repr(default)}"


def _fields(value: object) -> str:
    """The settings of a dataclass, which are documented below each field."""
    if not (inspect.isclass(value) and dataclasses.is_dataclass(value)):
        return ""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(value))).body
    assert isinstance(tree, ast.ClassDef)
    lines = [
        f"{ast.unparse(field.target)}: {' '.join(text.value.value.split())}"
        for field, text in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    ]
    return "".join(f"\n\n{textwrap.fill(line, 110, subsequent_indent='    ')}" for line in lines)


if __name__ == "__main__":
    TARGET.write_text(document(), encoding="utf-8")
