"""The longest sequence and the number of tokens that a model can take, from its tables and its tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

NO_LIMIT = 1 << 30
"""Tokens, where neither the model nor the tokenizer has a limit."""
_SETTINGS = (
    "max_position_embeddings",
    "max_seq_len",
    "max_sequence_length",
    "max_target_positions",
    "n_positions",
    "n_ctx",
)


def window_of(tokenizer: PreTrainedTokenizerBase, model: nn.Module, hf_config: PreTrainedConfig) -> int:
    """Longest sequence, in tokens, that the model takes.

    Args:
        tokenizer: of the model.
        model: of transformers.
        hf_config: its config.
    """
    limits = [getattr(_text_config(hf_config), name, None) for name in _SETTINGS]
    reserved = _reserved(model)
    known = [limit - reserved for limit in limits if isinstance(limit, int) and limit > 0]  # XLNet has -1 for none
    if 0 < tokenizer.model_max_length < NO_LIMIT:  # 1e30 for none
        known.append(int(tokenizer.model_max_length))
    return min(known, default=NO_LIMIT)


def _text_config(hf_config: Any) -> Any:
    """The part of the config that is about the text which comes out, where a model has several parts."""
    try:
        return hf_config.get_text_config()
    except ValueError:  # there are several
        return hf_config.get_text_config(decoder=True)


def _reserved(model: nn.Module) -> int:
    """Rows of the table of positions that no token uses: RoBERTa-like models count from the padding's row on."""
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    paddings = [getattr(table, "padding_idx", None) for table in tables]  # I-BERT's is no nn.Embedding
    return max((padding + 1 for padding in paddings if isinstance(padding, int)), default=0)


def num_tokens_of(model: PreTrainedModel) -> int | None:
    """Rows of the table of token embeddings; None if the model does not say which one that is."""
    try:
        table = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return table.num_embeddings if isinstance(table, nn.Embedding) else None
