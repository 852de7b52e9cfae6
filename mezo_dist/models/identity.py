"""Digests of what belongs to a model beside its weights: config, code of its own, saved buffers, and tokenizer."""

from __future__ import annotations

import hashlib
import inspect
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mezo_dist.engines.fingerprint import buffers_digest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_NO_RESULTS = ("transformers_version", "_name_or_path", "name_or_path")
"""Entries of a model config that say where it is from, not what it computes."""


def config_digest(hf_config: PreTrainedConfig) -> str:
    """32 hexadecimal digits over every entry of a model config of transformers, defaults included."""
    return _digest(json.dumps(_kept(hf_config.to_dict()), sort_keys=True, default=str).encode())


def model_digest(model: PreTrainedModel, config: str) -> str:
    """32 hexadecimal digits over what a model computes with beside its weights.

    Args:
        model: loaded; its buffers have data.
        config: `config_digest` of its config.
    """
    digest = hashlib.blake2b(config.encode(), digest_size=16)
    digest.update(buffers_digest(model).encode())
    source = inspect.getsourcefile(type(model)) if type(model).__module__.startswith("transformers_modules") else None
    for path in sorted(Path(source).parent.glob("*.py")) if source else []:  # code that came with the checkpoint
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """32 hexadecimal digits over all that decides how a text becomes tokens.

    Call it before the tokenizer is used: a fast tokenizer remembers how it last truncated.
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


def _kept(value: object) -> object:
    if isinstance(value, dict):
        return {str(key): _kept(item) for key, item in value.items() if key not in _NO_RESULTS}
    return [_kept(item) for item in value] if isinstance(value, (list, tuple)) else value


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
