"""How ranks that start together find each other, in a store where ranks of an earlier start have left their keys.

torchrun keeps one store for all its restarts, and torch's own start-up writes the same keys every time. A rank that is
quicker than its peer then reads the address of a process that is dead: it fails to connect, or waits for a connection
that nobody will make, until the time-out (pytorch/pytorch#135712; torch 2.13 still has it). So everything goes under a
prefix that is new at every start. Rank 0 chooses it, and tells it to whoever asks: a rank asks under its own number
with a random word, and finds the answer under that word, which no earlier start can have known.
"""

from __future__ import annotations

import datetime
import os
import time
import uuid

import torch
import torch.distributed as dist

from mezo_dist.distributed import environment

POLL_S = 0.01


def meet(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> dist.Store:
    """Wait for all ranks; a part of ``store`` in which nothing has been written yet, the same on all of them.

    Raises:
        torch.distributed.DistError: not all came within ``timeout_s`` seconds; on rank 0 it names who did not.
    """
    word = uuid.uuid4().hex
    if rank == 0:
        _answer(store, word, set(range(1, world_size)), timeout_s)
        return dist.PrefixStore(word, store)
    store.set(f"asks/{rank}", word)
    chosen = f"answer/{word}"
    store.wait([chosen], datetime.timedelta(seconds=timeout_s))
    start = store.get(chosen).decode()
    store.set(f"{start}/has/{rank}", "")
    return dist.PrefixStore(start, store)


def wait_until_connected(store: dist.Store, world_size: int, timeout_s: float) -> None:
    """Wait until all ranks are here, in a store that `meet` gave. To be called once they are connected to each other.

    gloo says that it is as soon as a rank's own ends are. If that rank then stopped at once (for a bad setting, say),
    those that still connect would now and then be aborted, without a word about why.

    Raises:
        torch.distributed.DistError: not all came within ``timeout_s`` seconds.
    """
    if store.add("connected", 1) == world_size:
        store.set("all connected", "")
    store.wait(["all connected"], datetime.timedelta(seconds=timeout_s))


def _answer(store: dist.Store, start: str, missing: set[int], timeout_s: float) -> None:
    """Answer until all have heard. What an earlier start's rank has asked is answered too, and does no harm."""
    deadline = time.monotonic() + timeout_s
    while missing:
        for rank in sorted(missing):
            if store.check([f"{start}/has/{rank}"]):
                missing.remove(rank)
            elif store.check([f"asks/{rank}"]):
                store.set(f"answer/{store.get(f'asks/{rank}').decode()}", start)
        if missing and time.monotonic() > deadline:
            raise dist.DistStoreError(f"no sign of rank(s) {sorted(missing)}")
        time.sleep(POLL_S)


def meeting_point(found: environment.Ranks) -> str:
    """A URL for `init_process_group`. torch knows by itself where torchrun has a store there already."""
    address, port = (found.address, found.port) if found.address else environment.meet_through_mpi(found)
    if not found.on_one_host:
        choose_interface(address)
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


def choose_interface(address: str) -> str:
    """Have gloo talk through the network card that leads to ``address``, unless GLOO_SOCKET_IFNAME names one already.

    By itself gloo takes the card of this host's own name, which on many systems is the loopback: nobody else's.
    """
    if not os.environ.get("GLOO_SOCKET_IFNAME") and (interface := environment.interface_towards(address)):
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    return os.environ.get("GLOO_SOCKET_IFNAME", "")


def share_cores(ranks_here: int) -> None:
    """Give each of several ranks on this host its part of the cores, unless OMP_NUM_THREADS says how many it takes.

    torchrun does so, after its fashion (one thread each); other launchers leave every rank to take all cores, and two
    ranks that do are 20 times slower than two that share them.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // max(1, ranks_here))
    if ranks_here > 1 and "OMP_NUM_THREADS" not in os.environ and threads < torch.get_num_threads():
        torch.set_num_threads(threads)
