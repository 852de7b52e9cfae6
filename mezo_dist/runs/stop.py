"""SIGTERM: a run ends at the next place where nothing is lost, on all ranks, with the status that its config names."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator

from mezo_dist.config.schema import RunConfig
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.errors import Stopped

log = logging.getLogger(__name__)
LOADING = "start"
"""Where a run is before its first step (`Communicator.place`)."""


@contextlib.contextmanager
def stop_on_sigterm(config: RunConfig, comm: Communicator) -> Iterator[None]:
    """SIGTERM makes all ranks stop after the step they are in; a second one ends the process as ever.

    Before the first step there is nothing to lose, so one process by itself stops at once. Several stop where they meet
    next, as one that left alone would be missed by the others.

    Args:
        config: the run's.
        comm: the ranks.
    """

    def handle(*_: object) -> None:
        comm.wants_stop = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if comm.place != LOADING:
            return
        if comm.world_size == 1:
            raise stopped_loading(config)
        log.warning(
            "SIGTERM: rank %d is told to stop before the first step; all ranks do when the model is loaded, or when "
            "the evaluation that goes on is done",
            comm.rank,
        )

    if threading.current_thread() is not threading.main_thread():  # only the main thread may ask for signals
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stopped_loading(config: RunConfig) -> Stopped:
    """What ends a run before its first step."""
    return Stopped("stopped before the first step; nothing is lost, start it again", config.distributed.stop_exit_code)
