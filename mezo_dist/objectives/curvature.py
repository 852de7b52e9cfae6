"""The curvature of a batch's calibrated loss along directions, from the logits at both ends of each.

Along a direction, the logits of sample i change at the rate d_i = (z_i(ahead) - z_i(behind)) / distance. The
Gauss-Newton curvature of the cross-entropy, which leaves out that logits are no linear function of the weights, is

    h = 1/n sum_i d_i' M_i d_i,     M_i = diag p_i - p_i p_i'

with the probabilities p_i of the classes half way between the ends. A calibrated loss follows its offsets
(`mezo_dist.objectives.calibration`), which takes off what they can undo:

    h = 1/n (sum_i d_i' M_i d_i  -  s' (sum_i M_i + RIDGE)^-1 s),     s = sum_i M_i d_i

That is z' G z for the Gauss-Newton matrix G of the loss (Schraudolph 2002) and the direction z, and never negative.
Losses that are means over samples have the empirical Fisher matrix in its place (`mezo_dist.engines.loss_table`): their
logits need not cross between ranks for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mezo_dist.algorithms.base import Pair
from mezo_dist.objectives.calibration import RIDGE


def gauss_newton(logits: Tensor, pairs: Sequence[Pair], offsets: Tensor) -> Tensor:
    """The mean of h above over the directions of ``pairs``: fp64 [].

    Args:
        logits: fp64 [variants, n, classes].
        pairs: of variants, by their places.
        offsets: fp64 [variants, classes]: the best offsets under every variant.
    """
    ahead, behind = torch.tensor([pair.ahead for pair in pairs]), torch.tensor([pair.behind for pair in pairs])
    distance = torch.tensor([pair.distance for pair in pairs], dtype=torch.float64)
    change = (logits[ahead] - logits[behind]) / distance.view(-1, 1, 1)
    moved = logits + offsets.unsqueeze(1)
    p = torch.softmax((moved[ahead] + moved[behind]) / 2, -1)
    pull = p * (change - (p * change).sum(-1, keepdim=True))  # M_i d_i
    matrix = torch.diag_embed(p.sum(1)) - p.mT @ p + RIDGE * torch.eye(p.shape[-1], dtype=p.dtype)
    common = pull.sum(1)
    total = (change * pull).sum((1, 2)) - (common * torch.linalg.solve(matrix, common)).sum(-1)
    return (total / logits.shape[1]).clamp(min=0.0).mean()
