"""Digests of what belongs to a model beside its weights: its config, and its tokenizer."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

_NO_RESULTS = ("transformers_version", "_name_or_path", "name_or_path")
"""Entries of a model config that say where it is from, not what it computes."""


def config_digest(hf_config: Any) -> str:
    """32 hexadecimal digits over every entry of a model config of transformers, defaults included."""
    return _digest(json.dumps(_kept(hf_config.to_dict()), sort_keys=True, default=str).encode())


def tokenizer_digest(tokenizer: Any) -> str:
    """32 hexadecimal digits over all that decides how a text becomes tokens.

    It must be asked for before the tokenizer is used: a fast one remembers how it last truncated.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is not None:
        files = [core.to_str()]
    else:  # one written in Python says what it knows only in the files that it saves
        with tempfile.TemporaryDirectory() as folder:
            saved = sorted(map(str, tokenizer.save_vocabulary(folder)))
            files = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in saved]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    facts = [type(tokenizer).__name__, sorted(tokenizer.get_added_vocab().items()), special, files]
    return _digest(json.dumps(facts, sort_keys=True).encode())


def _kept(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _kept(item) for key, item in value.items() if key not in _NO_RESULTS}
    return [_kept(item) for item in value] if isinstance(value, (list, tuple)) else value


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
