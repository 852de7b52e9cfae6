"""From what people call a model to its shape: a named shape, a folder, a config.json, a demo model, or a hub name."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mezo_dist.assets.registry import is_demo, resolve_model
from mezo_dist.errors import UserError, printable
from mezo_dist.planning.families import shape_of_config
from mezo_dist.planning.kept_shapes import keep_shape, kept_shape
from mezo_dist.planning.named import NAMED
from mezo_dist.planning.shapes import ModelShape

LARGEST = 2**24
"""Bytes of a config.json that is read."""
PATIENCE_S = 5.0
"""Seconds to wait for the hub."""


def find_shape(name: str, notes: list[str]) -> ModelShape:
    """The shape of a model, by formula where its architecture is written down, else by transformers, whose answers are
    kept. No weight is read.

    Args:
        name: a named shape, folder, config.json, demo model or hub name. A hub name that ends in a named shape
            (``facebook/opt-125m``) is that shape.
        notes: gets what people must know.

    Raises:
        UserError: there is no such model, or its config cannot be read.
    """
    path = resolve_model(name) if is_demo(name) else Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"MODEL: the folder {name} has no config.json")
        return _of_contents(_read(path / "config.json"), name, notes)
    if path.is_file():
        return _of_contents(_read(path), name, notes)
    short = name.rpartition("/")[2].lower()
    if short in NAMED:
        if "/" in name:
            notes.append(f"{name} is taken for the shape {short} that ships; nothing was read from the hub")
        return _of_contents(NAMED[short], name, notes)
    return _of_contents(_of_hub(name), name, notes)


def _of_contents(contents: Mapping[str, Any], name: str, notes: list[str]) -> ModelShape:
    if contents.get("quantization_config"):
        notes.append(f"the weights of {name} are quantised (quantization_config); they are counted as if they were not")
    shape = shape_of_config(contents, name) or kept_shape(contents, name)
    if shape is not None:
        return shape
    kind = contents.get("model_type")
    print(f"{printable(name)}: transformers makes an empty model of its architecture (model_type: {kind!r}), which "
          "takes some seconds the first time ...", file=sys.stderr)  # fmt: skip
    from mezo_dist.planning.instantiated import shape_of_contents

    shape = shape_of_contents(contents, name)
    keep_shape(contents, shape)
    return shape


def _read(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > LARGEST:
            raise ValueError("it is too large")
        return _parsed(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"MODEL: {file} is no readable config.json ({error})") from error


def _parsed(content: bytes) -> dict[str, Any]:
    contents = json.loads(content)
    if not isinstance(contents, dict):
        raise ValueError("it holds no JSON object")
    return contents


def _of_hub(name: str) -> dict[str, Any]:
    """The config of a model of the hub: from the hub's cache, or the hub itself."""
    from huggingface_hub import hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]

    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError as error:
        raise UserError(_unknown(name, "no folder has that name, and no model of the hub can")) from error
    if isinstance(cached, str):
        return _read(Path(cached))
    try:
        url = hf_hub_url(name, "config.json")
        answer = get_session().get(url, headers=build_hf_headers(), timeout=PATIENCE_S, follow_redirects=True)
        answer.raise_for_status()
        return _parsed(answer.content[: LARGEST + 1])
    except Exception as error:  # whichever HTTP library the hub's client uses
        raise UserError(_unknown(name, f"the hub says: {str(error).partition(chr(10))[0]}")) from error


def _unknown(name: str, reason: str) -> str:
    near = difflib.get_close_matches(name.rpartition("/")[2].lower(), NAMED, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else "."
    return f"MODEL: {name!r} is no folder, config.json or named shape; {reason}{hint} Named shapes: {', '.join(NAMED)}"
