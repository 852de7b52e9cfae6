"""How large the buffer is in which variants are made, and what is made in it together (torch-free).

The engine allocates it by this, and `mezo_dist.planning` predicts memory by it.
"""

from __future__ import annotations

from collections.abc import Sequence

ALIGNMENT = 64
"""Bytes. Matrix kernels may give other bits for operands that are not aligned to their vector registers."""
GROUP_BYTES = 256 * 2**20
"""Bytes of variants that are made together on a GPU, at most, but for one module that needs more by itself. A kernel
that writes so much takes longer than its launch by far, so that larger groups would cost memory and win nothing."""


def padded(num_bytes: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def leading(sizes: Sequence[int]) -> int:
    """How many of the first modules are made together; at least one.

    Args:
        sizes: bytes of the variants of modules, in the order in which they are called.
    """
    total = 0
    for number, size in enumerate(sizes):
        total += size
        if number and total > GROUP_BYTES:
            return number
    return len(sizes)
