"""How much goes through a model in lock step: as much as a part of the free memory holds."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import nn

from mezo_dist.engines.units import Unit

PART = 0.25
"""Share of the free memory that waiting passes may fill."""
LIVE_LAYERS = 4
"""Inputs and outputs of its widest layer that a waiting pass may hold: the residual stream, a block's branches."""


def tokens_at_once(units: Sequence[Unit], dtype: torch.dtype, processes: int) -> int:
    """Number of tokens, counted once for every pass that they are in, that may wait in the model at the same time.

    Args:
        units: all units of the model.
        dtype: dtype of the activations.
        processes: number of processes on this machine, which share its memory.
    """
    layers = [w.shape for unit in units if not unit.stays for hooked in unit.hooked_modules for w in hooked.weights
              if hooked.kind is not nn.Embedding and len(unit.hooked_modules) > 1 and len(w.shape) == 2]  # fmt: skip
    widest = max((sum(shape) for shape in layers), default=1)
    return max(1, int(PART * free_bytes() / processes / (LIVE_LAYERS * widest * dtype.itemsize)))


def free_bytes() -> int:
    """Memory that nobody uses: of the GPU if there is one, else of the host."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
