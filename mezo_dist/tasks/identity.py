"""What the rows of a task's splits are a function of: the content of its data, and its settings."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mezo_dist.assets.registry import is_demo, resolve_data
from mezo_dist.config.task import TaskSettings
from mezo_dist.config.values import ClassIndex
from mezo_dist.tasks.files import TYPES, content_digest, local_files
from mezo_dist.tasks.rows import SPLITS, is_saved, load_tables

WHERE_THEY_ARE = ("data", "subset", "revision")
"""Settings that say where the rows are; what they are is digested."""


def identity_of(task: TaskSettings, *more: str) -> str:
    """64 hexadecimal digits: equal for two tasks only if the same rows are in their splits, and the same is asked.

    Args:
        task: the settings.
        more: what else is to make a difference.

    Raises:
        UserError: there are no such data.
        OSError: they cannot be read.
    """
    used = {getattr(task.splits, name).source for name in SPLITS}
    digests = {name: digest for name, digest in _digests(task, used).items() if name in used}
    settings = {name: value for name, value in dataclasses.asdict(task).items() if name not in WHERE_THEY_ARE}
    facts = [sorted(digests.items()), settings, *more]
    return hashlib.blake2b(json.dumps(facts, sort_keys=True, default=repr).encode(), digest_size=32).hexdigest()


def _digests(task: TaskSettings, used: set[str]) -> Mapping[str, str]:
    """Digests of the sources of a data set, by name; at least of those in ``used``."""
    path = Path(task.data).expanduser()
    if is_demo(task.data):
        files = resolve_data(task.data)
    elif not is_saved(path) and (path.suffix in TYPES or path.exists()):
        files = local_files(path)
    else:
        tables = load_tables(task.data, task.subset, task.revision)
        return {name: table.digest() for name, table in tables.items() if name in used}
    return {name: f"{file.suffix} {content_digest(file)}" for name, file in files.items() if name in used}


# A row as JSON, if it can be had back


def packed(value: Any) -> Any:
    """A row, or a value in one, as values of JSON of which `unpacked` makes it again.

    Raises:
        TypeError: it holds what JSON has no words for (a date, bytes).
    """
    if isinstance(value, ClassIndex):
        return {"class": [int(value), value.name]}
    if isinstance(value, Mapping):
        return {"fields": [[packed(name), packed(inside)] for name, inside in value.items()]}
    if isinstance(value, list):
        return {"list": [packed(inside) for inside in value]}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(type(value).__name__)


def unpacked(value: Any) -> Any:
    """See `packed`. Raises KeyError, TypeError or ValueError for what it did not make."""
    if not isinstance(value, dict):
        return value
    if "class" in value:
        return ClassIndex(*value["class"])
    if "list" in value:
        return [unpacked(inside) for inside in value["list"]]
    return {unpacked(name): unpacked(inside) for name, inside in value["fields"]}
