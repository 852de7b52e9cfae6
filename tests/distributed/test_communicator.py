"""Rounds: ranks that agree are added up, one that does not is named, and a lost one is the same error everywhere."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mezo_dist.distributed.communicator import (
    PAYLOAD_WORDS,
    Communicator,
    OutOfStepError,
    fingerprint,
)
from mezo_dist.distributed.watchdog import Watchdog
from mezo_dist.errors import LostRankError


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
    total = comm.round(torch.arange(100), mark)
    assert others.lengths == [PAYLOAD_WORDS, 100 + 2 - PAYLOAD_WORDS]
    assert total.tolist() == [2 * i if i < 30 else i + 1 for i in range(100)]
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


class Pair:
    """A group of two ranks of four."""

    ranks = (1, 3)

    def size(self) -> int:
        return len(self.ranks)


def test_some_ranks_agree_among_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, groups, other = Pair(), [], [fingerprint("gather of layer 0") // 2]

    def all_reduce(words: Tensor, group: object) -> None:
        groups.append(group)
        words[0] += other[0]

    def all_gather(gathered: list[Tensor], words: Tensor, group: object) -> None:
        groups.append(group)
        gathered[0].copy_(words)
        gathered[1].copy_(torch.tensor(other))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "all_gather", all_gather)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [*group.ranks])
    comm = Communicator(rank=1, world_size=4)
    comm.wants_stop = True
    comm.synchronize("gather of layer 0", pair)  # type: ignore[arg-type]
    assert groups == [pair]
    assert not comm.stopping, "the other ranks would not know"
    assert comm.payload_bytes == 8 * PAYLOAD_WORDS
    other[0] += 1
    with pytest.raises(OutOfStepError, match=r"rank\(s\) \[3\] .*seen on rank 1, round 2"):
        comm.synchronize("gather of layer 0", pair)  # type: ignore[arg-type]
    assert groups == [pair] * 3


def test_alone_nothing_is_sent() -> None:
    comm = Communicator()
    assert comm.round(torch.tensor([5]), fingerprint("x")).tolist() == [5]
    comm.barrier()
    comm.agree({"config": "a"})
    assert comm.broadcast_text("text") == "text"
    assert comm.payload_bytes == 0


# Lost ranks

CLOSED = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4242"


def test_a_closed_connection_is_a_lost_rank_whoever_issued_the_collective() -> None:
    comm = Communicator(rank=0, world_size=3)
    comm.place = "step 7"
    lost = pytest.raises(LostRankError, match=r"^step 7, gather of layers.0: another rank stopped")
    with lost as error, comm.guarded("gather of layers.0"):
        raise RuntimeError(CLOSED)
    assert error.value.exit_status == 75


@pytest.mark.parametrize("text", ["CUDA out of memory", "The size of tensor a (2) must match the size of tensor b (3)"])
def test_what_is_not_about_another_rank_stays_what_it_is(text: str) -> None:
    with pytest.raises(RuntimeError, match="^" + text[:10]), Communicator(rank=0, world_size=2).guarded("gather"):
        raise RuntimeError(text)


def test_alone_nothing_is_guarded() -> None:
    with pytest.raises(RuntimeError, match="gloo"), Communicator().guarded("gather"):
        raise RuntimeError(CLOSED)


def test_of_two_ranks_the_other_one_is_lost() -> None:
    comm = Communicator(1, 2, Watchdog(None, 1, 2, 0.0))
    with pytest.raises(LostRankError, match=r"rank\(s\) \[0\] stopped"), comm.guarded():
        raise RuntimeError(CLOSED)
