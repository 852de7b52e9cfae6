"""torch's own optimisers on the weights of an engine, wherever these live; see `mezo_dist.engines.engine.Engine`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mezo_dist.algorithms import FirstOrder
from mezo_dist.baselines.base import clear_state, count_steps, torch_optimizer
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.engine import OPTIMIZER_PREFIX, Engine
from mezo_dist.engines.layouts.base import Shard


@final
class WeightOptimizer:
    """See `GradientOptimizer`: torch.optim.SGD or AdamW, whole or on FSDP2's shards, each rank on its own.

    Args:
        engine: owns the weights.
        settings: of the baseline.
    """

    keeps_graphs = True

    def __init__(self, engine: Engine, settings: FirstOrder) -> None:
        self._engine, self.model = engine, engine.model
        self._weights: dict[str, nn.Parameter] = {n: p for n, p in engine.model.named_parameters() if p.requires_grad}
        self._torch = torch_optimizer(settings, self._weights)
        self._make_state()

    def _make_state(self) -> None:
        """torch makes an optimiser's state in its first step. It is needed before that, to be filled from a snapshot:
        a step of length 0 makes it, and all of it begins at zero."""
        for weight in self._weights.values():
            weight.grad = torch.zeros_like(weight)
        self.step(0.0, 1.0)
        clear_state(self._torch)

    def start_at(self, steps: int) -> None:
        """See `GradientOptimizer.start_at`."""
        if not steps:
            clear_state(self._torch)
        count_steps(self._torch, steps)

    def forget_gradients(self) -> None:
        """See `GradientOptimizer.forget_gradients`."""
        self._torch.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """See `GradientOptimizer.backward`."""
        loss.backward()

    def step(self, lr: float, scale: float) -> None:
        """See `AttachedOptimizer.step`."""
        if scale != 1:
            for gradient in self._gradients().values():
                gradient.mul_(scale)
        for group in self._torch.param_groups:
            group["lr"] = lr
        self._torch.step()
        self.forget_gradients()

    def shards(self) -> Iterator[Shard]:
        """See `AttachedOptimizer.shards`: every statistic that has the shape of a weight is cut as the weight is."""
        for shard in self._engine.trainable_shards():
            for key, value in self._torch.state[self._weights[shard.name]].items():
                if key != "step" and isinstance(value, Tensor):
                    yield dataclasses.replace(shard, name=f"{OPTIMIZER_PREFIX}{key}:{shard.name}", tensor=_local(value))

    @torch.no_grad()
    def sum_gradients(self, comm: Communicator, divisor: int, mark: int) -> float:
        """See `GradientOptimizer.sum_gradients`."""
        for weight in self._weights.values():
            if weight.grad is None:  # no pass of this rank used it
                weight.grad = torch.zeros_like(weight)
        gradients = self._gradients()
        whole = {name for name, weight in self._weights.items() if not isinstance(weight, DTensor)}
        comm.sum_tensors([gradient for name, gradient in gradients.items() if name in whole])
        for name, gradient in gradients.items():
            gradient.mul_((1 if name in whole else comm.world_size) / divisor)  # FSDP2 gave means over the ranks
        counted = [s.name for s in self._engine.trainable_shards() if s.is_first or not self._engine.layout.is_sharded]
        norms = [torch.linalg.vector_norm(gradients[name], dtype=torch.float64) for name in counted]
        square = float(torch.stack(norms).square().sum()) if norms else 0.0
        return math.sqrt(comm.sum_floats(square, mark) if self._engine.layout.is_sharded else square)

    def _gradients(self) -> dict[str, Tensor]:
        """This rank's part of every gradient."""
        return {n: _local(weight.grad) for n, weight in self._weights.items() if weight.grad is not None}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
