"""Scores of whole splits, summed exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.engine import Engine
from mezo_dist.runs.evaluation import Evaluator
from mezo_dist.tasks.batches import MicroBatch
from mezo_dist.tasks.kind import Forward, Scores

SIZE = 1000


def score(losses: torch.Tensor) -> float:
    """The loss of a split whose samples have these losses."""
    batch = []
    for number, part in enumerate(losses.split(SIZE)):
        zeros = torch.zeros(len(part), dtype=torch.int64)
        slots = tuple(range(SIZE * number, SIZE * number + len(part)))
        batch.append(MicroBatch(slots, {"input_ids": zeros[:, None]}, {}, columns=2))

    def evaluate_groups(
        variants: Sequence[Any], items: Sequence[MicroBatch], *_: Any, **__: Any
    ) -> Iterator[list[list[Scores]]]:
        for item in items:
            loss = losses[list(item.slots)]
            ones = torch.ones(len(loss), dtype=torch.int64)
            yield [[Scores(loss, ones, torch.zeros(len(loss), 2))]]

    engine = cast(Engine, SimpleNamespace(evaluate_groups=evaluate_groups, model=torch.nn.Linear(1, 1)))
    evaluator = Evaluator(engine, cast(Forward, None), Communicator())
    return evaluator.score(batch, lambda *_: {}, lambda _: None)["loss"]


def test_sums_of_large_losses_do_not_wrap() -> None:
    losses = torch.linspace(0.0, 1e6, 100_000, dtype=torch.float64)
    assert score(losses) == pytest.approx(5e5, rel=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2.0**30])
def test_a_loss_that_is_no_number_is_said(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    assert math.isnan(score(torch.tensor([0.5, bad, 0.5])))
    assert "1 of 3 losses are not finite, or far too large: their mean is NaN" in caplog.text
