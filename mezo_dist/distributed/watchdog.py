"""The watchdog says which ranks keep the others waiting, so that a rank that hangs is named.

Nothing is sent while all goes well. A rank that has waited in a collective for longer than its patience notes that in
the key-value store where the ranks met, and reads what the others noted: those that do not wait are the late ones.
When a collective fails, the first rank to notice calls the roll there; the ranks that wait answer from a thread, and
those that are silent are the lost ones.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, final

from mezo_dist.distributed.bounded import bounded

if TYPE_CHECKING:
    import torch.distributed as dist

log = logging.getLogger(__name__)
ANSWER_S = 2.0
"""Seconds that the other ranks get to say that they wait as well; the end after a failure is delayed by about as
much."""
LINGER_S = 0.5
"""Seconds that the rank that holds the store stays after a roll call, so that the others can read its result."""
POLL_S = 0.05
CALL, VERDICT = "mezo_dist/roll-call", "mezo_dist/lost"
"""Keys: somebody calls the roll; the list of the ranks that did not answer it."""


class _Wait(NamedTuple):
    since: float
    number: int
    """How many waits there were before: two waits are never equal."""
    place: str


@final
class Watchdog:
    """Watches how long one rank waits, on a separate thread.

    Args:
        store: the key-value store of the process group; None: watch nothing.
        rank, world_size: of this process.
        patience_s: seconds of waiting before anything is said.
        holder: address and port at which rank 0 holds the store; None if another process than a rank does.
    """

    def __init__(
        self,
        store: dist.Store | None,
        rank: int,
        world_size: int,
        patience_s: float,
        holder: tuple[str, int] | None = None,
    ) -> None:
        self._rank, self._world_size, self._patience_s = rank, world_size, patience_s
        self._store: Any = store  # used only where something is watched
        self._holder = holder
        self._tick_s = min(1.0, patience_s / 4)
        self._wait: _Wait | None = None  # the collective that the main thread is in
        self._noted: _Wait | None = None  # the wait that the store knows of
        self._num_waits = 0
        self._late: list[int] = []
        self._verdict: list[int] | None = None
        self._asked, self._over = threading.Event(), threading.Event()
        if store is not None and world_size > 1:
            thread = threading.Thread(target=self._watch, name="mezo_dist-watch", daemon=True)
            thread.start()
            atexit.register(self._end, thread)

    @staticmethod
    def off() -> Watchdog:
        """Watches nothing."""
        return Watchdog(None, 0, 1, 0.0)

    @contextlib.contextmanager
    def waiting(self, place: str) -> Iterator[None]:
        """Around a collective: ``place`` is for the message. After an error in it, `late` still tells of it."""
        self._late = []
        self._asked.clear()
        self._wait = _Wait(time.monotonic(), self._num_waits, place)
        self._num_waits += 1
        yield
        self._wait = None

    def late(self) -> list[int]:
        """Ranks that the last collective waited for, after it timed out; empty if that could not be found out."""
        self._asked.wait(ANSWER_S + 1)
        return self._late

    def lost(self) -> list[int]:
        """Ranks among which the lost one is, after a collective failed; empty if that could not be found out.

        It takes `ANSWER_S`, for the roll is called. A rank that computes does not answer either, so there may be more
        than one.
        """
        if self._world_size == 2:
            return [1 - self._rank]
        if self._store is None:
            return []
        try:
            return bounded(self._call_the_roll, ANSWER_S + LINGER_S + 1)
        except (RuntimeError, TimeoutError) as error:
            log.debug("the store does not answer: %s", error)
            return [0] if self._holder and self._rank else []

    def _call_the_roll(self) -> list[int]:
        if self._verdict is not None:
            return self._verdict
        if self._rank and self._holder and not _is_there(self._holder):
            return [0]
        self._store.set(_here(self._rank), "")
        self._store.set(CALL, "")
        silent = [rank for rank in range(self._world_size) if rank != self._rank]
        deadline = time.monotonic() + ANSWER_S
        while silent and time.monotonic() < deadline:
            if (verdict := self._read_verdict()) is not None:
                return verdict
            silent = [rank for rank in silent if not self._store.check([_here(rank)])]
            time.sleep(POLL_S)
        self._store.set(VERDICT, json.dumps(silent))
        if self._rank == 0 and self._holder:
            time.sleep(LINGER_S)
        return silent

    def _read_verdict(self) -> list[int] | None:
        return list(json.loads(self._store.get(VERDICT))) if self._store.check([VERDICT]) else None

    def _end(self, thread: threading.Thread) -> None:
        """A thread that lives while the interpreter is taken down may abort the process."""
        self._over.set()
        thread.join(ANSWER_S)

    def _watch(self) -> None:
        while not self._over.wait(self._tick_s):
            if not self._has_to_speak():
                continue
            try:
                bounded(self._speak, 3 * ANSWER_S)
            except RuntimeError as error:  # the store is gone, with the process that held it
                log.debug("the store does not answer: %s", error)
            except TimeoutError:  # it is held by a process that is stopped
                self._tell([0] if self._holder and self._rank else [])
                with contextlib.suppress(RuntimeError):
                    self._store.check([CALL])  # returns when that process goes on

    def _has_to_speak(self) -> bool:
        """Whether the store must be asked or told something: not as long as nobody waits."""
        wait, noted = self._wait, self._noted
        return (noted is not None and noted != wait) or (
            wait is not None and time.monotonic() - wait.since >= self._tick_s
        )

    def _speak(self) -> None:
        """Note in the store that the main thread waits, or no longer does; answer those who call the roll."""
        wait, noted = self._wait, self._noted
        if noted is not None and noted != wait:
            self._store.set(_key(self._rank), "")
            self._noted = None
        if wait is None:
            return
        self._answer_the_roll()
        if wait != self._noted and time.monotonic() - wait.since >= self._patience_s:
            self._ask(wait)

    def _answer_the_roll(self) -> None:
        if self._verdict is not None or not self._store.check([CALL]):
            return
        self._store.set(_here(self._rank), "")
        deadline = time.monotonic() + 2 * ANSWER_S
        while (verdict := self._read_verdict()) is None and time.monotonic() < deadline:
            if self._over.wait(POLL_S):
                return
        self._verdict = verdict

    def _ask(self, wait: _Wait) -> None:
        self._noted = wait
        self._store.set(_key(self._rank), str(wait.number))
        if self._over.wait(ANSWER_S) or self._wait != wait:
            return
        self._tell([rank for rank in range(self._world_size) if not self._waits(rank)])

    def _tell(self, late: list[int]) -> None:
        self._late = late
        self._asked.set()
        if late and self._wait is not None:
            log.warning("%s: waiting for rank(s) %s for %g s", self._wait.place, late, self._patience_s)

    def _waits(self, rank: int) -> bool:
        """Whether the rank has run out of patience in a collective that it is still in."""
        key = _key(rank)
        return self._store.check([key]) and bool(self._store.get(key))


def _is_there(holder: tuple[str, int]) -> bool:
    """Whether the store can be reached: torch prints pages about one that cannot."""
    try:
        socket.create_connection(holder, timeout=ANSWER_S / 2).close()
    except OSError:
        return False
    return True


def _key(rank: int) -> str:
    return f"mezo_dist/waits/{rank}"


def _here(rank: int) -> str:
    return f"mezo_dist/here/{rank}"
