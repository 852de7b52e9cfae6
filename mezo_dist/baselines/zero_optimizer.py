"""Gradients and steps by DeepSpeed's engine, on weights that ZeRO-3 partitions; see `GradientOptimizer`.

DeepSpeed partitions gradients and the optimiser's state as the weights are, and keeps the state in flat tensors; each
weight's part of them is reached by the functions that it documents for that (``deepspeed.utils.safe_get_local_...``).
What decides about a step stays with the run: DeepSpeed is given no scheduler, no limit of the gradient's norm and no
number of micro-batches, and the optimiser inside of it is torch's.

DeepSpeed gathers module by module, so the passes of all ranks must call the same modules. Models in which data choose
among modules (experts in a ModuleList) make ranks wait for one another until the time-out; stacked experts do not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor

from mezo_dist.algorithms import FirstOrder
from mezo_dist.baselines.base import clear_state, count_steps, torch_optimizer
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.engine import OPTIMIZER_PREFIX, Engine
from mezo_dist.engines.layouts.base import Shard
from mezo_dist.engines.layouts.zero import Zero
from mezo_dist.errors import UserError

MASTER = "master"
"""In names of the state: the weights in float32, where the model's are bfloat16. DeepSpeed updates these."""


@final
class ZeroOptimizer:
    """See `GradientOptimizer`: DeepSpeed's engine with torch.optim.SGD or AdamW inside. Collective.

    Args:
        engine: owns the weights.
        layout: of the engine.
        comm: the ranks.
        settings: of the baseline.

    Raises:
        UserError: see `Zero.initialize`.
    """

    keeps_graphs = False  # its engine counts one backward pass for each forward pass

    def __init__(self, engine: Engine, layout: Zero, comm: Communicator, settings: FirstOrder) -> None:
        self._engine, self._comm = engine, comm
        self._weights: dict[str, Any] = {n: p for n, p in engine.model.named_parameters() if p.requires_grad}
        self._torch = torch_optimizer(settings, self._weights)
        self.model = layout.initialize(self._torch)
        self.model.set_gradient_accumulation_boundary(True)  # any backward pass may be the last one before a step
        self._zero = self.model.optimizer
        self._has_masters = engine.pass_dtype != torch.float32
        self._make_state()

    def _make_state(self) -> None:
        """torch makes an optimiser's state in its first step. It is needed before that, to be filled from a snapshot:
        a step of length 0 makes it, and all of it begins at zero. DeepSpeed steps like this, one flat tensor after
        another."""
        for number, flat in enumerate(self._zero.fp32_partitioned_groups_flat):
            group = self._torch.param_groups[self._zero.sub_group_to_group_id[number]]
            gradient, flat.grad = flat.grad, torch.zeros_like(flat)
            group |= {"params": [flat], "lr": 0.0}
            self._torch.step()
            group["params"], flat.grad = [], gradient
        clear_state(self._torch)

    def start_at(self, steps: int) -> None:
        """See `GradientOptimizer.start_at`."""
        from deepspeed.utils import safe_set_local_fp32_param

        if not steps:
            clear_state(self._torch)
        if not (steps and self._has_masters):  # DeepSpeed's copies are those of the model that it was made with
            for weight in self._weights.values():
                safe_set_local_fp32_param(weight, weight.ds_tensor)
        count_steps(self._torch, steps)

    def forget_gradients(self) -> None:
        """See `GradientOptimizer.forget_gradients`. DeepSpeed itself keeps the last gradient of a weight that no pass
        uses."""
        self._zero.zero_grad()
        self._zero.grad_partitions_flat_buffer.zero_()
        for flat in self._zero.fp32_partitioned_groups_flat:
            if flat.grad is not None:
                flat.grad.zero_()

    def backward(self, loss: Tensor) -> None:
        """See `GradientOptimizer.backward`."""
        self.model.backward(loss, scale_wrt_gas=False)

    def sum_gradients(self, comm: Communicator, divisor: int, mark: int) -> float:
        """See `GradientOptimizer.sum_gradients`: DeepSpeed gave means over the ranks."""
        squares = [
            torch.linalg.vector_norm(gradient.narrow(0, 0, shard.tensor.numel()), dtype=torch.float64).square()
            for shard, gradient in self._multiplied(comm.world_size / divisor)
        ]
        return math.sqrt(comm.sum_floats(float(torch.stack(squares).sum()) if squares else 0.0, mark))

    def step(self, lr: float, scale: float) -> None:
        """See `AttachedOptimizer.step`.

        Raises:
            UserError: DeepSpeed skipped the step.
        """
        if scale != 1:
            for _ in self._multiplied(scale):
                pass
        for group in self._torch.param_groups:
            group["lr"] = lr
        with self._comm.explained("step of the optimiser"):
            self.model.step()
        if not self.model.was_step_applied():
            raise UserError(
                "algorithm.lr: DeepSpeed skipped a step, as the norm of its gradient is too large for float32; set a "
                "smaller learning rate"
            )

    def shards(self) -> Iterator[Shard]:
        """See `AttachedOptimizer.shards`: every statistic that has the shape of a weight is cut as the weight is."""
        keys = [key for key in next(iter(self._torch.state.values()), {}) if key != "step"]
        for shard in self._engine.trainable_shards():
            for key in [*keys, *([MASTER] if self._has_masters else [])]:
                value = self._get(shard.name, key)
                tensor = value.narrow(0, 0, shard.tensor.numel())
                name = f"{OPTIMIZER_PREFIX}{key}:{shard.name}"
                yield dataclasses.replace(shard, name=name, tensor=tensor, stays=False)
                self._set(shard.name, key, value)  # whose contents may be others now

    def _get(self, name: str, key: str) -> Tensor:
        """This rank's part of a weight's state, padded; it may be a copy."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        weight = self._weights[name]
        value: Tensor = (
            safe_get_local_fp32_param(weight) if key == MASTER else safe_get_local_optimizer_state(weight, key)
        )
        return value

    def _set(self, name: str, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        if key == MASTER:
            safe_set_local_fp32_param(self._weights[name], value)
        else:
            safe_set_local_optimizer_state(self._weights[name], value, key)

    @torch.no_grad()
    def _multiplied(self, factor: float) -> Iterator[tuple[Shard, Tensor]]:
        """Multiply this rank's part of every gradient. Yields each with the shard of its weight; it may be padded."""
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

        for shard in self._engine.trainable_shards():
            weight = self._weights[shard.name]
            gradient = safe_get_local_grad(weight).mul_(factor)  # where it is, or a copy of it
            safe_set_local_grad(weight, gradient)
            yield shard, gradient
