"""How ranks that start together find each other, in a store where ranks of an earlier start have left their keys.

torchrun keeps one store for all its restarts, and torch's own start-up writes the same keys every time. A rank that is
quicker than its peer then reads the address of a process that is dead: it fails to connect, or waits for a connection
that nobody will make, until the time-out (pytorch/pytorch#135712; torch 2.13 still has it). So everything goes under a
prefix that is new at every start. Rank 0 chooses it, and tells it to whoever asks: a rank asks with a random word, and
finds the answer under that word, which no earlier start can have known.
"""

from __future__ import annotations

import datetime
import json
import logging
import time
import uuid
from collections.abc import Callable
from typing import final

import torch.distributed as dist

from mezo_dist.errors import UserError
from mezo_dist.json_types import JsonObject

log = logging.getLogger(__name__)
POLL_S = 0.01
SLOWEST_POLL_S = 0.25
"""How often a rank other than 0 looks for an answer after a while: a thousand of them must not drown rank 0."""
REFUSE_S = 2.0
"""Seconds that rank 0 stays to tell late ranks why the job does not start."""
WORLD = "world size of the last start"


def rendezvous(
    store: dist.Store, rank: int, world_size: int, timeout_s: float, hint_s: float = 5.0, hint: str = ""
) -> dist.Store:
    """Wait for all ranks; a part of ``store`` in which nothing has been written yet, the same on all of them.

    Args:
        store: where the ranks meet; an earlier start may have used it.
        rank, world_size: of this process, as the launcher gave them.
        timeout_s: seconds to wait for the other ranks.
        hint_s: seconds after which a rank that still waits says for whom.
        hint: what it says besides.

    Raises:
        UserError: ranks were told different world sizes.
        torch.distributed.DistError: not all came within ``timeout_s`` seconds; it names who did not.
    """
    clock = _Clock(timeout_s, hint_s, hint)
    if rank == 0:
        return _receive(store, world_size, clock)
    word = uuid.uuid4().hex
    store.set(f"ask/{store.add('asks', 1)}", word)
    answer = _wait_for(store, f"answer/{word}", clock, lambda: [0])
    if answer is None:
        begun = int(store.get(WORLD)) if store.check([WORLD]) else world_size
        if begun != world_size:
            raise UserError(_disagreement(rank, world_size, begun))
        raise dist.DistStoreError("no sign of rank(s) [0]")
    start = dist.PrefixStore(answer["start"], store)
    if answer["world_size"] != world_size:
        problem = _disagreement(rank, world_size, answer["world_size"])
        start.set("problem", problem)
        raise UserError(problem)
    start.set(f"has/{rank}", "")
    others = set(range(1, world_size))
    outcome = _wait_for(start, "outcome", clock, lambda: _missing(start, others))
    _raise_if_failed({"missing": sorted(_missing(start, others))} if outcome is None else outcome)
    return start


def wait_until_connected(store: dist.Store, world_size: int, timeout_s: float) -> None:
    """Wait until all ranks are here, in a store that `rendezvous` gave. To be called once they are connected to each
    other.

    gloo reports a rank as connected as soon as its ends of the connections are up. If that rank then stopped at once
    (for a bad setting, say), ranks that still connect would sometimes be aborted without a message.

    Args:
        store: from `rendezvous`.
        world_size: number of ranks.
        timeout_s: seconds to wait for them.

    Raises:
        torch.distributed.DistError: not all came within ``timeout_s`` seconds.
    """
    if store.add("connected", 1) == world_size:
        store.set("all connected", "")
    store.wait(["all connected"], datetime.timedelta(seconds=timeout_s))


@final
class _Clock:
    """Time to wait, and to say once, after a while, for whom.

    Args:
        timeout_s: seconds to wait.
        hint_s: seconds after which it says for whom.
        hint: what it says besides.
    """

    def __init__(self, timeout_s: float, hint_s: float, hint: str) -> None:
        self._began, self._timeout_s, self._hint_s, self._hint = time.monotonic(), timeout_s, hint_s, hint

    def is_up(self, missing: Callable[[], list[int] | set[int]]) -> bool:
        """Whether there is no time left; ``missing()`` are the ranks that are waited for."""
        elapsed = time.monotonic() - self._began
        if elapsed > self._hint_s:
            self._hint_s = float("inf")
            ranks = sorted(missing())
            log.warning("no sign of rank(s) %s yet; waiting for up to %g s%s", ranks, self._timeout_s, self._hint)
        return elapsed > self._timeout_s


def _receive(store: dist.Store, world_size: int, clock: _Clock) -> dist.Store:
    """Rank 0: answer until all have heard. Questions of an earlier start's ranks are answered, too, which does no harm.

    Args:
        store: where the ranks meet.
        world_size: number of ranks.
        clock: says when to give up.
    """
    word = uuid.uuid4().hex
    start = dist.PrefixStore(word, store)
    store.set(WORLD, str(world_size))
    answer = json.dumps({"start": word, "world_size": world_size})
    missing, answered = set(range(1, world_size)), set[int]()
    outcome: JsonObject = {}
    while missing and not outcome:
        _answer(store, answer, answered)
        missing = _missing(start, missing)
        if start.check(["problem"]):
            outcome = {"problem": start.get("problem").decode()}
        elif missing and clock.is_up(missing.copy):
            outcome = {"missing": sorted(missing)}
        time.sleep(POLL_S)
    start.set("outcome", json.dumps(outcome))
    until = time.monotonic() + (REFUSE_S if outcome else 0.0)
    while time.monotonic() < until:
        _answer(store, answer, answered)
        time.sleep(POLL_S)
    _raise_if_failed(outcome)
    return start


def _answer(store: dist.Store, answer: str, answered: set[int]) -> None:
    """Answer the questions that were not answered yet.

    Args:
        store: where the ranks meet.
        answer: the answer to every question.
        answered: numbers of the questions that were answered; grows.
    """
    for number in range(1, store.add("asks", 0) + 1):
        if number not in answered and store.check([f"ask/{number}"]):
            store.set(f"answer/{store.get(f'ask/{number}').decode()}", answer)
            answered.add(number)


def _wait_for(
    store: dist.Store, key: str, clock: _Clock, missing: Callable[[], list[int] | set[int]]
) -> JsonObject | None:
    """The JSON object under ``key``; None if the time is up before it is there.

    Args:
        store: where the ranks meet.
        key: what is waited for.
        clock: says when to give up.
        missing: the ranks that are waited for.
    """
    pause = POLL_S
    while not store.check([key]):
        if clock.is_up(missing):
            return None
        time.sleep(pause)
        pause = min(1.1 * pause, SLOWEST_POLL_S)
    value: JsonObject = json.loads(store.get(key))
    return value


def _missing(start: dist.Store, ranks: set[int]) -> set[int]:
    """Those of ``ranks`` that have not been here."""
    return {rank for rank in ranks if not start.check([f"has/{rank}"])}


def _raise_if_failed(outcome: JsonObject) -> None:
    if "problem" in outcome:
        raise UserError(outcome["problem"])
    if "missing" in outcome:
        raise dist.DistStoreError(f"no sign of rank(s) {outcome['missing']}")


def _disagreement(rank: int, world_size: int, world_size_0: int) -> str:
    """The message for ranks that were told different world sizes.

    Args:
        rank: this process's.
        world_size: what it was told.
        world_size_0: what rank 0 was told.
    """
    return (
        f"WORLD_SIZE: rank {rank} was told that there are {world_size} ranks, rank 0 that there are {world_size_0}; "
        "start all ranks of a job with the same number, by one launcher or by the same command line"
    )
