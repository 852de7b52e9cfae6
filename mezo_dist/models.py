"""Loading unmodified Hugging Face models and their tokenisers."""

from __future__ import annotations

import fnmatch
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mezo_dist.assets import is_demo, resolve_model
from mezo_dist.config import ModelConfig
from mezo_dist.directions.seeds import derive_seed
from mezo_dist.errors import UserError
from mezo_dist.tasks.prompts import Kind

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode with its tokeniser."""

    model: nn.Module
    tokenizer: Any
    kind: Kind
    window: int
    """Longest sequence that the model takes, in tokens."""
    pad_id: int


def load_model(config: ModelConfig, *, num_labels: int, seed: int) -> Loaded:
    """Load model and tokeniser in ``config.weights``.

    Args:
        config: which model.
        num_labels: size of a fresh classification head.
        seed: run seed; a fresh head is drawn from it, so that all ranks draw the same.

    Raises:
        UserError: the model cannot be found or loaded, or has no head of the wanted kind.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    source = str(resolve_model(config.name)) if is_demo(config.name) else config.name
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        hf_config = transformers.AutoConfig.from_pretrained(source, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        kind = _kind(config, hf_config)
        model = _build(source, kind, num_labels, seed, {"dtype": getattr(torch, config.weights), **options})
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"model.name: {config.name!r} could not be loaded: {_first_lines(error)}") from error
    if kind == "masked" and tokenizer.mask_token is None:
        raise UserError(f"model.kind: the tokeniser of {config.name!r} has no mask token; use kind: causal")
    pad_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    model.config.pad_token_id = pad_id
    model.config.use_cache = False
    _freeze(model, config)
    return Loaded(model.eval(), tokenizer, kind, _window(tokenizer, hf_config), pad_id)


def _build(source: str, kind: Kind, num_labels: int, seed: int, options: dict[str, Any]) -> Any:
    import transformers

    if kind == "causal":
        return transformers.AutoModelForCausalLM.from_pretrained(source, **options)
    if kind == "masked":
        return transformers.AutoModelForMaskedLM.from_pretrained(source, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "fresh head") % 2**63)
        return transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=num_labels, **options)


def _freeze(model: nn.Module, config: ModelConfig) -> None:
    names = [name for name, _ in model.named_parameters()]
    for pattern in config.freeze:
        if not fnmatch.filter(names, pattern):
            raise UserError(f"model.freeze: {pattern!r} matches no weight; names look like {names[:3]}")
    for name, tensor in model.named_parameters():
        tensor.requires_grad_(not any(fnmatch.fnmatchcase(name, pattern) for pattern in config.freeze))
    if not any(tensor.requires_grad for tensor in model.parameters()):
        raise UserError(f"model.freeze: {list(config.freeze)} freezes every weight; nothing is left to train")


def _kind(config: ModelConfig, hf_config: Any) -> Kind:
    if config.head == "classifier":
        return "classifier"
    if config.kind != "auto":
        return config.kind
    architectures = getattr(hf_config, "architectures", None) or []
    if any("MaskedLM" in name for name in architectures):
        return "masked"
    if any("CausalLM" in name or "LMHead" in name for name in architectures):
        return "causal"
    raise UserError(
        f"model.kind: the checkpoint {config.name!r} is a {architectures or 'model of unknown kind'}, without a "
        "language-model head; set model.head: classifier, or model.kind if it has one"
    )


def _window(tokenizer: Any, hf_config: Any) -> int:
    limits = [tokenizer.model_max_length]
    if hasattr(hf_config, "max_position_embeddings"):
        # RoBERTa-like models number positions from padding_idx + 1, so two entries of the table are never used.
        reserved = 2 if hf_config.model_type in ("roberta", "xlm-roberta", "camembert", "longformer") else 0
        limits.append(hf_config.max_position_embeddings - reserved)
    return int(min(limits))


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split("\n")[:3])
