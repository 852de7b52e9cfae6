"""A time limit for calls that may never return."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def bounded(work: Callable[[], T], seconds: float) -> T:
    """``work()``, on a thread that is left behind when it takes too long.

    torch's key-value store waits without end for a process that accepts its connection and then says nothing: one that
    is stopped, or another service at the same port.

    Raises:
        TimeoutError: ``work`` was not done after so many seconds. What ``work`` raises is raised as well.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 (raised again by the caller's thread)
            errors.append(error)

    thread = threading.Thread(target=run, name="mezo_dist-bounded", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]
