"""Figures of merit of a split, through torchmetrics."""

from __future__ import annotations

from torch import Tensor

from mezo_dist.config.task import Metric


def measure(metric: Metric, prediction: Tensor, label: Tensor, num_classes: int) -> float:
    """The figure of merit of a split, computed by torchmetrics.

    Args:
        metric: its name. ``f1`` is that of the second of two classes, ``macro-f1`` the unweighted mean over classes.
        prediction: int64 [n], predicted classes.
        label: int64 [n], true classes.
        num_classes: number of classes.

    Returns:
        A number from 0 to 1; for ``matthews`` from -1 to 1.
    """
    from torchmetrics.functional import classification as tm

    if metric == "accuracy":
        value = tm.multiclass_accuracy(prediction, label, num_classes, average="micro")
    elif metric == "f1":
        value = tm.binary_f1_score(prediction, label)
    elif metric == "macro-f1":
        value = tm.multiclass_f1_score(prediction, label, num_classes, average="macro")
    else:
        value = tm.multiclass_matthews_corrcoef(prediction, label, num_classes)
    return float(f"{float(value):.7g}")  # fp32 has 7 digits: 0.45, not 0.44999998807907104
