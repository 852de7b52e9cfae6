"""A rank ends with the launcher that started it.

A launcher that is killed outright cannot take its ranks along. They would train on unseen, hold the run folder, and the
same job started again would be refused as in use.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)
OWNERS = ("torchrun", "DeepSpeed", "Open MPI", "MPICH", "SLURM's srun")
"""Launchers whose ranks belong to them. Where RANK and WORLD_SIZE were set by hand a shell is the parent, and a job
may well outlive that."""
LOOK_S = 1.0


def end_with_launcher(launcher: str, is_stopping: Callable[[], bool]) -> None:
    """From now on send this process SIGTERM when its parent is gone, as the launcher itself would: a training run
    finishes its step and saves. Does nothing under launchers that are not among `OWNERS`.

    Args:
        launcher: see `mezo_dist.distributed.environment.ClusterEnvironment`.
        is_stopping: whether SIGTERM has come already; a second one would end the process in the middle of a step.
    """
    if launcher not in OWNERS:
        return
    parent, over = os.getppid(), threading.Event()

    def watch() -> None:
        # Not prctl(PR_SET_PDEATHSIG): that tells of the end of the thread that forked this process.
        while os.getppid() == parent:
            if over.wait(LOOK_S):
                return
        log.warning("%s (process %d) is gone, which started this rank: stopping, as for SIGTERM", launcher, parent)
        if not is_stopping():
            os.kill(os.getpid(), signal.SIGTERM)

    def end() -> None:
        over.set()
        thread.join()

    thread = threading.Thread(target=watch, name="mezo_dist-orphans", daemon=True)
    thread.start()
    atexit.register(end)
