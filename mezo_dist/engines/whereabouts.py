"""Where weights are: what was found out about them holds as long as they stay there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor

from mezo_dist.directions import devices
from mezo_dist.engines.hooked import Weight


@final
class Whereabouts:
    """Where weights are, to be compared with where they are later.

    Args:
        weights: the weights.
    """

    def __init__(self, weights: Iterable[Weight]) -> None:
        self._seen = [(weight, tensor := weight.tensor, _state(tensor)) for weight in weights]

    def unchanged(self) -> bool:
        """Whether all of them are the same tensors in the same memory."""
        return all(weight.tensor is tensor and _state(tensor) == state for weight, tensor, state in self._seen)


def _state(tensor: Tensor) -> tuple[int, torch.dtype, bool]:
    return devices.address(tensor), tensor.dtype, tensor.is_contiguous()
