"""Rank 0 first, then the others; a failure anywhere is the same error everywhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest

from mezo_dist.distributed import in_turn
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.errors import UserError

WORLD = 3


class Ranks:
    """The ranks of a world as threads, with the collectives that `rank_zero_first` uses."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(WORLD, timeout=20)
        self.text = ""
        self.errors: dict[int, Exception] = {}

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        def on(rank: int) -> Any:
            comm = cast(Communicator, _Rank(self, rank))
            try:
                return in_turn.rank_zero_first(comm, lambda: work(rank))
            except UserError as error:
                return error

        with ThreadPoolExecutor(WORLD) as pool:
            return list(pool.map(on, range(WORLD)))


class _Rank:
    world_size = WORLD

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.ranks, self.rank = ranks, rank

    def broadcast_text(self, text: str) -> str:
        if self.rank == 0:
            self.ranks.text = text
        self.ranks.barrier.wait()
        text = self.ranks.text
        self.ranks.barrier.wait()
        return text

    def collect(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except (OSError, UserError) as error:
            self.ranks.errors[self.rank] = error
        self.ranks.barrier.wait()
        if self.ranks.errors:
            raise UserError(f"rank(s) {sorted(self.ranks.errors)}: {next(iter(self.ranks.errors.values()))}")


def test_rank_zero_is_done_before_the_others_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_turn, "BEAT_S", 0.01)
    events: list[tuple[str, int]] = []

    def work(rank: int) -> int:
        events.append(("begins", rank))
        time.sleep(0.1 if rank == 0 else 0)
        events.append(("ends", rank))
        return rank

    assert Ranks().run(work) == [0, 1, 2]
    assert events[:2] == [("begins", 0), ("ends", 0)]
    assert len(events) == 6


@pytest.mark.parametrize("failing", [0, 2])
@pytest.mark.parametrize("error", [UserError("task.data: gone"), OSError("no space")])
def test_a_failure_is_everybodys(failing: int, error: Exception) -> None:
    def work(rank: int) -> None:
        if rank == failing:
            raise error

    assert [str(result) for result in Ranks().run(work)] == [f"rank(s) [{failing}]: {error}"] * WORLD


def test_alone_it_is_a_call() -> None:
    assert in_turn.rank_zero_first(Communicator(), lambda: 7) == 7


class Turns:
    """Ranks as threads, with the collectives that `in_turns` uses."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(WORLD, timeout=20)
        self.texts = [""] * WORLD
        self.gathers = 0

    def run(self, turns: list[int], work: Callable[[int, Callable[[], None]], Any]) -> list[Any]:
        def on(rank: int) -> Any:
            comm = cast(Communicator, _Turn(self, rank))
            try:
                return in_turn.in_turns(comm, turns[rank], lambda beat: work(rank, beat))
            except (UserError, ValueError) as error:
                return f"{type(error).__name__}: {error}"

        with ThreadPoolExecutor(WORLD) as pool:
            return list(pool.map(on, range(WORLD)))


class _Turn:
    world_size = WORLD
    collect = Communicator.collect

    def __init__(self, turns: Turns, rank: int) -> None:
        self.turns, self.rank = turns, rank

    def gather_texts(self, text: str) -> list[str]:
        self.turns.texts[self.rank] = text
        self.turns.barrier.wait()
        texts = list(self.turns.texts)
        self.turns.gathers += self.rank == 0
        self.turns.barrier.wait()
        return texts


@pytest.mark.parametrize("threaded", [False, True])
def test_turns_are_taken_one_after_another(monkeypatch: pytest.MonkeyPatch, threaded: bool) -> None:
    monkeypatch.setattr(in_turn, "BEAT_S", 0.01)
    events: list[tuple[str, int]] = []

    def work(rank: int, beat: Callable[[], None]) -> int:
        def slow() -> int:
            events.append(("begins", rank))
            for _ in range(5):
                time.sleep(0.02 * (rank + 1))
                if not threaded:
                    beat()
            events.append(("ends", rank))
            return rank

        return in_turn.in_thread(slow, beat) if threaded else slow()

    turns = Turns()
    assert turns.run([0, 2, 0], work) == [0, 1, 2]
    assert {rank for _, rank in events[:4]} == {0, 2}
    assert events[4:] == [("begins", 1), ("ends", 1)]
    assert turns.gathers > 4, "those who wait are told that the others are at work"


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_in_a_turn_is_everybodys(failing: int) -> None:
    done: list[int] = []

    def work(rank: int, _: Callable[[], None]) -> None:
        if rank == failing:
            raise OSError("no space")
        done.append(rank)

    assert Turns().run([0, 1, 1], work) == [f"UserError: rank(s) [{failing}]: no space"] * WORLD
    assert sorted(done) == ([] if failing == 0 else [0, 2]), "later turns do not begin"


def test_a_fault_of_the_code_stays_one() -> None:
    def work(rank: int, _: Callable[[], None]) -> None:
        if rank == 1:
            raise ValueError("a fault")

    assert Turns().run([0, 0, 0], work) == [
        "UserError: rank(s) [1]: a fault",
        "ValueError: a fault",
        "UserError: rank(s) [1]: a fault",
    ]
