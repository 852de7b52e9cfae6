"""Curvature along directions, from logits and from losses of samples, against autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezo_dist.algorithms.base import Pair
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.loss_table import LossTable
from mezo_dist.objectives.calibration import RIDGE, best_offsets
from mezo_dist.objectives.curvature import gauss_newton

Problem = tuple[nn.Module, Tensor, Tensor, list[dict[str, Tensor]]]
"""A model, inputs, labels and two directions."""
EPS = 1e-4
SAMPLES, CLASSES = 7, 3
PAIRS = (Pair(0, 1, 2 * EPS), Pair(2, 3, 2 * EPS), Pair(0, 4, EPS), Pair(2, 4, EPS))
"""Two directions, two-sided and one-sided."""


@pytest.fixture
def problem() -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()
    directions = [{name: torch.randn_like(p) for name, p in model.named_parameters()} for _ in range(2)]
    inputs, labels = torch.randn(SAMPLES, 4).double(), torch.randint(CLASSES, (SAMPLES,))
    return model, inputs, labels, directions


def logits_at(model: nn.Module, inputs: Tensor, direction: dict[str, Tensor], size: float) -> Tensor:
    moved = {name: p + size * direction[name] for name, p in model.named_parameters()}
    return torch.func.functional_call(model, moved, (inputs,)).detach()


def variants(model: nn.Module, inputs: Tensor, directions: list[dict[str, Tensor]]) -> Tensor:
    """fp64 [5, n, classes]: both sides of both directions, and in between."""
    sizes = [(direction, sign * EPS) for direction in directions for sign in (1, -1)]
    return torch.stack([logits_at(model, inputs, z, size) for z, size in [*sizes, (directions[0], 0.0)]])


def along(model: nn.Module, inputs: Tensor, direction: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits, and how they change along a direction, exactly."""

    def moved(size: Tensor) -> Tensor:
        weights = {name: p + size * direction[name] for name, p in model.named_parameters()}
        return torch.func.functional_call(model, weights, (inputs,))

    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    logits, change = torch.autograd.functional.jvp(moved, zero, one)
    return logits.detach(), change.detach()


def test_of_calibrated_losses_it_is_that_of_autograd(
    problem: Problem,
) -> None:
    """The second derivative of min_b L(logits + t change, b), where the Gauss-Newton matrix takes logits for linear."""
    model, inputs, labels, directions = problem
    rows = variants(model, inputs, directions)
    for pair, direction in zip(PAIRS, [directions[0], directions[1]] * 2, strict=True):
        logits, change = along(model, inputs, direction)

        def loss(t: Tensor, b: Tensor, logits: Tensor = logits, change: Tensor = change) -> Tensor:
            return F.cross_entropy(logits + t * change + b, labels) + RIDGE / 2 * b.square().sum() / SAMPLES

        at = (torch.zeros((), dtype=torch.float64), best_offsets(logits, labels))
        ((tt, tb), (_, bb)) = torch.autograd.functional.hessian(loss, at)
        expected = tt - tb @ torch.linalg.solve(bb, tb)
        curvature = gauss_newton(rows, [pair], best_offsets(rows, labels))
        assert float(curvature) == pytest.approx(float(expected), rel=1e-3)


def test_of_several_directions_it_is_the_mean(
    problem: Problem,
) -> None:
    model, inputs, labels, directions = problem
    rows = variants(model, inputs, directions)
    offsets = best_offsets(rows, labels)
    single = [float(gauss_newton(rows, [pair], offsets)) for pair in PAIRS]
    assert float(gauss_newton(rows, PAIRS, offsets)) == pytest.approx(sum(single) / len(single), rel=1e-12)


def test_what_offsets_undo_has_no_curvature() -> None:
    logits = torch.randn(1, 50, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % CLASSES
    common = torch.tensor([1.0, 0.0, -1.0])
    rows = torch.cat([logits + common, logits])
    curvature = float(gauss_newton(rows, [Pair(0, 1, 1.0)], best_offsets(rows, labels)))
    assert 0 < curvature <= RIDGE * float(common.square().sum()) / 50  # what the ridge costs, and no more


def fisher(ahead: Tensor, behind: Tensor, weights: Tensor, distance: float) -> float:
    """What a `LossTable` says of one direction."""
    table = LossTable(2, len(ahead), 1)
    for variant, losses in enumerate((ahead, behind)):
        table.add(variant, tuple(range(len(losses))), losses, weights)
    total = table.total(Communicator(), 0, [Pair(0, 1, distance)])
    assert total is not None
    assert total.curvature is not None
    return total.curvature


def test_of_single_samples_it_is_that_of_autograd_on_average(
    problem: Problem,
) -> None:
    """Over all labels, each as likely as the model has it, the empirical Fisher matrix is the Gauss-Newton matrix."""
    model, inputs, _, directions = problem
    inputs, z = inputs[:2], directions[0]
    logits, change = along(model, inputs, z)
    p = logits.softmax(-1)
    expected = float((p * change.square()).sum() - (p * change).sum(-1).square().sum()) / 2
    mean = 0.0
    for labels in itertools.product(range(CLASSES), repeat=2):
        of = torch.tensor(labels)
        losses = [F.cross_entropy(logits_at(model, inputs, z, s), of, reduction="none") for s in (EPS, -EPS)]
        weights = torch.ones(2, dtype=torch.int64)
        mean += float(p[range(2), of].prod()) * fisher(losses[0], losses[1], weights, 2 * EPS)
    assert mean == pytest.approx(expected, rel=1e-3)


def test_of_texts_it_is_a_mean_over_tokens() -> None:
    """Two texts of 3 tokens and one: the squares of the sums of their tokens' slopes, over 4 tokens."""
    ahead, behind = torch.tensor([3.5, 1.0], dtype=torch.float64), torch.tensor([3.0, 2.0], dtype=torch.float64)
    assert fisher(ahead, behind, torch.tensor([3, 1]), 0.5) == (1.0**2 + 2.0**2) / 4
