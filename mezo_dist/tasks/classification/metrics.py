"""Figures of merit of a split, computed from the counts of its predictions.

They are written out here, though torchmetrics has them: its import brings SciPy's signal processing, Matplotlib and
every other metric, and took a fifth of the time from a command to its first step. The tests compare the two.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from mezo_dist.config.kinds.classification import Metric


def measure(metric: Metric, prediction: Tensor, label: Tensor, num_classes: int) -> float:
    """The figure of merit of a split, to 7 digits.

    Args:
        metric: its name. ``f1`` is that of the second of two classes, ``macro-f1`` the unweighted mean over the classes
            that occur, be it among labels or predictions. ``matthews`` is the correlation coefficient R_K of Gorodkin
            (2004), for two classes that of Matthews (1975).
        prediction: int64 [n], predicted classes.
        label: int64 [n], true classes.
        num_classes: number of classes.

    Returns:
        A number from 0 to 1; for ``matthews`` from -1 to 1. It is 0 where the definition divides by 0: for ``f1``
        without a sample of the class among labels and predictions, for ``matthews`` if all labels or all predictions
        are of one class.
    """
    pairs = torch.bincount((label * num_classes + prediction).cpu(), minlength=num_classes**2)
    counts: list[list[int]] = pairs.view(num_classes, num_classes).tolist()  # [true class][predicted class]
    if metric == "accuracy":
        value = _ratio(sum(counts[k][k] for k in range(num_classes)), sum(map(sum, counts)))
    elif metric == "f1":
        value = _f1(counts, 1)
    elif metric == "macro-f1":
        occurring = [k for k in range(num_classes) if sum(counts[k]) + sum(row[k] for row in counts)]
        value = _ratio(sum(_f1(counts, k) for k in occurring), len(occurring))
    else:
        value = _matthews(counts)
    return float(f"{value:.7g}")  # what fp32 holds: files keep the values that they had when these were fp32


def _f1(counts: list[list[int]], k: int) -> float:
    """The harmonic mean of precision and recall of class ``k``."""
    return _ratio(2 * counts[k][k], sum(counts[k]) + sum(row[k] for row in counts))


def _matthews(counts: list[list[int]]) -> float:
    labels, predictions = [sum(row) for row in counts], [sum(column) for column in zip(*counts, strict=True)]
    n, right = sum(labels), sum(counts[k][k] for k in range(len(counts)))
    agreement = n * right - sum(a * b for a, b in zip(labels, predictions, strict=True))
    spreads = [n * n - sum(a * a for a in side) for side in (labels, predictions)]
    return _ratio(agreement, sqrt(spreads[0] * spreads[1]))


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0
