"""Ranks that start again find each other, whatever an earlier start has left in the store."""

from __future__ import annotations

import contextlib
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from mezo_dist.distributed.rendezvous import rendezvous
from mezo_dist.errors import UserError
from tests.forked import Program


def start(store: dist.Store, delays: list[float]) -> list[dist.Store]:
    """Meet, each rank (a thread) after a delay in seconds."""

    def come(rank: int) -> dist.Store:
        time.sleep(delays[rank])
        return rendezvous(store, rank, len(delays), timeout_s=60)

    with ThreadPoolExecutor(len(delays)) as pool:
        return list(pool.map(come, range(len(delays))))


def test_every_start_has_a_clean_store_of_its_own() -> None:
    store = dist.HashStore()
    for delays in ([0.0, 0.0, 0.0], [0.3, 0.0, 0.1], [0.0, 0.2, 0.0], [0.2, 0.0], [0.0]):
        places = start(store, delays)
        assert not any(place.check(["mark"]) for place in places)
        places[0].set("mark", str(delays))
        assert {place.get("mark") for place in places} == {str(delays).encode()}


@pytest.mark.parametrize(("rank", "missing"), [(0, [1, 2]), (2, [0])])
def test_ranks_that_do_not_come(rank: int, missing: list[int], caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(dist.DistStoreError, match=re.escape(f"no sign of rank(s) {missing}")):
        rendezvous(dist.HashStore(), rank, 3, timeout_s=0.4, hint_s=0.1, hint=" at home")
    assert caplog.messages == [f"no sign of rank(s) {missing} yet; waiting for up to 0.4 s at home"]


def test_a_rank_that_does_not_come_is_named_on_all_others() -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as pool:
        met = [pool.submit(rendezvous, store, rank, 3, 0.5) for rank in (0, 1)]
        assert [str(one.exception(timeout=60)) for one in met] == ["no sign of rank(s) [2]"] * 2


@pytest.mark.parametrize("sizes", [(2, 3), (3, 2, 3), (2, 8, 8, 8)])
def test_ranks_that_disagree_about_their_number(sizes: tuple[int, ...]) -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(len(sizes)) as pool:
        met = [pool.submit(rendezvous, store, rank, size, 60.0) for rank, size in enumerate(sizes)]
        errors = [one.exception(timeout=30) for one in met]
    assert [type(error) for error in errors] == [UserError] * len(sizes)
    for error in errors:
        assert re.match(
            rf"WORLD_SIZE: rank \d was told .* {sizes[1]} ranks, rank 0 .* {sizes[0]}; start all", str(error)
        )


def test_a_rank_that_comes_when_the_others_have_begun_without_it() -> None:
    store = dist.HashStore()
    start(store, [0.0, 0.0])
    with pytest.raises(UserError, match="rank 2 was told that there are 3 ranks, rank 0 that there are 2"):
        rendezvous(store, 2, 3, timeout_s=0.2)


def environment(rendezvous_at: dict[str, str], rank: int) -> dict[str, str]:
    return {**os.environ, **rendezvous_at, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}


COME = """
import sys, time
from mezo_dist.distributed.connect import connect
time.sleep(float(sys.argv[1]))
comm = connect(timeout_s=60)
print(comm.total(1))
comm.close()
"""


@pytest.mark.distributed
def test_a_rank_that_is_quicker_than_rank_0_after_a_restart_does_not_look_for_the_dead() -> None:
    """As under torchrun, whose store outlives the ranks."""
    store = dist.TCPStore("localhost", 0, is_master=True)
    rendezvous_at = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for delays in (("0", "0"), ("2", "0")):
        with contextlib.ExitStack() as stack:
            ranks = [
                stack.enter_context(Program(["-c", COME, delay], environment=environment(rendezvous_at, rank)))
                for rank, delay in enumerate(delays)
            ]
            assert [rank.finish()[:2] for rank in ranks] == [(0, "2\n")] * 2


CONNECT_SLOWLY = """
import sys, time
import torch.distributed as dist

from mezo_dist.distributed.rendezvous import rendezvous
from mezo_dist.distributed.connect import connect
connected, seconds = dist.init_process_group, float(sys.argv[1])
def slowly(*args, **kwargs):
    connected(*args, **kwargs)
    time.sleep(seconds)
    print(time.monotonic())
dist.init_process_group = slowly
comm = connect(timeout_s=60)
print(time.monotonic())
comm.barrier()
comm.close()
"""


@pytest.mark.distributed
def test_no_rank_goes_on_while_another_still_connects() -> None:
    """One that stopped at once, for a bad setting, would abort the other now and then: gloo's connections are not made
    at both ends at once."""
    store = dist.TCPStore("localhost", 0, is_master=True)
    rendezvous_at = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(Program(["-c", CONNECT_SLOWLY, seconds], environment=environment(rendezvous_at, rank)))
            for rank, seconds in enumerate(["1.5", "0"])
        ]
        outputs = [rank.finish()[1] for rank in ranks]
    (connected, _), (_, went_on) = ([float(line) for line in output.split()] for output in outputs)
    assert went_on >= connected
