"""How much goes through a model in lock step: as much as a part of the free memory holds."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import nn

from mezo_dist.engines.units import Unit
from mezo_dist.engines.waiting import numbers_held, tokens_that_fit


def tokens_at_once(units: Sequence[Unit], dtype: torch.dtype, processes: int) -> int:
    """Number of tokens, counted once for every pass that they are in, that may wait in the model at the same time.

    Args:
        units: all units of the model.
        dtype: dtype of the activations.
        processes: number of processes on this machine, which share its memory.
    """
    layers = [tuple(w.shape[-2:]) for unit in units if not unit.stays for hooked in unit.hooked_modules
              for w in hooked.weights
              if hooked.kind is not nn.Embedding and len(unit.hooked_modules) > 1 and len(w.shape) >= 2]  # fmt: skip
    width = max((min(shape) for shape in layers), default=1)
    widest = max((max(shape) for shape in layers), default=1)
    return tokens_that_fit(free_bytes(), processes, numbers_held(width, widest), dtype.itemsize)


def free_bytes() -> int:
    """Memory that nobody uses: of the GPU if there is one (what torch keeps for later counts), else of the host."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
