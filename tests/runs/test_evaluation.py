"""A round of forward passes: what it costs on the way between ranks, and what spoils it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mezo_dist.algorithms.base import Evaluation, Losses, Variant
from mezo_dist.directions.combination import Combination
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.objectives.joint import Joint, calibrated
from mezo_dist.runs.evaluation import Evaluator
from mezo_dist.tasks.batches import MicroBatch, cut
from mezo_dist.tasks.classification.kind import collate
from mezo_dist.tasks.classification.prompts import Sample
from mezo_dist.tasks.kind import Scores

CALIBRATED = Joint(calibrated, each_sample=False, is_discrete=False)


@dataclass
class FakeEngine:
    """Gives every sample of a micro-batch the loss that ``losses`` has at its place in the batch."""

    losses: list[float]
    model: nn.Module = field(default_factory=lambda: nn.Linear(1, 1))
    asked: list[int] = field(default_factory=list)

    def evaluate_groups(self, variants: Any, items: Any, forward: Any, **_: Any) -> Iterator[list[list[Scores]]]:
        self.asked.append(len(variants))
        yield [[self._scores(item) for _ in variants] for item in items]

    def _scores(self, item: MicroBatch) -> Scores:
        ones = torch.ones(len(item.slots), dtype=torch.int64)
        losses = torch.tensor([self.losses[slot] for slot in item.slots])
        return Scores(losses, ones, losses.unsqueeze(1))


def evaluate(
    losses: list[float],
    comm: Communicator,
    num_variants: int = 4,
    *,
    each_sample: bool = False,
    joint: Joint | None = None,
) -> Losses | None:
    batch = cut([Sample((1, 2, 3), 0, 2)] * len(losses), 2, 0, collate)
    variants = tuple(Variant(Combination.single(v, 1.0)) for v in range(num_variants))
    engine: Any = FakeEngine(losses)
    objective: Any = None
    evaluator = Evaluator(engine, objective, comm, joint=joint)
    return evaluator.losses(Evaluation(variants, each_sample=each_sample), batch, ("step", 0))


@pytest.mark.parametrize("num_samples", [1, 512])
def test_four_variants_take_256_bytes_whatever_the_batch(num_samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda words: words.mul_(2))
    comm = Communicator(rank=0, world_size=2)
    # The rank has dealt itself half of the samples; its mirror image adds the same losses and the same weights.
    assert evaluate([0.5] * num_samples, comm) == Losses((0.5,) * 4)
    assert comm.payload_bytes <= 256


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2.0**31])
@pytest.mark.parametrize("each_sample", [False, True])
def test_one_bad_loss_anywhere_spoils_the_round(bad: float, each_sample: bool) -> None:
    assert evaluate([0.5, 0.25, 1.0], Communicator(), each_sample=each_sample) is not None
    assert evaluate([0.5, bad, 1.0], Communicator(), each_sample=each_sample) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2.0**31])
def test_one_bad_logit_spoils_a_calibrated_round(bad: float) -> None:
    assert evaluate([0.5, 0.25, 1.0], Communicator(), joint=CALIBRATED) is not None
    assert evaluate([0.5, bad, 1.0], Communicator(), joint=CALIBRATED) is None


def test_a_calibrated_loss_is_the_one_that_rank_0_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine's exp may have other last bits, and all ranks must take the same step."""

    rounds: list[Tensor] = []

    def all_reduce(words: Tensor) -> None:
        rounds.append(words.clone())
        words[0] *= 2
        if len(rounds) == 2:
            words[3:7] += 7 << 32

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    assert evaluate([0.5] * 4, Communicator(rank=1, world_size=2), joint=CALIBRATED) == Losses((7.0,) * 4)
    logits, nothing = (words[2:] for words in rounds)
    assert logits.any()
    assert not nothing.any()


def test_a_bad_loss_on_another_rank_spoils_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_reduce(words: Tensor) -> None:
        words.mul_(2)
        words[2] += 1  # the flag of the other rank

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    assert evaluate([0.5, 0.25], Communicator(rank=0, world_size=2)) is None


def test_sums_that_would_overflow_spoil_the_round() -> None:
    """Each of these is a sound loss, but their sum does not fit: it must not wrap around into a small number."""
    large = 2.0**30 * 0.9
    assert evaluate([large], Communicator()) is not None
    assert evaluate([large, large], Communicator()) is None
    assert evaluate([-large, -large], Communicator()) is None


def test_losses_of_samples_come_in_batch_order() -> None:
    losses = [0.5, 0.25, 1.0, 4.0, 3.0]
    result = evaluate(losses, Communicator(), 2, each_sample=True)
    assert result == Losses((sum(losses) / 5,) * 2, (tuple(losses),) * 2)
