"""Rank 0 first: what goes into a folder that ranks share, such as the hub's cache, is put there by one of them.

The libraries that fill such a folder lock it, but network file systems do not always have locks.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from mezo_dist.distributed.communicator import Communicator
from mezo_dist.errors import UserError

T = TypeVar("T")
BEAT_S = 5.0
"""How often rank 0 says that it is still at work: a download may take longer than ``distributed.timeout_s``."""


def rank_zero_first(comm: Communicator, work: Callable[[], T]) -> T:
    """``work()``, on rank 0 and then on the others. Collective.

    Args:
        comm: the ranks.
        work: what finds its results in the shared folder the second time; without collectives of its own.

    Raises:
        UserError: on all ranks alike, if ``work`` raised OSError or UserError on some.
    """
    if comm.world_size == 1:
        return work()
    results: list[T] = []

    def here() -> None:
        results.append(work())

    if comm.rank == 0:
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(here)
            while not wait([future], timeout=BEAT_S).done:
                comm.broadcast_text("at work")
        error = future.exception()
        comm.broadcast_text(f"failed: {error}" if error else "done")
        if error is not None and not isinstance(error, OSError | UserError):
            raise error
    else:
        while (state := comm.broadcast_text("")) == "at work":
            pass
        error = UserError(state) if state != "done" else None
    if error is not None:
        raise UserError(f"rank(s) [0]: {str(error).removeprefix('failed: ')}") from error
    comm.collect(here if comm.rank else lambda: None)
    return results[0]
