"""What a forward pass holds while it waits for the others in lock step, and how many tokens may wait (torch-free).

The engine chooses the width of a group by it, and `mezo_dist.planning` predicts memory by it.
"""

from __future__ import annotations

PART = 0.25
"""Share of the free memory that waiting passes may fill."""
RESIDUALS = 5
"""Vectors as wide as the residual stream that a waiting pass holds beside the widest output: the token embeddings, the
position embeddings, the input of the block, the residual, and its normalised copy."""


def numbers_held(width: int, widest: int) -> int:
    """Numbers per token that a waiting pass of a transformer holds at most; exact for OPT (9 times the width), an upper
    bound for models without learned positions (Llama: one vector less).

    Args:
        width: features of the residual stream.
        widest: features of the widest output in a block.
    """
    return RESIDUALS * width + widest


def tokens_that_fit(free_bytes: int, processes: int, numbers: int, itemsize: int) -> int:
    """Number of tokens, counted once for every pass that they are in, that may wait in the model at the same time.

    Args:
        free_bytes: memory that nobody uses.
        processes: that share it.
        numbers: held per token, see `numbers_held`.
        itemsize: bytes of a number.
    """
    return max(1, int(PART * free_bytes / processes / (numbers * itemsize)))
