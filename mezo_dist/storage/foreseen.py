"""What would become of a run folder, for those who only look: nothing is made, changed or locked."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from mezo_dist.config.schema import RunConfig
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.storage import trajectory
from mezo_dist.storage.files import read_in_place
from mezo_dist.storage.run_files import LOCK, MOST_RESULTS_BYTES
from mezo_dist.storage.run_folder import (
    Claim,
    check_trajectory,
    holds_run,
    in_use,
    known_to_all,
)


def look_at_folder(config: RunConfig, comm: Communicator) -> Claim:
    """The run folder that `claim_folder` would claim now. Nothing is made, changed or locked. Collective.

    Raises:
        UserError: as `claim_folder` does.
    """
    if_exists = config.output.if_exists
    return known_to_all(config, comm, lambda: _look(Path(config.output.dir), if_exists), reads=if_exists != "replace")


def _look(wanted: Path, if_exists: str) -> Path:
    """The folder that `_claim` would use. Raises as it does; OSError where it could not be made or written to."""
    number, folder = 1, wanted
    if if_exists == "new":
        while os.path.lexists(folder / trajectory.FILE) or _is_locked(folder):
            number += 1
            folder = wanted.with_name(f"{wanted.name}-{number}")
    holds_run(folder, if_exists)
    if _is_locked(folder):
        raise in_use(folder, read_in_place(folder / LOCK, MOST_RESULTS_BYTES))
    check_trajectory(folder)
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return folder


def _is_locked(folder: Path) -> bool:
    """Another job uses it, now."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # what is no file is moved aside by the job that claims the folder
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no locks here
        return False
    finally:
        os.close(handle)
    return False
