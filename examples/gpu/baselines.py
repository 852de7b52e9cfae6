"""What others do, as plainly as it is published: MeZO that perturbs weights in place, and LOZO, in place too.

MeZO: Malladi et al. 2023 (arXiv 2305.17333), algorithm 1. LOZO: Chen et al. 2024 (arXiv 2410.07698), algorithm 1, whose
V is drawn anew every ``INTERVAL`` steps. Neither keeps the bits of the weights: +eps, -2 eps, +eps rounds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

INTERVAL = 50
"""Steps for which LOZO keeps its V."""
Loss = Callable[[], Tensor]


def textbook_mezo(model: nn.Module, loss: Loss, step: int, *, eps: float = 1e-3, lr: float = 1e-6) -> float:
    """One two-sided step; the direction is drawn four times from its seed, and never stored.

    Args:
        model: changed in place.
        loss: of the model as it is.
        step: number of the step, which is the seed.
        eps: size of the perturbation.
        lr: learning rate.
    """

    def move(size: float) -> None:
        torch.manual_seed(step)
        for parameter in model.parameters():
            z = torch.normal(0.0, 1.0, parameter.shape, device=parameter.device, dtype=parameter.dtype)
            parameter.data.add_(z, alpha=size)

    return _two_sided(move, loss, eps, lr)


def in_place_lozo(
    model: nn.Module, loss: Loss, step: int, *, rank: int = 2, eps: float = 1e-3, lr: float = 1e-6
) -> float:
    """One two-sided step along ``U V^T`` for matrices, and a gaussian direction for vectors.

    Args:
        model: changed in place.
        loss: of the model as it is.
        step: number of the step, which is the seed of U.
        rank: columns of U and V.
        eps: size of the perturbation.
        lr: learning rate.
    """

    def move(size: float) -> None:
        torch.manual_seed(step)
        for number, parameter in enumerate(model.parameters()):
            like = {"device": parameter.device, "dtype": parameter.dtype}
            if parameter.dim() < 2:
                parameter.data.add_(torch.randn(parameter.shape, **like), alpha=size)
                continue
            u = torch.randn(parameter.shape[0], rank, **like)
            generator = torch.Generator(parameter.device).manual_seed(step // INTERVAL * 10_000 + number)
            v = torch.randn(parameter[0].numel(), rank, generator=generator, **like)
            parameter.data.view(len(u), -1).addmm_(u, v.T, alpha=size)

    return _two_sided(move, loss, eps, lr)


@torch.no_grad()
def _two_sided(move: Callable[[float], None], loss: Loss, eps: float, lr: float) -> float:
    """Losses at both sides, the weights back where they were (but for rounding), and the step; the slope."""
    move(eps)
    ahead = loss()
    move(-2 * eps)
    behind = loss()
    move(eps)
    slope = float((ahead - behind) / (2 * eps))
    move(-lr * slope)
    return slope
