"""Offsets of classes: that they are the best there are, whatever the logits."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mezo_dist.objectives.calibration import RIDGE, Calibration, best_offsets, calibrated_loss


def draw(num_samples: int, num_classes: int, scale: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits with a strong bias for some classes, and labels of which some may be missing."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_samples, num_classes, generator=generator, dtype=torch.float64)
    bias = torch.randn(num_classes, generator=generator, dtype=torch.float64)
    return scale * (logits + 3 * bias), torch.randint(num_classes, (num_samples,), generator=generator)


def by_hand(logits: Tensor, labels: Tensor, offsets: Tensor) -> float:
    """The loss at given offsets."""
    penalty = RIDGE / 2 * float(offsets.square().sum()) / len(labels)
    return float(F.cross_entropy(logits + offsets, labels)) + penalty


CASES = {
    "two classes": draw(16, 2, 1.0),
    "many classes, most of them missing": draw(8, 40, 1.0),
    "one sample": draw(1, 3, 1.0),
    "flat logits": (torch.zeros(6, 3, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1, 2])),
    "one class alone": (torch.randn(9, 2, dtype=torch.float64), torch.ones(9, dtype=torch.int64)),
    "wide apart": draw(64, 5, 50.0),
    "separable": (torch.tensor([[30.0, 0.0], [0.0, 30.0]] * 4, dtype=torch.float64), torch.tensor([0, 1] * 4)),
    "all wrong, and sure of it": (torch.tensor([[1e3, -1e3]] * 4, dtype=torch.float64), torch.tensor([1, 1, 1, 0])),
}


@pytest.mark.parametrize("name", CASES)
def test_no_other_offsets_are_better(name: str) -> None:
    logits, labels = CASES[name]
    best = best_offsets(logits, labels)
    best_loss = by_hand(logits, labels, best)
    assert float(calibrated_loss(logits, labels)) == pytest.approx(best_loss, rel=1e-12)
    # Smooth and strictly convex: a point without slope is the minimum.
    p = torch.softmax(logits + best, -1)
    slope = p.sum(0) - F.one_hot(labels, logits.shape[1]).sum(0) + RIDGE * best
    assert float(slope.abs().max()) < 1e-6
    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 0.1, 3.0):
        other = best + size * torch.randn(best.shape, generator=generator, dtype=torch.float64)
        assert by_hand(logits, labels, other) > best_loss


def test_many_batches_at_once_are_each_their_own() -> None:
    batches = [draw(12, 3, scale, seed) for seed, scale in enumerate([0.1, 1.0, 30.0])]
    labels = batches[0][1]
    together = calibrated_loss(torch.stack([logits for logits, _ in batches]), labels)
    assert together.tolist() == pytest.approx([float(calibrated_loss(z, labels)) for z, _ in batches], rel=1e-12)


def test_a_bias_towards_a_class_hardly_changes_the_loss() -> None:
    """That is what it is for: along this direction estimates have no noise, and no curvature."""
    logits, labels = draw(64, 3, 1.0)
    bias = torch.tensor([2.0, -1.0, 0.0], dtype=torch.float64)
    plain = abs(float(F.cross_entropy(logits + bias, labels) - F.cross_entropy(logits, labels)))
    calibrated = abs(float(calibrated_loss(logits + bias, labels) - calibrated_loss(logits, labels)))
    assert calibrated < plain / 20


def test_what_is_written_for_users_of_the_model() -> None:
    calibration = Calibration(["bad", "good"], [17, 4], torch.tensor([0.25, -0.25]), is_head=False)
    said = json.loads(calibration.to_json(None))
    assert said["offsets"] == {"bad": 0.25, "good": -0.25}
    assert said["tokens"] == {"bad": 17, "good": 4}
    assert "add them" in said["how_to_use"]
    assert "classifier.bias" in json.loads(calibration.to_json("classifier.bias"))["how_to_use"]
