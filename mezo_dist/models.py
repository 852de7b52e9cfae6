"""Loading unmodified Hugging Face models and their tokenisers."""

from __future__ import annotations

import fnmatch
import logging
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from mezo_dist.assets import is_demo, resolve_model
from mezo_dist.config import ModelConfig
from mezo_dist.directions.seeds import derive_seed
from mezo_dist.errors import UserError
from mezo_dist.tasks.prompts import Kind

log = logging.getLogger(__name__)
AUTO_CLASSES: dict[Kind, str] = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "classifier": "AutoModelForSequenceClassification",
}


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode with its tokeniser."""

    model: nn.Module
    tokenizer: Any
    kind: Kind
    window: int
    """Longest sequence that the model takes, in tokens."""
    pad_id: int

    @property
    def auto_class(self) -> str:
        """Name of the class of transformers that loads such a model."""
        return AUTO_CLASSES[self.kind]


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
    transformers.utils.logging.set_verbosity_error()  # what a checkpoint lacks is checked and said below
    source = _source(config.name)
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        hf_config = transformers.AutoConfig.from_pretrained(source, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        kind = _kind(config, hf_config)
        if kind == "masked" and tokenizer.mask_token is None:
            raise UserError(f"model.kind: the tokeniser of {config.name!r} has no mask token, which kind: masked needs")
        model, report = _build(source, kind, num_labels, seed, {"dtype": getattr(torch, config.weights), **options})
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        where = "its folder" if Path(source).is_dir() else "the hub (no folder has that name)"
        raise UserError(
            f"model.name: {config.name!r} could not be loaded from {where} as head: {config.head}, "
            f"kind: {config.kind}: {_shortened(str(error))}"
        ) from error
    _check_complete(report, kind, config.name)
    pad_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    model.config.pad_token_id = pad_id
    model.config.use_cache = False
    _freeze(model, config)
    return Loaded(model.eval(), tokenizer, kind, _window(tokenizer, hf_config), pad_id)


def _source(name: str) -> str:
    """What ``from_pretrained`` takes: a folder or a hub name."""
    if is_demo(name):
        return str(resolve_model(name))
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:  # no hub name looks like that
        raise UserError(f"model.name: folder {name} does not exist (relative paths start at {Path.cwd()})")
    return name


def _build(source: str, kind: Kind, num_labels: int, seed: int, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model, and transformers' report of weights that the checkpoint lacks: they were drawn from ``seed``."""
    import transformers

    if kind == "classifier":
        options["num_labels"] = num_labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "fresh head") % 2**63)
        # A mismatch is an error below, where its names can be told.
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, report = getattr(transformers, AUTO_CLASSES[kind]).from_pretrained(source, **options)
    return model, report


def _check_complete(report: dict[str, Any], kind: Kind, name: str) -> None:
    missing = _shortened(", ".join(sorted(report["missing_keys"])))
    misshapen = _shortened(", ".join(sorted(key for key, *_ in report["mismatched_keys"])))
    if misshapen:
        raise UserError(
            f"model.name: in the checkpoint {name!r} these weights have another shape than needed: {misshapen}"
        )
    if missing and kind != "classifier":
        raise UserError(f"model.kind: the checkpoint {name!r} lacks weights that kind: {kind} needs: {missing}")
    if missing:
        log.info("fresh weights, drawn from the run seed: %s", missing)


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
        f"model.kind: the checkpoint {config.name!r} ({', '.join(architectures) or 'of unknown kind'}) is neither a "
        "causal nor a masked language model; set model.head: classifier, or model.kind if it is one nevertheless"
    )


def _window(tokenizer: Any, hf_config: Any) -> int:
    limits = [tokenizer.model_max_length]
    if hasattr(hf_config, "max_position_embeddings"):
        # RoBERTa-like models number positions from padding_idx + 1, so two entries of the table are never used.
        reserved = 2 if hf_config.model_type in ("roberta", "xlm-roberta", "camembert", "longformer") else 0
        limits.append(hf_config.max_position_embeddings - reserved)
    return int(min(limits))


def _shortened(text: str) -> str:
    """At most 400 characters: messages of transformers can name every model that it knows."""
    return textwrap.shorten(text, 400, placeholder=" ...")
