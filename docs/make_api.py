"""Write docs/api.md: every public name of mezo_dist, with its signature and docstring.

    python docs/make_api.py
"""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path

import mezo_dist

TARGET = Path(__file__).with_name("api.md")
GROUPS = {
    "Training in a loop of your own": ["Optimizer", "shard", "join", "replay"],
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
    kind = "class" if inspect.isclass(value) else "def"
    signature = "" if inspect.isclass(value) and issubclass(value, Exception) else str(inspect.signature(value))
    shown = textwrap.fill(f"{kind} {name}{signature}", 110, subsequent_indent="    ", break_long_words=False)
    text = inspect.getdoc(value) or ""
    return f"### `{name}`\n\n```text\n{shown}\n```\n\n```text\n{text}{_fields(value)}\n```\n"


def _fields(value: object) -> str:
    """Settings are documented field by field, below each field."""
    if not (inspect.isclass(value) and hasattr(value, "__dataclass_fields__")):
        return ""
    from mezo_dist.config.docstrings import field_docstrings

    lines = [
        f"{name}: {' '.join(text.split())}" for name, text in field_docstrings(value).items() if not name.startswith("_")
    ]
    return "\n\n" + "\n".join(textwrap.fill(line, 110, subsequent_indent="    ") for line in lines)


if __name__ == "__main__":
    TARGET.write_text(document(), encoding="utf-8")
