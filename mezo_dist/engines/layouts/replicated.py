"""Layout `replicated`: every process has all the weights, and nothing is ever gathered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import final

import torch
from torch import Tensor, nn

from mezo_dist.directions.seeds import param_id
from mezo_dist.engines.hooked import Weight
from mezo_dist.engines.layouts.base import Shard
from mezo_dist.engines.payload import parameter_parts
from mezo_dist.engines.units import Unit, find_units


@final
class Replicated:
    """See `mezo_dist.engines.layouts.base.Layout`.

    Args:
        model: the model.
        whole_blocks: see `find_units`.
    """

    is_sharded = False
    gather_dtype = None

    def __init__(self, model: nn.Module, *, whole_blocks: bool = False) -> None:
        self._model = model
        self.units = find_units(model, whole_blocks=whole_blocks)
        self._weights = {w.name: w for unit in self.units for hooked in unit.hooked_modules for w in hooked.weights}

    def describe(self, weight: Weight) -> tuple[torch.dtype, torch.device]:
        """See `Layout.describe`."""
        return weight.tensor.dtype, weight.tensor.device

    def synchronize(self, what: str) -> None:
        """Nothing is gathered."""

    def start(self, unit: Unit) -> None:
        """Nothing is gathered."""

    def finish(self, unit: Unit) -> None:
        """Nothing is gathered."""

    def release(self, unit: Unit) -> None:
        """Nothing is gathered."""

    def back_propagating(self) -> AbstractContextManager[None]:
        """See `Layout.back_propagating`."""
        return nullcontext()

    def shards(self) -> Iterator[Shard]:
        """See `Layout.shards`: every parameter, whole; of a quantised one the plain tensors that it is made of."""
        for parameter_name, parameter in self._model.named_parameters():
            for name, tensor in parameter_parts(parameter_name, parameter):
                yield Shard(name, param_id(name), tensor.shape, 0, tensor)

    def exchange(self, others: dict[str, Tensor]) -> None:
        """See `Layout.exchange`: nothing is copied."""
        for name in others.keys() & self._weights.keys():
            parameter = self._weights[name].tensor
            parameter.data, others[name] = others[name], parameter.data

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Layout.named_weights`."""
        for name, tensor in self._model.named_parameters():
            yield name, tensor.detach()

    def total(self, value: int) -> int:
        """See `Layout.total`: there are no other shards."""
        return value % 2**64
