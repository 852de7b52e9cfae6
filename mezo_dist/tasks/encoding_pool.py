"""Rows shared out over the cores of a host, in blocks: what becomes of them comes back in their order.

Python makes samples on one core, whatever the tokenizer does on others. So blocks of many rows go to copies of this
process (``fork``: the rows are there, and what encodes them), which send back what they made. They use no model, no
device and no communicator, and end with this process. Where a process cannot be copied, or a copy dies, this process
encodes alone, and the log says so.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from mezo_dist.child_process import die_with

log = logging.getLogger(__name__)
BLOCK = 2_048
"""Rows of a block."""
LEAST_ROWS = 20_000
"""Rows from which on copies are worth their start."""
MOST_PROCESSES = 16
"""With more, it is the taking in of their results that takes the time."""
AHEAD = 2
"""Blocks per process that are under way or done before they are asked for: memory does not grow with the rows."""
PARALLELISM = "TOKENIZERS_PARALLELISM"
"""Environment variable of `tokenizers`, whose threads do not come along into a copy."""

T = TypeVar("T")
EncodeSome = Callable[[range], Iterator[T]]

_encode: EncodeSome[object] | None = None
"""In a copy: what it is there for."""


def num_processes(num_rows: int) -> int:
    """How many processes so many rows are shared out over; 1: this one alone."""
    if num_rows < LEAST_ROWS or "fork" not in multiprocessing.get_all_start_methods():
        return 1
    if multiprocessing.current_process().daemon or threading.current_thread() is not threading.main_thread():
        return 1  # copies end with the thread that started them
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return min(cores, MOST_PROCESSES)


def shared_out(num_rows: int, encode_some: EncodeSome[T], processes: int) -> Iterator[T]:
    """``encode_some(range(num_rows))``, made by several processes.

    Args:
        num_rows: of all rows.
        encode_some: makes a result of each row of a range, in order; results can be pickled.
        processes: see `num_processes`.
    """
    blocks = [range(first, min(first + BLOCK, num_rows)) for first in range(0, num_rows, BLOCK)]
    done, ahead = 0, deque[Future[list[T]]]()
    try:
        with _pool(processes, encode_some) as pool:
            try:
                for number, _ in enumerate(blocks):
                    while len(ahead) < AHEAD * processes and number + len(ahead) < len(blocks):
                        ahead.append(_submit(pool, blocks[number + len(ahead)]))
                    yield from ahead.popleft().result()
                    done = number + 1
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
    except (BrokenProcessPool, OSError) as error:
        log.warning("a process that encodes rows died or could not be started (%s): one goes on alone", error)
        yield from encode_some(range(done * BLOCK, num_rows))


def _pool(processes: int, encode_some: EncodeSome[T]) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("fork")
    return ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(encode_some, os.getpid()))


def _submit(pool: ProcessPoolExecutor, block: range) -> Future[list[T]]:
    """All processes are started at the first call; what a tokenizer has to know of it is in their environment then."""
    given = os.environ.get(PARALLELISM)
    os.environ[PARALLELISM] = "false"
    try:
        return pool.submit(_encode_block, block)  # type: ignore[arg-type]
    finally:
        if given is None:
            del os.environ[PARALLELISM]
        else:
            os.environ[PARALLELISM] = given


# In a copy


def _begin(encode_some: EncodeSome[object], parent: int) -> None:
    global _encode
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # that is the parent's
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    logging.disable()  # the parent says how far it is
    gc.freeze()  # a search for cycles would write to, and so copy, all memory
    _encode = encode_some


def _encode_block(block: range) -> list[object]:
    assert _encode is not None
    return list(_encode(block))
