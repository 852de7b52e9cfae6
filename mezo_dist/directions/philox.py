"""Philox4x32-10 in plain torch: the readable reference of the generator ``philox4x32-10/v1``.

Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011). A counter-based generator has no
state: the four 32-bit words of a block are a function of (key, counter), so any piece of a direction can be generated
alone, anywhere. Here key = the direction's 64-bit seed, counter = (block low, block high, parameter id, stream).
"""

from __future__ import annotations

import torch
from torch import Tensor

VERSION = "philox4x32-10/v1"
STREAM_DIRECTION = 0
STREAM_ROUNDING = 1
STREAM_U, STREAM_V = 2, 3  # factors of low-rank directions

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
MASK32 = 0xFFFFFFFF


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product. int64 wraps modulo 2**64, which keeps every bit that we read."""
    product = a * b
    return (product >> 32) & MASK32, product & MASK32


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> Tensor:
    """Ten rounds of Philox on many counters at once.

    Args:
        counter: four int64 tensors of one shape [n], each value in 0..2**32-1, lowest word first.
        key: two words in 0..2**32-1, lowest word first.

    Returns:
        int64 [4, n], values in 0..2**32-1: the four output words of each block.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & MASK32, (k1 + KEY_INCREMENTS[1]) & MASK32
    return torch.stack([c0, c1, c2, c3])


def direction_words(seed: int, param_id: int, stream: int, first_block: int, num_blocks: int) -> Tensor:
    """The words of some blocks of one parameter's stream.

    Args:
        seed: 64 bits, the key.
        param_id: see `seeds.param_id`.
        stream: one of the ``STREAM_`` numbers.
        first_block: number of the first block, 64 bits.
        num_blocks: number of blocks.

    Returns:
        int64 [4, num_blocks] on the CPU, values in 0..2**32-1.
    """
    block = torch.arange(first_block, first_block + num_blocks, dtype=torch.int64)
    fixed = torch.ones_like(block)
    counter = (block & MASK32, (block >> 32) & MASK32, fixed * param_id, fixed * stream)
    return philox4x32(counter, (seed & MASK32, (seed >> 32) & MASK32))
