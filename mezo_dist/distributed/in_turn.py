"""Some ranks first: what goes into a folder that ranks share, such as the hub's cache, is put there by one of them.

The libraries that fill such a folder lock it, but network file systems do not always have locks.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

from mezo_dist.distributed.communicator import Communicator
from mezo_dist.errors import UserError

T = TypeVar("T")
BEAT_S = 5.0
"""How often a rank says that it is still at work: a download may take longer than ``distributed.timeout_s``."""
AT_WORK, DONE, FAILED = "at work", "done", "failed: "


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


def in_turns(comm: Communicator, turn: int, work: Callable[[Callable[[], None]], T]) -> T:
    """``work(beat)`` of the ranks whose turn is 0, all at once; then of those with turn 1, and so on. Collective.

    Args:
        comm: the ranks.
        turn: this rank's, from 0 on without gaps.
        work: has no collectives of its own, but calls ``beat`` every now and then: so the ranks that wait know of it.

    Returns:
        What this rank's work returned.

    Raises:
        UserError: on all ranks alike, if ``work`` raised OSError or UserError on some; later turns do not begin then.
    """
    if comm.world_size == 1:
        return work(lambda: None)
    results: list[T] = []
    said_s = time.monotonic()

    def beat() -> None:
        nonlocal said_s
        if time.monotonic() - said_s > BEAT_S:
            comm.gather_texts(AT_WORK)
            said_s = time.monotonic()

    for current in range(max(comm.collect(lambda: turn)) + 1):
        state, error, said_s = DONE, None, time.monotonic()
        if turn == current:
            try:
                results.append(work(beat))
            except Exception as failure:  # noqa: BLE001 (raised below: the others wait)
                state, error = f"{FAILED}{failure}", failure
        while AT_WORK in (states := comm.gather_texts(state)):
            pass
        if error is not None and not isinstance(error, OSError | UserError):
            raise error
        failures = {rank: said for rank, said in enumerate(states) if said != DONE}
        if failures:
            first = next(iter(failures.values())).removeprefix(FAILED)
            raise UserError(f"rank(s) {sorted(failures)}: {first}") from error
    return results[0]


def turn_on_host(comm: Communicator, folder: Path) -> int:
    """0 for the first rank of those that have the same folder on the same host, 1 for the others. Collective.

    Args:
        comm: the ranks.
        folder: that they would share.
    """
    places = comm.collect(lambda: f"{socket.gethostname()} {_boot_id()} {folder}")
    return int(places.index(places[comm.rank]) != comm.rank)


def _boot_id() -> str:
    """Tells hosts of the same name apart; empty where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def in_thread(work: Callable[[], T], beat: Callable[[], None]) -> T:
    """``work()`` on a thread, with beats meanwhile: for work that cannot call ``beat`` itself (see `in_turns`)."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        while not wait([future], timeout=BEAT_S / 2).done:
            beat()
        return future.result()
