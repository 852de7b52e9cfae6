"""What keeps the gradients of weights beside these and steps along them, and the optimisers of torch in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mezo_dist.algorithms import FirstOrder
from mezo_dist.algorithms.decay import decays
from mezo_dist.algorithms.first_order import SGD
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.layouts.base import Shard


class GradientOptimizer(Protocol):
    """Gradients of an engine's trainable weights, and the optimiser that steps along them.

    It is also an `mezo_dist.engines.engine.AttachedOptimizer`.
    """

    @property
    def model(self) -> nn.Module:
        """What passes call, within `mezo_dist.baselines.backward.back_propagating`."""

    @property
    def keeps_graphs(self) -> bool:
        """Several forward passes may go before their backward passes."""

    def backward(self, loss: Tensor) -> None:
        """Back-propagate ``loss``, a scalar; its gradient is added to those that are kept. On shards a collective."""

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

    def forget_gradients(self) -> None:
        """Drop the gradients."""

    def start_at(self, steps: int) -> None:
        """Go on from weights and state that a snapshot holds, or from the base model.

        Args:
            steps: how many steps they have seen, which a snapshot does not tell (AdamW counts them); 0: the base model.
        """

    def step(self, lr: float, scale: float) -> None:
        """See `AttachedOptimizer.step`."""

    def shards(self) -> Iterator[Shard]:
        """See `AttachedOptimizer.shards`."""


def torch_optimizer(settings: FirstOrder, weights: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """torch.optim.SGD or AdamW, with a group of weights that decay and one of those that do not.

    Args:
        settings: of the baseline.
        weights: the trainable ones, by canonical name.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, weight in weights.items():
        num_dimensions = len(getattr(weight, "ds_shape", weight.shape))  # one that DeepSpeed cut has the shape [0]
        decaying = settings.weight_decay_all or decays(name, num_dimensions)
        groups.setdefault((decaying, isinstance(weight, DTensor)), []).append(weight)  # torch takes no mixture
    listed = [
        {"params": some, "weight_decay": settings.weight_decay if decaying else 0.0}
        for (decaying, _), some in groups.items()
    ]
    if isinstance(settings, SGD):
        return torch.optim.SGD(listed, lr=settings.lr, momentum=settings.momentum)
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(listed, lr=settings.lr, betas=betas, eps=settings.epsilon)


def clear_state(optimizer: torch.optim.Optimizer) -> None:
    """Make all statistics of an optimiser, and the steps that it counts, zero."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()


def count_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Say how many steps an optimiser's statistics have seen."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(float(steps))
