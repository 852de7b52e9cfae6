"""Who keeps the others waiting: nobody should have to sit in silence before a rank that hangs.

Nothing is sent while all goes well. A rank that has waited in a collective for longer than its patience writes the
number of its round into the key-value store where the ranks met, and reads what the others wrote: those that wrote
nothing, or an earlier round, are the late ones.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

log = logging.getLogger(__name__)
ANSWER_S = 2.0
"""How long the others get to say that they wait as well; at most that long a time-out is delayed."""


@final
class Watchdog:
    """Watches one rank's waiting, on a thread of its own.

    Args:
        store: the key-value store of the process group; None: watch nothing.
        rank, world_size: of this process.
        patience_s: seconds of waiting before anything is said.
    """

    def __init__(self, store: Any, rank: int, world_size: int, patience_s: float) -> None:
        self._store, self._rank, self._world_size, self._patience_s = store, rank, world_size, patience_s
        self._waits: tuple[float, int, str] | None = None  # since when, in which round, where
        self._late: list[int] = []
        self._asked, self._over = threading.Event(), threading.Event()
        if store is not None and world_size > 1:
            thread = threading.Thread(target=self._watch, name="mezo_dist-watch", daemon=True)
            thread.start()
            atexit.register(self._end, thread)

    @staticmethod
    def off() -> Watchdog:
        """Watches nothing."""
        return Watchdog(None, 0, 1, 0.0)

    @contextmanager
    def waiting(self, round_number: int, place: str) -> Iterator[None]:
        """Around a collective: ``place`` is for the message. After an error in it, `late` still tells of it."""
        self._late = []
        self._asked.clear()
        self._waits = (time.monotonic(), round_number, place)
        yield
        self._waits = None

    def late(self) -> list[int]:
        """Ranks that the last collective waited for, after it timed out; empty if that could not be found out."""
        self._asked.wait(ANSWER_S + 1)
        return self._late

    def _end(self, thread: threading.Thread) -> None:
        """A thread that lives while the interpreter is taken down may abort the process."""
        self._over.set()
        thread.join(ANSWER_S)

    def _watch(self) -> None:
        said: tuple[float, int, str] | None = None
        while not self._over.wait(min(1.0, self._patience_s / 4)):
            waits = self._waits
            if waits is None or waits == said or time.monotonic() - waits[0] < self._patience_s:
                continue
            said = waits
            try:
                self._ask(waits)
            except RuntimeError as error:  # the store is gone, with the process that held it
                log.debug("the store does not answer: %s", error)

    def _ask(self, waits: tuple[float, int, str]) -> None:
        _, round_number, place = waits
        self._store.set(_key(self._rank), str(round_number))
        if self._over.wait(ANSWER_S) or self._waits != waits:
            return
        rounds = [self._round_of(rank) for rank in range(self._world_size)]
        self._late = [rank for rank, number in enumerate(rounds) if number < round_number]
        self._asked.set()
        if self._late:
            log.warning("%s: waiting for rank(s) %s for %g s", place, self._late, self._patience_s)

    def _round_of(self, rank: int) -> int:
        """The last round in which the rank ran out of patience; -1 if it never did."""
        key = _key(rank)
        return int(self._store.get(key)) if self._store.check([key]) else -1


def _key(rank: int) -> str:
    return f"mezo_dist/waits/{rank}"
