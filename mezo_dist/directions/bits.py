"""Bit layouts: how the words of the generator become the numbers of a direction.

Elements of a flattened full parameter are grouped in chunks of 1024. A bit layout says how many generator blocks a
chunk takes and which bits an element takes.

Invariant: a value depends on (seed, parameter, global element index) alone.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from mezo_dist.directions import philox

CHUNK = 1024
TABLE_SIZE = 65536
GAUSSIAN_TABLE_SHA256 = "8babbcaf96568f10165a1eab530c0e5c92d04de96761b6dbb3dadfa94baba37f"


@functools.cache
def gaussian_table() -> np.ndarray:
    """fp32 [65536], read-only: the quantiles Phi^-1((u + 0.5) / 65536), scaled to unit variance over the set.

    Raises:
        RuntimeError: this machine's arithmetic gave other floats than the bit layout's version promises.
    """
    normal = NormalDist()
    quantiles = [normal.inv_cdf((u + 0.5) / TABLE_SIZE) for u in range(TABLE_SIZE // 2, TABLE_SIZE)]
    deviation = math.sqrt(math.fsum(q * q for q in quantiles) / len(quantiles))
    upper = np.array([q / deviation for q in quantiles], dtype=np.float32)
    table = np.concatenate([-upper[::-1], upper])  # the lower half by symmetry, so that the mean is exactly zero
    digest = hashlib.sha256(table.astype("<f4").tobytes()).hexdigest()
    if digest != GAUSSIAN_TABLE_SHA256:
        raise RuntimeError(f"the gaussian table has SHA-256 {digest}, the bit layout promises {GAUSSIAN_TABLE_SHA256}")
    table.flags.writeable = False
    return table


@functools.cache
def _gaussian_table_torch() -> Tensor:
    return torch.from_numpy(gaussian_table().copy())


def halves(words: Tensor) -> Tensor:
    """The ``gaussian`` bit layout, 16 bits per element: int64 words [4, 128 n] -> int64 [n, 1024] in 0..65535.

    Element e of a chunk takes word e // 256, half (e // 128) % 2 (0 = low bits), block e % 128.
    """
    by_chunk = words.reshape(4, -1, 128).transpose(0, 1)  # [n, word, block]
    return torch.stack([by_chunk & 0xFFFF, by_chunk >> 16], dim=2).reshape(-1, CHUNK)


def _gaussian_values(words: Tensor) -> Tensor:
    """The table's entry for the 16 bits of each element: int64 words [4, 128 n] -> fp32 [n, 1024]."""
    return _gaussian_table_torch()[halves(words)]


def _rademacher_values(words: Tensor) -> Tensor:
    """1 bit per element: element e of a chunk takes block e // 128, word (e // 32) % 4, bit e % 32 (1 = +1)."""
    by_block = words.transpose(0, 1).reshape(-1, 8, 4, 1)  # [n, block, word, 1]
    bits = (by_block >> torch.arange(32)) & 1
    return (2 * bits - 1).reshape(-1, CHUNK).to(torch.float32)


@dataclass(frozen=True)
class BitLayout:
    """A named, versioned rule from generator words to the values of a direction."""

    name: str
    version: str
    blocks_per_chunk: int
    values: Callable[[Tensor], Tensor]
    """int64 words [4, n * blocks_per_chunk] -> fp32 [n, 1024]"""
    stream: int = philox.STREAM_DIRECTION
    """Stream of the generator that the words come from."""

    def chunks(self, seed: int, param_id: int, first_chunk: int, num_chunks: int) -> Tensor:
        """The values of some chunks of a direction on one parameter, in plain torch on the CPU.

        Args:
            seed: the direction's, 64 bits.
            param_id: see `seeds.param_id`.
            first_chunk: number of the first chunk in the flattened full parameter.
            num_chunks: number of chunks.

        Returns:
            fp32 [num_chunks, 1024].
        """
        per = self.blocks_per_chunk
        words = philox.direction_words(seed, param_id, self.stream, first_chunk * per, num_chunks * per)
        return self.values(words)


GAUSSIAN = BitLayout(
    "gaussian", f"{philox.VERSION}/gaussian-table16-{GAUSSIAN_TABLE_SHA256[:16]}", 128, _gaussian_values
)
RADEMACHER = BitLayout("rademacher", f"{philox.VERSION}/rademacher-1bit", 8, _rademacher_values)
FACTOR_U = replace(GAUSSIAN, name="lowrank-u", stream=philox.STREAM_U)
FACTOR_V = replace(GAUSSIAN, name="lowrank-v", stream=philox.STREAM_V)
