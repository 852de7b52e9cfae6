"""Metrics, against values computed by hand from the counts."""

from __future__ import annotations

import pytest
import torch

from mezo_dist.config.task import Metric
from mezo_dist.tasks.metrics import measure

# Labels, then predictions
TRUTH = [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
GUESS = [0, 0, 0, 1, 1, 1, 1, 1, 0, 0]  # of class 1: 4 true, 1 false, 2 missed; of class 0: 3 true, 2 false, 1 missed


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("accuracy", 7 / 10),
        ("f1", 2 * 4 / (2 * 4 + 1 + 2)),
        ("macro-f1", (2 * 4 / (2 * 4 + 1 + 2) + 2 * 3 / (2 * 3 + 2 + 1)) / 2),
        ("matthews", (4 * 3 - 1 * 2) / (5 * 6 * 5 * 4) ** 0.5),
    ],
)
def test_metrics_of_two_classes(metric: Metric, value: float) -> None:
    assert measure(metric, torch.tensor(GUESS), torch.tensor(TRUTH), 2) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("accuracy", 4 / 6),
        ("macro-f1", (2 * 2 / (2 * 2 + 1) + 2 * 1 / (2 * 1 + 1 + 1) + 2 * 1 / (2 * 1 + 1)) / 3),
        # R_K: (N trace - sum of products of counts) / sqrt of (N^2 - sum of squares), for truth and for guesses
        ("matthews", (6 * 4 - (3 * 2 + 2 * 2 + 1 * 2)) / ((36 - (4 + 4 + 4)) * (36 - (9 + 4 + 1))) ** 0.5),
    ],
)
def test_metrics_of_three_classes(metric: Metric, value: float) -> None:
    truth, guess = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 2, 2])
    assert measure(metric, guess, truth, 3) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("metric", ["accuracy", "f1", "macro-f1", "matthews"])
def test_perfect_predictions(metric: Metric) -> None:
    assert measure(metric, torch.tensor(TRUTH), torch.tensor(TRUTH), 2) == pytest.approx(1.0)
