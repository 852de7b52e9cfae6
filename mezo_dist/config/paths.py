"""Relative paths in a config start at the folder of the file that they are written in (torch-free).

Those on the command line start at the current folder, as everywhere. What was meant is kept with the config
(`mezo_dist.config.schema.OriginConfig`), beside the paths as they were written: so a run folder works from anywhere,
and settings have the same digest wherever the files lie.
"""

from __future__ import annotations

import os
from pathlib import Path

from mezo_dist.errors import UserError

RANDOM = "random:"
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")


def located(name: str, origin: str | None, setting: str) -> str:
    """What ``name`` stands for, from wherever it is used: an absolute path, or a name that is no path.

    A name is a path if it looks like one, or if something is there; otherwise the hub knows it, or the demo assets do.

    Args:
        name: a setting's value.
        origin: the folder at which it starts; the current one if that is None, or no longer there.
        setting: its name, for messages.

    Raises:
        UserError: nothing is there, but in the current folder there is.
    """
    if name.startswith(RANDOM):
        return RANDOM + located(name.removeprefix(RANDOM), origin, setting)
    if os.path.isabs(os.path.expanduser(name)):
        return name
    folder = origin if origin is not None and os.path.isdir(origin) else os.getcwd()
    there = os.path.normpath(os.path.join(folder, name))
    if os.path.exists(there):
        return there
    if os.path.exists(name):
        raise UserError(
            f"{setting}: {name} starts at the folder of the file that it is written in ({folder}), and nothing is "
            f"there; if the one in the current folder is meant, write {os.path.relpath(name, folder)}"
        )
    return there if _looks_like_a_path(name) else name


def _looks_like_a_path(name: str) -> bool:
    return name.startswith(".") or name.count("/") > 1 or Path(name).suffix in DATA_SUFFIXES
