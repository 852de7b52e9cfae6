"""Metrics, against values computed by hand from the counts, and against torchmetrics."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from mezo_dist.config.kinds.classification import Metric
from mezo_dist.tasks.classification.metrics import measure

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


@pytest.mark.parametrize("prediction", [0, 1])
def test_one_answer_to_everything_correlates_with_nothing(prediction: int) -> None:
    truth = torch.tensor(TRUTH)
    assert measure("matthews", torch.full_like(truth, prediction), truth, 2) == 0
    assert measure("matthews", truth, torch.full_like(truth, prediction), 2) == 0


def test_a_class_that_does_not_occur_counts_for_nothing() -> None:
    truth, guess = torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 2])
    assert measure("f1", truth, truth, 2) == 0
    assert measure("macro-f1", truth, guess, 4) == pytest.approx((2 * 3 / (2 * 3 + 1) + 0) / 2)


@pytest.mark.parametrize("num_classes", [2, 5])
def test_torchmetrics_gives_the_same(num_classes: int) -> None:
    from torchmetrics.functional import classification as tm

    peers = {
        "accuracy": lambda guess, truth: tm.multiclass_accuracy(guess, truth, num_classes, average="micro"),
        "f1": lambda guess, truth: tm.binary_f1_score(guess, truth),
        "macro-f1": lambda guess, truth: tm.multiclass_f1_score(guess, truth, num_classes, average="macro"),
        "matthews": lambda guess, truth: tm.multiclass_matthews_corrcoef(guess, truth, num_classes),
    }
    assert peers.keys() == set(get_args(Metric))
    draw = torch.Generator().manual_seed(num_classes)
    for number in range(20):
        truth = torch.randint(num_classes, (10 + 40 * number,), generator=draw)
        noise = torch.randint(num_classes, truth.shape, generator=draw)
        guess = torch.where(torch.rand(truth.shape, generator=draw) < 0.6, truth, noise)
        for metric in get_args(Metric):
            if metric != "f1" or num_classes == 2:
                assert measure(metric, guess, truth, num_classes) == pytest.approx(float(peers[metric](guess, truth)))
