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
from mezo_dist.algorithms.decay import decays
from mezo_dist.algorithms.first_order import SGD
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.engine import OPTIMIZER_PREFIX, Engine
from mezo_dist.engines.layouts.base import Shard


@final
class WeightOptimizer:
    """torch.optim.SGD or AdamW over the trainable weights of an engine; on shards, each rank on its own.

    Args:
        engine: owns the weights.
        settings: of the baseline.
    """

    def __init__(self, engine: Engine, settings: FirstOrder) -> None:
        self._engine = engine
        self._weights: dict[str, nn.Parameter] = {n: p for n, p in engine.model.named_parameters() if p.requires_grad}
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, weight in self._weights.items():
            decaying = settings.weight_decay_all or decays(name, weight.dim())
            groups.setdefault((decaying, isinstance(weight, DTensor)), []).append(weight)  # torch takes no mixture
        listed = [
            {"params": weights, "weight_decay": settings.weight_decay if decaying else 0.0}
            for (decaying, _), weights in groups.items()
        ]
        self._torch: torch.optim.Optimizer
        if isinstance(settings, SGD):
            self._torch = torch.optim.SGD(listed, lr=settings.lr, momentum=settings.momentum)
        else:
            betas = (settings.beta1, settings.beta2)
            self._torch = torch.optim.AdamW(listed, lr=settings.lr, betas=betas, eps=settings.epsilon)
        self._make_state()

    def _make_state(self) -> None:
        """torch makes an optimiser's state in its first step. It is needed before that, to be filled from a snapshot:
        a step of length 0 makes it, and all of it begins at zero."""
        for weight in self._weights.values():
            weight.grad = torch.zeros_like(weight)
        self.step(0.0, 1.0)
        for state in self._torch.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()

    def start_at(self, steps: int) -> None:
        """Say how many steps the state has seen, which a snapshot of it does not tell (AdamW counts them)."""
        for state in self._torch.state.values():
            if "step" in state:
                state["step"].fill_(float(steps))

    def forget_gradients(self) -> None:
        """Free the gradients."""
        self._torch.zero_grad(set_to_none=True)

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
        """Make the gradients of this rank's passes those of all ranks' passes together. Collective.

        Args:
            comm: the ranks.
            divisor: what the sum over all passes is divided by.
            mark: see `Communicator.round`.

        Returns:
            Norm of the gradient of all trainable weights, the same bits on all ranks; NaN or infinite if it is not
            finite.
        """
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
