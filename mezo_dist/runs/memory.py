"""Memory that is full, in words: which setting to lower."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from mezo_dist.config.schema import RunConfig
from mezo_dist.errors import UserError

HOST_MEMORY_IS_FULL = "DefaultCPUAllocator"
"""What torch's error says where there is no class of errors for it."""


@contextlib.contextmanager
def full_memory_explained(config: RunConfig) -> Iterator[None]:
    """Around a run's work.

    Raises:
        UserError: the memory of the GPU or the host is full.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU's memory is full: {advice(config)} ({_first_line(error)})") from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and HOST_MEMORY_IS_FULL not in str(error):
            raise
        raise UserError(f"the memory of this machine is full: {advice(config)} ({_first_line(error)})") from error


def advice(config: RunConfig) -> str:
    """The settings to lower, those first that change no result."""
    train, algorithm = config.train, config.algorithm
    ways = []
    if train.width is None or train.width > 1:
        width = "now chosen by free memory" if train.width is None else f"now {train.width}"
        ways.append(f"lower train.width ({width})")
    if train.micro_batch > 1:
        ways.append(f"lower train.micro_batch (now {train.micro_batch})")
    directions = getattr(algorithm, "directions", 1)
    if directions > 1:
        ways.append(f"lower algorithm.directions (now {directions}), for all variants are made together")
    if config.model.compute is None and config.model.weights == "float32":
        ways.append("compute in 16 bits (model.compute: bfloat16)")
    if config.layout.name == "replicated":
        ways.append("share the weights out over processes (layout.name: fsdp)")
    return "; or ".join(ways) or "choose a smaller model, or more processes"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["out of memory"])[0][:200]
