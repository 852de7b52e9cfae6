"""What crosses between host and device: as few copies as can be, none of which waits for kernels that are queued.

A copy from ordinary host memory, and any read of a result, makes the host wait until the device has done all it was
told. So what a step needs is brought there through pinned memory, many tensors by one copy, and what it gives is read
by one copy at its end.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes."""
_ORIGINAL = "_mezo_dist_original"
"""Attribute of a tensor on a device: the tensor in host memory that it is a copy of."""


def upload(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors on ``device``, by one copy that waits for nothing; those that are there stay as they are.

    Args:
        tensors: of any dtypes.
        device: where to.
    """
    away = [tensor for tensor in tensors if tensor.device != device and tensor.numel()]
    if device.type == "cpu" or not away:
        return [tensor.to(device) for tensor in tensors]
    sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in away]
    packed = torch.empty(sum(sizes), dtype=torch.uint8).pin_memory()
    places = [0, *itertools.accumulate(sizes)]
    for place, tensor in zip(places, away, strict=False):
        packed[place : place + tensor.nbytes].copy_(tensor.contiguous().view(-1).view(torch.uint8))
    there = packed.to(device, non_blocking=True)
    copies = {
        id(tensor): there[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for place, tensor in zip(places, away, strict=False)
    }
    return [copies[id(tensor)] if id(tensor) in copies else tensor.to(device) for tensor in tensors]


def read(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors in host memory, by one copy, which waits for all that was queued; those that are there stay as they are.

    Args:
        tensors: of any dtypes, on the host or on one device.
    """
    away = [k for k, tensor in enumerate(tensors) if tensor.device.type != "cpu" and tensor.numel()]
    there = [tensor.detach() for tensor in tensors]
    if not away:
        return [tensor.cpu() for tensor in there]
    away.sort(key=lambda k: -there[k].itemsize)  # so that each starts at a multiple of its item size
    packed = torch.cat([there[k].contiguous().view(-1).view(torch.uint8) for k in away]).cpu()
    parts = dict(zip(away, packed.split([there[k].nbytes for k in away]), strict=True))
    return [
        parts[k].view(tensor.dtype).view(tensor.shape) if k in parts else tensor.cpu() for k, tensor in enumerate(there)
    ]


def remember(copies: Sequence[Tensor], originals: Sequence[Tensor]) -> None:
    """Let `known` tell what tensors on a device hold without a look at them.

    Args:
        copies: on a device; they must not be written to.
        originals: what they are copies of, in host memory.
    """
    for copy, original in zip(copies, originals, strict=True):
        if copy is not original:
            setattr(copy, _ORIGINAL, original)


def known(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`read`, without waiting for those that `remember` was told of."""
    return read([getattr(tensor, _ORIGINAL, tensor) for tensor in tensors])


def takes_launches(device: torch.device) -> bool:
    """Work on ``device`` is told to it launch by launch, which costs the host more than small work costs the device: so
    what can be done together is."""
    return device.type != "cpu"


def address(tensor: Tensor) -> int:
    """Where a tensor's elements lie. (Tests that play a device which is not there put another function here.)"""
    return tensor.data_ptr()


def memory(tensor: Tensor) -> int:
    """Where the storage of a tensor lies, which may be larger than the tensor."""
    return tensor.untyped_storage().data_ptr()


def stream_of(device: torch.device) -> int:
    """The current stream: memory that outlives a call is reused only on the stream that it was allocated on."""
    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    stream: int = torch._C._cuda_getCurrentRawStream(index)  # as Triton asks; one as an object takes ten times as long
    return stream


def same_memory(tensor: Tensor) -> tuple[object, ...]:
    """Equal for two living tensors if and only if they are the same view of the same memory."""
    return address(tensor), tensor.dtype, tuple(tensor.shape), tensor.stride()
