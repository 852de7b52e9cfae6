"""Which files a checkpoint consists of: safetensors alone, each a regular file beside its index.

A model folder may come from anybody. transformers would follow its index wherever that leads, and unpickle what it
finds there; so the index is checked before transformers sees it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from mezo_dist.errors import UserError
from mezo_dist.json_types import JsonObject
from mezo_dist.storage.files import open_regular

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MOST_INDEX_BYTES = 64 << 20
"""Indices of the largest models have some ten MB."""

_CONVERT = (
    "only safetensors are read, for other formats are pickles or not of transformers; convert the model once, on a "
    "machine that you trust it with (AutoModel.from_pretrained(...).save_pretrained(FOLDER)), or name a revision that "
    "has them (model.revision; on the hub often refs/pr/1)"
)


def checkpoint_files(source: str, hf_config: PreTrainedConfig, revision: str | None) -> list[Path]:
    """The checkpoint's safetensors files; fetched if ``source`` is a hub name.

    A link may lead out of a folder (the hub's cache consists of links), but only to a regular file.

    Args:
        source: folder or hub name.
        hf_config: config of the model.
        revision: of a hub name.

    Raises:
        UserError: there are none, the folder holds adapters, or the index names something else than files that are
            there.
        OSError: the hub does not answer.
    """
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    options: JsonObject = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    _check_folder(source, hf_config)
    whole = cached_file(source, SAFE_WEIGHTS_NAME, **options)
    if whole is not None:
        return [_regular(Path(whole))]
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **options)
    if index is None:
        raise UserError(f"model.name: {source!r} has no {SAFE_WEIGHTS_NAME}: {_CONVERT}")
    names = _names(_regular(Path(index)))
    if Path(source).is_dir():
        return [_regular(Path(source) / name) for name in names]
    return [_fetched(source, name, revision) for name in names]


def _check_folder(source: str, hf_config: PreTrainedConfig) -> None:
    """transformers would read other files than those below if one of these were there."""
    if (Path(source) / "adapter_config.json").exists():
        raise UserError(
            f"model.name: {source} holds adapters, not a model: merge them into their base first "
            "(peft: merge_and_unload().save_pretrained(FOLDER))"
        )
    if (name := getattr(hf_config, "transformers_weights", None)) is not None:
        raise UserError(f"model.name: config.json of {source} names {name!r} as weights; remove transformers_weights")


def _names(index: Path) -> list[str]:
    """The file names in an index, each of which is plain."""
    try:
        with open_regular(index) as file:
            text = file.read(MOST_INDEX_BYTES + 1)
        if len(text) > MOST_INDEX_BYTES:
            raise ValueError(f"larger than {MOST_INDEX_BYTES:,} bytes")
        content = json.loads(text)["weight_map"]
        names = sorted(set(content.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"model.name: {index} cannot be read, or is no index of a checkpoint ({error!r})") from error
    for name in names:
        is_plain = isinstance(name, str) and Path(name).name == name and "\\" not in name and "\0" not in name
        if not is_plain or not name.endswith(".safetensors"):
            raise UserError(
                f"model.name: {index} names the file {name!r}; only names in the same folder that end in .safetensors "
                "are followed"
            )
    return names


def _regular(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"model.name: {path} is missing: the checkpoint is incomplete")
    if not path.is_file():
        raise UserError(f"model.name: {path} is not a regular file")
    return path


def _fetched(source: str, name: str, revision: str | None) -> Path:
    """A file of the hub, fetched.

    Args:
        source: hub name.
        name: of the file.
        revision: commit, branch or tag.
    """
    from transformers.utils import cached_file

    path = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    if path is None:
        raise UserError(f"model.name: the index of {source!r} names {name}, which is missing")
    return _regular(Path(path))
