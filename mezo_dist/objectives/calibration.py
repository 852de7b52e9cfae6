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
_MOST_HALVINGS = 40
_ELEMENTS_AT_ONCE = 32_768
"""Logits that are looked at together, of all halvings of a step that are tried at once: 256 KiB."""


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
    states = [offsets]
    while len(states) <= _MOST_STEPS:
        p = torch.softmax(logits + offsets.unsqueeze(-2), -1)
        gradient = p.sum(-2) - counts + RIDGE * offsets
        if float(gradient.abs().max()) < 1e-10 * len(labels):
            break
        hessian = torch.diag_embed(p.sum(-2)) - p.mT @ p + ridge
        offsets = _descend(logits, labels, offsets, torch.linalg.solve(hessian, gradient))
        before = next((step for step, state in enumerate(states) if torch.equal(state, offsets)), None)
        if before is not None:  # rounding leads round and round: this is where it would be after all steps
            offsets = states[before + (_MOST_STEPS - before) % (len(states) - before)]
            break
        states.append(offsets)
    return offsets - offsets.mean(-1, keepdim=True)


def calibrated_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """L above.

    Args:
        logits: fp64 [..., n, classes], finite.
        labels: int64 [n].

    Returns:
        fp64 [...].
    """
    return loss_at(logits, labels, best_offsets(logits, labels))


def loss_at(logits: Tensor, labels: Tensor, offsets: Tensor) -> Tensor:
    """What L is the least of: the loss at given offsets.

    Args:
        logits: fp64 [..., n, classes], finite.
        labels: int64 [n].
        offsets: fp64 [..., classes].

    Returns:
        fp64 [...].
    """
    return _total(logits, labels, offsets) / len(labels)


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
        logits: as in `best_offsets`.
        labels: as in `best_offsets`.
        offsets: fp64 [..., classes].
        step: fp64 [..., classes].
    """
    before = _total(logits, labels, offsets)
    at_once = max(1, min(_MOST_HALVINGS, _ELEMENTS_AT_ONCE // max(1, logits.numel())))
    rises, halvings = _total(logits, labels, offsets - step) > before, 0
    while halvings < _MOST_HALVINGS and rises.any():
        count = min(at_once, _MOST_HALVINGS - halvings)
        shorter = torch.stack([step / 2**k for k in range(1, count + 1)])  # exact, so all can be tried together
        still = _total(logits, labels, offsets - shorter) > before
        first = still.long().cumprod(0).sum(0).clamp(max=count - 1)  # the first that does not rise, or the last
        chosen = shorter.gather(0, first.unsqueeze(-1).expand_as(step).unsqueeze(0))[0]
        step = torch.where(rises.unsqueeze(-1), chosen, step)
        rises, halvings = rises & still.all(0), halvings + count
    return offsets - step
