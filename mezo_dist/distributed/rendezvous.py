"""How ranks that start together find each other, in a store where ranks of an earlier start have left their keys.

torchrun keeps one store for all its restarts, and torch's own start-up writes the same keys every time. A rank that is
quicker than its peer then reads the address of a process that is dead: it fails to connect, or waits for a connection
that nobody will make, until the time-out (pytorch/pytorch#135712; torch 2.13 still has it). So everything goes under a
prefix that is new at every start. Rank 0 chooses it, and tells it to whoever asks: a rank asks under its own number
with a random word, and finds the answer under that word, which no earlier start can have known.
"""

from __future__ import annotations

import datetime
import time
import uuid

import torch.distributed as dist

POLL_S = 0.01


def rendezvous(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> dist.Store:
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
    """Wait until all ranks are here, in a store that `rendezvous` gave. To be called once they are connected to each
    other.

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
