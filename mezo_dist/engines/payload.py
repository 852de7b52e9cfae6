"""The plain tensors that a parameter consists of: itself, or the payload of a quantised one.

torchao keeps a quantised weight as a subclass of tensors that is made of plain ones, and says of which; bitsandbytes as
a parameter of packed bits with what unpacks them beside it. Such weights are frozen. What reads all bits of a model
(fingerprints, snapshots, loading once more) reads these parts, under names of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def is_quantised(parameter: Tensor) -> bool:
    """Whether a parameter of a model consists of other tensors than itself."""
    return hasattr(parameter, "__tensor_flatten__") or getattr(parameter, "quant_state", None) is not None


def parameter_parts(name: str, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Name and contents of the parts of a parameter, which share its memory.

    Args:
        name: of the parameter; the only part of one that is not quantised has it, too.
        parameter: as it stands in its module.
    """
    yield from _flattened(name, parameter.detach())
    state: Any = getattr(parameter, "quant_state", None)  # of bitsandbytes
    prefix = name
    while state is not None:  # its scales may be quantised themselves
        prefix += ":scales"
        for attribute in ("absmax", "code", "offset"):
            if isinstance(part := getattr(state, attribute, None), Tensor):
                yield f"{prefix}:{attribute}", part
        state = getattr(state, "state2", None)


def _flattened(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if not hasattr(tensor, "__tensor_flatten__"):  # torch's protocol of subclasses
        yield name, tensor
        return
    attributes, _ = tensor.__tensor_flatten__()
    for attribute in attributes:
        yield from _flattened(f"{name}:{attribute}", getattr(tensor, attribute))
