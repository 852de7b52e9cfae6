"""Where weights are: what was found out about them holds as long as they stay there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

from mezo_dist.directions import devices
from mezo_dist.engines.hooked import Weight


@final
class Whereabouts:
    """Where weights are, to be compared with where they are later.

    Args:
        weights: the weights.
    """

    def __init__(self, weights: Iterable[Weight]) -> None:
        pairs = [(weight, weight.tensor) for weight in weights]
        self._seen = [(w, tensor, devices.address(tensor), tensor.dtype, tensor.is_contiguous()) for w, tensor in pairs]

    def unchanged(self) -> bool:
        """Whether all of them are the same tensors in the same memory."""
        address = devices.address
        for weight, tensor, place, dtype, is_contiguous in self._seen:  # the host does little else for a plan
            if (
                dict.get(weight.owner._parameters, weight.attribute) is not tensor
                or address(tensor) != place
                or tensor.dtype is not dtype
                or tensor.is_contiguous() != is_contiguous
            ):
                return False
        return True
