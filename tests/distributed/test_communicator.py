"""The comm: sums that do not depend on their order, bytes that do not depend on the model, clear words on failure."""

from __future__ import annotations

import math
import os
import random
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mezo_dist.algorithms.base import Evaluation, Losses, Variant
from mezo_dist.directions.combination import Combination
from mezo_dist.distributed.communicator import PAYLOAD_WORDS, Communicator, OutOfStepError, fingerprint
from mezo_dist.distributed.connect import connect, share_cores
from mezo_dist.distributed.fixed_point import mean, to_fixed
from mezo_dist.errors import UserError
from mezo_dist.objectives.classification import Scores
from mezo_dist.runs.evaluation import Evaluator
from mezo_dist.tasks.batches import MicroBatch, cut
from mezo_dist.tasks.prompts import Sample

fp32 = st.floats(min_value=-1e6, max_value=1e6, width=32)


@settings(deadline=None)
@given(st.lists(fp32, min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_sums_do_not_depend_on_the_order(losses: list[float], shuffle: random.Random) -> None:
    fixed, sound = to_fixed(torch.tensor(losses))
    assert bool(sound.all())
    total = int(fixed.sum())
    shuffled = fixed.tolist()
    shuffle.shuffle(shuffled)
    place = shuffle.randint(0, len(shuffled))
    assert sum(shuffled[:place]) + sum(shuffled[place:]) == total
    exact = sum((Fraction(loss) for loss in losses), Fraction(0))
    assert abs(Fraction(total, 2**32) - exact) <= Fraction(len(losses), 2**33)


@settings(deadline=None)
@given(st.integers(-(2**61), 2**61))
def test_fixed_point_round_trip_is_exact(multiple: int) -> None:
    value = multiple / 2**32
    fixed, sound = to_fixed(torch.tensor([value], dtype=torch.float64))
    assert bool(sound)
    assert int(fixed) / 2**32 == value


def test_every_loss_from_2_to_the_minus_9_up_is_exact_in_fp32() -> None:
    losses = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 20 + 2**-9
    assert torch.equal(to_fixed(losses)[0].double() / 2**32, losses.double())


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 2.0**30, -(2.0**30), 3e38])
def test_what_is_no_loss_is_flagged_and_counts_nothing(loss: float) -> None:
    fixed, sound = to_fixed(torch.tensor([1.5, loss, -0.25]))
    assert sound.tolist() == [True, False, True]
    assert fixed.tolist() == [3 * 2**31, 0, -(2**30)]


def test_the_mean_is_rounded_once() -> None:
    total = sum(int(to_fixed(torch.tensor([loss]))[0]) for loss in (0.1, 0.2, 0.7))
    exact = sum(Fraction(float(torch.tensor(loss))) for loss in (0.1, 0.2, 0.7)) / 3
    assert mean(total, 3) == float(exact)
    assert mean(2**61 + 1, 7) == float(Fraction(2**61 + 1, 7 * 2**32))


# Rounds


class OtherRanks:
    """Stands in for the other ranks of a world: what they put into each collective is what ``others`` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *others: list[int]) -> None:
        self.lengths: list[int] = []
        self._others = others
        monkeypatch.setattr(dist, "all_reduce", self._all_reduce)
        monkeypatch.setattr(dist, "all_gather", self._all_gather)

    def _all_reduce(self, words: Tensor) -> None:
        self.lengths.append(len(words))
        for other in self._others:
            if len(words) == PAYLOAD_WORDS and len(self.lengths) == 1:
                words += torch.tensor(other + [0] * (PAYLOAD_WORDS - len(other)))
            else:
                words += 1

    def _all_gather(self, gathered: list[Tensor], words: Tensor) -> None:
        for target, source in zip(gathered, [words, *(torch.tensor(o[:1]) for o in self._others)], strict=True):
            target.copy_(source)


def test_a_round_adds_up_and_is_metered(monkeypatch: pytest.MonkeyPatch) -> None:
    mark = fingerprint("step", 3)
    others = OtherRanks(monkeypatch, [mark // 3, 0, 10, 20, 30, 40], [mark // 3, 0, -1, -1, -1, -1])
    comm = Communicator(rank=0, world_size=3)
    values = torch.tensor([[1, 2], [3, 4]])
    assert comm.round(values, mark).tolist() == [[10, 21], [32, 43]]
    assert values.tolist() == [[1, 2], [3, 4]]
    assert others.lengths == [PAYLOAD_WORDS]
    assert (comm.payload_bytes, comm.rounds) == (256, 1)


def test_a_long_round_meets_before_it_sends_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    mark = fingerprint("step", 3)
    others = OtherRanks(monkeypatch, [mark // 2, 0, *range(30)])
    comm = Communicator(rank=0, world_size=2)
    found = comm.round(torch.arange(100), mark)
    assert others.lengths == [PAYLOAD_WORDS, 100 + 2 - PAYLOAD_WORDS]
    assert found.tolist() == [2 * i if i < 30 else i + 1 for i in range(100)]
    assert comm.payload_bytes == 8 * 102


def test_a_rank_in_another_round_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = fingerprint("step", 3) // 3, fingerprint("step", 4) // 3
    OtherRanks(monkeypatch, [here], [there])
    with pytest.raises(OutOfStepError, match=r"rank\(s\) \[2\] .*seen on rank 0, round 1"):
        Communicator(rank=0, world_size=3).round(torch.zeros(100, dtype=torch.int64), fingerprint("step", 3))


def test_one_rank_that_wants_to_stop_stops_all_in_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    mark = fingerprint("step", 3)
    OtherRanks(monkeypatch, [mark // 2, 1, 20])
    comm = Communicator(rank=0, world_size=2)
    assert comm.round(torch.tensor([5]), mark).tolist() == [25]
    assert (comm.stopping, comm.wants_stop) == (True, False)
    alone = Communicator()
    alone.wants_stop = True
    assert not alone.stopping
    alone.barrier()
    assert alone.stopping


def test_alone_nothing_is_sent() -> None:
    comm = Communicator()
    assert comm.round(torch.tensor([5]), fingerprint("x")).tolist() == [5]
    comm.barrier()
    comm.agree({"config": "a"})
    assert comm.broadcast_text("text") == "text"
    assert comm.payload_bytes == 0


@dataclass
class FakeEngine:
    """Gives every sample of a micro-batch the loss that ``losses`` has at its place in the batch."""

    losses: list[float]
    model: Any = None
    asked: list[int] = field(default_factory=list)

    def evaluate(self, variants: Any, items: Any, forward: Any, **_: Any) -> list[list[Scores]]:
        self.asked.append(len(variants))
        return [[self._scores(item) for _ in variants] for item in items]

    def _scores(self, item: MicroBatch) -> Scores:
        ones = torch.ones(len(item.slots), dtype=torch.int64)
        losses = torch.tensor([self.losses[slot] for slot in item.slots])
        return Scores(losses, ones, ones, losses.unsqueeze(1))


def evaluate(
    losses: list[float],
    comm: Communicator,
    num_variants: int = 4,
    *,
    each_sample: bool = False,
    calibrated_classes: int = 0,
) -> Losses | None:
    batch = cut([Sample((1, 2, 3), 0, 2)] * len(losses), 2, 0)
    variants = tuple(Variant(Combination.single(v, 1.0)) for v in range(num_variants))
    engine: Any = FakeEngine(losses)
    objective: Any = None
    evaluator = Evaluator(engine, objective, comm, calibrated_classes=calibrated_classes)
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
    assert evaluate([0.5, 0.25, 1.0], Communicator(), calibrated_classes=1) is not None
    assert evaluate([0.5, bad, 1.0], Communicator(), calibrated_classes=1) is None


def test_a_calibrated_loss_is_the_one_that_rank_0_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine's exp may have other last bits, and all ranks must take the same step."""

    rounds: list[Tensor] = []

    def all_reduce(words: Tensor) -> None:
        rounds.append(words.clone())
        words[0] *= 2
        if len(rounds) == 2:
            words[2:6] += 7 << 32

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    assert evaluate([0.5] * 4, Communicator(rank=1, world_size=2), calibrated_classes=1) == Losses((7.0,) * 4)
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
    found = evaluate(losses, Communicator(), 2, each_sample=True)
    assert found == Losses((sum(losses) / 5,) * 2, (tuple(losses),) * 2)


# Connecting


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("given", [{}, {"RANK": "0", "WORLD_SIZE": "1"}, {"WORLD_SIZE": "1"}, {"RANK": "0"}])
def test_a_world_of_one_needs_no_process_group(given: dict[str, str], environment: pytest.MonkeyPatch) -> None:
    for name, value in given.items():
        environment.setenv(name, value)
    comm = connect(timeout_s=1)
    assert (comm.rank, comm.world_size) == (0, 1)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT not set, but WORLD_SIZE=2"),
        ({"RANK": "1"}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set, but RANK=1"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "MASTER_PORT not set"),
        ({"RANK": "one", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "must be a number"),
    ],
)
def test_half_an_environment_is_an_error(given: dict[str, str], message: str, environment: pytest.MonkeyPatch) -> None:
    for name, value in given.items():
        environment.setenv(name, value)
    with pytest.raises(UserError, match=message):
        connect(timeout_s=1)
    assert not dist.is_initialized()


def test_ranks_that_never_come_are_an_error_in_time(environment: pytest.MonkeyPatch, tmp_path: Any) -> None:
    environment.setenv("RANK", "0")
    environment.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"rank 0 of 2 .*could not join .* distributed.timeout_s = 1 s"):
        connect(timeout_s=1, init_method=f"file://{tmp_path}/meet")
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("ranks_here", "chosen", "wanted"),
    [(2, None, 4), (3, None, 2), (99, None, 1), (1, None, 8), (0, None, 8), (2, "8", 8)],
)
def test_ranks_on_one_host_share_its_cores(
    ranks_here: int, chosen: str | None, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = [8]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: threads.append(n))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    share_cores(ranks_here)
    assert threads[-1] == wanted
