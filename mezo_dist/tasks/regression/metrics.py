"""Correlations of predictions and numbers, written out: torchmetrics has them, but takes long to import."""

from __future__ import annotations

import torch
from torch import Tensor


def pearson(one: Tensor, other: Tensor) -> float:
    """Pearson's correlation coefficient, from -1 to 1, to 7 digits; 0 if all numbers of a side are equal.

    Args:
        one: fp64 [n].
        other: fp64 [n].
    """
    a, b = one - one.mean(), other - other.mean()
    size = float(a.square().sum().sqrt() * b.square().sum().sqrt())
    return float(f"{float((a * b).sum()) / size:.7g}") if size else 0.0


def spearman(one: Tensor, other: Tensor) -> float:
    """Spearman's correlation coefficient: that of Pearson of the ranks. Equal numbers share the mean of their ranks.

    Args:
        one: fp64 [n].
        other: fp64 [n].
    """
    return pearson(_ranks(one), _ranks(other))


def _ranks(values: Tensor) -> Tensor:
    """fp64 [n]: ranks from 1 on."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()  # rank of the last of the equal ones
    return (last - (counts - 1) / 2)[inverse]
