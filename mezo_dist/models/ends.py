"""Where the classifiers of encoder-decoder models (T5, BART) read their answer: at the end-of-text token.

A forward pass fails where a text has none, or where the texts of a micro-batch have different numbers of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from mezo_dist.errors import UserError


def check_ends(model: nn.Module, pad_id: int, splits: Mapping[str, Sequence[Any]]) -> None:
    """Refuse texts at which a classifier cannot answer.

    Args:
        model: with a classification head.
        pad_id: what sequences are filled up with.
        splits: encoded samples, whose ``ids`` are their tokens.

    Raises:
        UserError: a text has no end-of-text token, or not as many as the first one, or it is the padding token, too.
    """
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return
    end = getattr(config, "eos_token_id", None)
    reads = f"model.head: this model's classifier reads its answer at token {end}, the end of the text (eos_token_id)"
    if end == pad_id:
        raise UserError(f"{reads}, which the tokenizer pads with, too; give it another pad_token")
    wanted = splits["train"][0].ids.count(end)
    for name, samples in splits.items():
        for number, sample in enumerate(samples):
            count = sample.ids.count(end)
            if not count:
                raise UserError(f"{reads}, which the tokenizer does not append to a text: use one that does")
            if count != wanted:
                raise UserError(
                    f"{reads}, and {name} sample {number} has {count} of them, the first one {wanted}: leave out rows "
                    "whose text holds it"
                )
