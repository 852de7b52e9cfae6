"""Shapes of instantiated models, kept in the user's cache folder: a second answer does without transformers and torch.

A shape is a function of the contents of a config.json, of transformers' version, and of the code here that reads it off
a model. All three are in the name of the file that keeps it, so that what is out of date is never asked for. Files are
JSON with a digest of their contents; one that is damaged, or cannot be read or written, is no error: the model is
instantiated again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mezo_dist.assets.registry import cache_folder
from mezo_dist.json_types import JsonObject
from mezo_dist.planning.shapes import ModelShape, ModuleShape, UnitShape, WeightShape
from mezo_dist.storage.files import open_regular, replace_file

PACKAGE = Path(__file__).parents[1]
SOURCES = ("planning/instantiated.py", "planning/kept_shapes.py", "planning/shapes.py", "engines/units.py",
           "engines/hooked.py")  # fmt: skip
"""The code that says what a shape is."""


def kept_shape(contents: Mapping[str, Any], name: str) -> ModelShape | None:
    """The shape of a model that was instantiated before; None if there is none.

    Args:
        contents: of its config.json.
        name: of the model, for people.
    """
    try:
        with open_regular(_path(contents)) as file:
            kept = json.loads(file.read())
        return _shape(kept["shape"], name) if kept["digest"] == _digest(kept["shape"]) else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def keep_shape(contents: Mapping[str, Any], shape: ModelShape) -> None:
    """Keep ``shape`` for `kept_shape`, if that is possible.

    Args:
        contents: of its model's config.json.
        shape: what was read off the model.
    """
    fields = {**dataclasses.asdict(shape), "name": ""}
    path = _path(contents)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps({"digest": _digest(fields), "shape": fields}).encode())
    except OSError:
        return  # a full or foreign disk costs seconds the next time, and nothing now


def _path(contents: Mapping[str, Any]) -> Path:
    code = [(PACKAGE / source).read_bytes().hex() for source in SOURCES]
    return cache_folder() / "shapes" / f"{_digest([contents, version('transformers'), code])}.json"


def _digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def _shape(fields: JsonObject, name: str) -> ModelShape:
    """From `dataclasses.asdict` as JSON keeps it, and back."""
    units = tuple(
        UnitShape(tuple(_module(module) for module in unit["modules"]), unit["stays"], unit["is_block"])
        for unit in fields["units"]
    )
    return ModelShape(**{**fields, "units": units, "name": name})


def _module(fields: JsonObject) -> ModuleShape:
    weights = (WeightShape(w["name"], tuple(w["shape"]), w["trainable"]) for w in fields["weights"])
    return ModuleShape(fields["kind"], tuple(weights))
