"""Calibrated classification: a model's general preference for some classes is taken out of the loss.

A language model favours some answers whatever the text (Zhao et al. 2021, arXiv 2102.09690). That bias is one number
per class, and few directions in the space of weights (one, if there are two classes) move it for all samples alike.
Along them the loss is steep and curved, and single samples pull far apart. So they make most of the noise of a
zeroth-order estimate, and limit the learning rate. Here the loss of a batch is the least that any offsets of the
classes can make it,

    L(w) = min_b  1/n sum_i CE(z_i(w) + b, y_i)  +  RIDGE / (2 n) |b|^2

with logits z_i, and labels y_i. Its gradient is that of the cross-entropy at the best b (the envelope theorem), where
residuals of every class sum to zero (but for the ridge): the common part of the samples' gradients cancels out.
Evidence is in examples/studies/README.md. Offsets for predictions are fitted to training samples in the same way.

Calibrated losses of minibatches are biased low: each batch is scored with the offsets that fit that very batch best,
and the fewer samples it has, the better they fit it. So ``loss/train`` of a calibrated run is a signal for the
estimates, and must not be compared with a validation loss (whose offsets come from training samples), with the losses
of another batch size, or with those of an uncalibrated run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mezo_dist.tasks.batches import MicroBatch
from mezo_dist.tasks.kind import Scores
from mezo_dist.tasks.scoring import cross_entropy

RIDGE = 0.1
"""Weight of the penalty |b|^2 / 2, against one sample's loss. It keeps the offset of a class that is missing finite."""
MOST_SAMPLES = 1024
"""Training samples to which the offsets for predictions are fitted, at most: they are few numbers."""
FILE = "calibration.json"
_MOST_STEPS = 100


@dataclass(frozen=True)
class Calibration:
    """The offsets that predictions by a model need."""

    words: Sequence[str]
    """Label word of each class."""
    tokens: Sequence[int]
    """Tokens whose logits are those of the classes (label words); empty if they are those of a classification head, or
    scores of options."""
    offsets: Tensor
    """fp32 [classes]"""
    is_head: bool
    """A classification head gives one logit per class."""

    def adjusted(self, scores: Scores, batch: MicroBatch) -> Scores:
        """The scores of a micro-batch with the offsets added to its logits."""
        return cross_entropy(scores.payload + self.offsets, batch.targets["label"])

    def by_word(self) -> dict[str, float]:
        """Offsets by class."""
        return dict(zip(self.words, self.offsets.tolist(), strict=True))

    def to_json(self, bias: str | None) -> str:
        """Contents of `FILE`, for people and programs that use an exported model.

        Args:
            bias: the weight of the exported model that holds the offsets already, if one does.
        """
        what = "classes' logits" if self.tokens or self.is_head else "options' scores"
        tokens = dict(zip(self.words, self.tokens, strict=True)) if self.tokens else None
        how = f"nothing to do: they are in {bias}" if bias else f"add them to the {what} before comparing these"
        facts = {"offsets": self.by_word(), "tokens": tokens, "added_to": bias, "how_to_use": how}
        return json.dumps(facts, indent=2) + "\n"


def best_offsets(logits: Tensor, labels: Tensor) -> Tensor:
    """The offsets b above, by Newton's method with halved steps (the problem is smooth and strictly convex).

    Args:
        logits: fp64 [..., n, classes], finite.
        labels: int64 [n].

    Returns:
        fp64 [..., classes]; they sum to zero.
    """
    counts = F.one_hot(labels, logits.shape[-1]).sum(0)
    ridge = RIDGE * torch.eye(logits.shape[-1], dtype=logits.dtype)
    offsets = -logits.mean(-2)  # a start that leaves few steps
    offsets = offsets - offsets.mean(-1, keepdim=True)
    for _ in range(_MOST_STEPS):
        p = torch.softmax(logits + offsets.unsqueeze(-2), -1)
        gradient = p.sum(-2) - counts + RIDGE * offsets
        if float(gradient.abs().max()) < 1e-10 * len(labels):
            break
        hessian = torch.diag_embed(p.sum(-2)) - p.mT @ p + ridge
        offsets = _descend(logits, labels, offsets, torch.linalg.solve(hessian, gradient))
    return offsets - offsets.mean(-1, keepdim=True)


def calibrated_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """L above.

    Args:
        logits: fp64 [..., n, classes], finite.
        labels: int64 [n].

    Returns:
        fp64 [...].
    """
    return _total(logits, labels, best_offsets(logits, labels)) / len(labels)


def _total(logits: Tensor, labels: Tensor, offsets: Tensor) -> Tensor:
    """n L at the given offsets: fp64 [...].

    Args:
        logits: fp64 [..., n, classes].
        labels: int64 [n].
        offsets: fp64 [..., classes].
    """
    moved = logits + offsets.unsqueeze(-2)
    of_label = moved.gather(-1, labels.expand(moved.shape[:-1]).unsqueeze(-1)).squeeze(-1)
    return (moved.logsumexp(-1) - of_label).sum(-1) + RIDGE / 2 * offsets.square().sum(-1)


def _descend(logits: Tensor, labels: Tensor, offsets: Tensor, step: Tensor) -> Tensor:
    """``offsets`` - ``step``, where the step is halved until the loss does not rise.

    Args:
        logits: fp64 [..., n, classes].
        labels: int64 [n].
        offsets: fp64 [..., classes].
        step: shaped as ``offsets``.
    """
    before = _total(logits, labels, offsets)
    for _ in range(40):
        worse = _total(logits, labels, offsets - step) > before
        if not worse.any():
            break
        step = torch.where(worse.unsqueeze(-1), step / 2, step)
    return offsets - step
