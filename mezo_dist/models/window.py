"""The longest sequence and the number of tokens that a model can take, from its tables and its tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

NO_LIMIT = 1 << 30
"""Tokens, where neither the model nor the tokenizer has a limit."""
_SETTINGS = ("max_position_embeddings", "max_seq_len")


def window_of(tokenizer: PreTrainedTokenizerBase, model: nn.Module, hf_config: PreTrainedConfig) -> int:
    """Longest sequence, in tokens, that the model takes.

    Args:
        tokenizer: of the model.
        model: of transformers.
        hf_config: its config.
    """
    text_config = hf_config.get_text_config()
    limits = [getattr(text_config, name, None) for name in _SETTINGS]
    reserved = _reserved(model)
    known = [limit - reserved for limit in limits if isinstance(limit, int) and limit > 0]  # XLNet has -1 for none
    if 0 < tokenizer.model_max_length < NO_LIMIT:  # 1e30 for none
        known.append(int(tokenizer.model_max_length))
    return min(known, default=NO_LIMIT)


def _reserved(model: nn.Module) -> int:
    """Rows of the table of positions that no token uses: RoBERTa-like models count from the padding's row on."""
    tables = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
    rows = [m.padding_idx + 1 for m in tables if isinstance(m, nn.Embedding) and m.padding_idx is not None]
    return max(rows, default=0)


def num_tokens_of(model: PreTrainedModel) -> int | None:
    """Rows of the table of token embeddings; None if the model does not say which one that is."""
    try:
        table = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return table.num_embeddings if isinstance(table, nn.Embedding) else None
