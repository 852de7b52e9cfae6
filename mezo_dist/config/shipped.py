"""The task files that ship with the package (torch-free)."""

from __future__ import annotations

import contextlib
import importlib
import re
from pathlib import Path

from mezo_dist.errors import UserError


def shipped_tasks() -> dict[str, Path]:
    """Name -> task file: ``configs/tasks`` of the repository, which an installation has as ``mezo_dist.configs``."""
    try:
        folders = [Path(path) for path in importlib.import_module("mezo_dist.configs").__path__]
    except ModuleNotFoundError:  # run from a checkout, without being installed
        folders = [Path(__file__).parents[2] / "configs"]
    return {path.stem: path for folder in folders for path in sorted((folder / "tasks").glob("*.yaml"))}


def task_file(name: str, folder: Path) -> Path:
    """The file that a config, or a command line, means by ``name``: a path from ``folder`` on, or a shipped task.

    Args:
        name: a path, or the name of a task that ships.
        folder: where relative paths start.

    Raises:
        UserError: a bare name that is neither a file nor a task that ships.
    """
    path = folder / name
    with contextlib.suppress(RuntimeError):  # no home folder
        path = folder / Path(name).expanduser()
    if not re.fullmatch(r"[\w-]{1,100}", name) or (path.exists() and not path.is_dir()):
        return path
    known = shipped_tasks()
    if name not in known:
        raise UserError(f"task: {name!r} is no file in {folder.resolve()}, and no task that ships: {', '.join(known)}")
    return known[name]
