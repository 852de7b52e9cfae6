"""The run folder: who may write to it, and what it holds (`mezo_dist.storage.run_files`).

trajectory.jsonl   all that the fine-tuned model is, beside its base     config.yaml    every setting
snapshots/         weights, to go on from                                events.jsonl   starts, stops and faults
metrics.jsonl, tensorboard/   curves                                     results.json, model/   what came out
metrics.csv, wandb/   curves, for other monitors                         answers.json         what the model says
monitors.json   what services call the run
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mezo_dist.config.schema import RunConfig
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.errors import UserError
from mezo_dist.storage import trajectory
from mezo_dist.storage.files import (
    is_plain_file,
    is_plain_folder,
    move_aside,
    remove,
)
from mezo_dist.storage.run_files import ANSWERS, CONFIG, EVENTS, LOCK, MONITORS, RESULTS, SNAPSHOTS

log = logging.getLogger(__name__)
_FILES = (CONFIG, EVENTS, RESULTS, MONITORS, ANSWERS, "metrics.jsonl", "metrics.csv")
_FOLDERS = (SNAPSHOTS, "tensorboard", "wandb", "model")
_WRITTEN_WHOLE = (trajectory.FILE, CONFIG, RESULTS, MONITORS, ANSWERS, "metrics.csv", "model")
_UNFINISHED = tuple(f".{name}.part" for name in _WRITTEN_WHOLE)


@dataclass(frozen=True)
class Claim:
    """A run folder that this job may write to, known to all ranks."""

    folder: Path
    log: trajectory.Log | None
    """The run to go on with, the same on all ranks."""

    @property
    def trajectory(self) -> Path:
        """Path of the trajectory."""
        return self.folder / trajectory.FILE

    @property
    def snapshots(self) -> Path:
        """Folder of the snapshots."""
        return self.folder / SNAPSHOTS


@contextlib.contextmanager
def claim_folder(config: RunConfig, comm: Communicator) -> Iterator[Claim]:
    """The run folder, claimed for this job while the context lasts; see ``output.if_exists``. Collective.

    Rank 0 claims it and reads what is there; so ranks need not share a file system to go on with a run.

    Raises:
        UserError: on all ranks: the folder holds a run, another job writes to it, it cannot be written to, or its
            trajectory is damaged.
    """
    claimed: list[tuple[Path, int, list[Path]]] = []

    def claim() -> Path:
        wanted = Path(config.output.dir)
        siblings = set(os.listdir(wanted.parent)) if wanted.parent.is_dir() else set()
        parents = [path for path in wanted.parents if not path.exists()]
        folder, lock = _claim(wanted, config.output.if_exists)
        claimed.append((folder, lock, [] if folder.name in siblings else [folder, *parents]))
        return folder

    try:
        yield known_to_all(config, comm, claim)
    finally:
        for folder, lock, made in claimed:
            _leave_nothing(folder, made)
            os.close(lock)  # a process that dies lets go of it too


def _leave_nothing(folder: Path, made: Sequence[Path]) -> None:
    """Remove the lock, and folders that were made, of a run that was refused: it wrote nothing else.

    Args:
        folder: the run folder, whose lock is held.
        made: folders that were made for it, the innermost first.
    """
    with contextlib.suppress(OSError):
        if os.listdir(folder) == [LOCK]:
            (folder / LOCK).unlink()
            for path in made:
                path.rmdir()


def known_to_all(config: RunConfig, comm: Communicator, choose: Callable[[], Path], *, reads: bool = True) -> Claim:
    """A run folder and its trajectory, on all ranks.

    Args:
        config: the run's.
        comm: the ranks.
        choose: the folder; rank 0 calls it.
        reads: False: a trajectory that is there does not count.
    """
    folder, data, problem = Path(config.output.dir), b"", ""
    if comm.rank == 0:
        try:
            folder = choose()
            path = folder / trajectory.FILE
            data = trajectory.read_bytes(path) if reads and path.exists() else b""
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{folder} cannot be made or written to ({error.strerror}); name another (--output.dir)"
    problem, name = comm.broadcast_text(f"{problem}\n{folder}").rsplit("\n", 1)
    if problem:
        raise UserError(f"output.dir: {problem}")
    folder, data = Path(name), comm.broadcast_bytes(data)
    return Claim(folder, trajectory.parse(data, folder / trajectory.FILE) if data else None)


def check_shared(claim: Claim, comm: Communicator) -> None:
    """Check that all ranks see the claimed folder, for a run whose weights are in its snapshots alone, of which every
    rank writes a part. Collective.

    Raises:
        UserError: on all ranks: some do not see it.
    """
    if comm.world_size == 1:
        return
    probe = claim.folder / comm.broadcast_text(f".seen-{os.urandom(8).hex()}")
    comm.collect(lambda: probe.mkdir() if comm.rank == 0 else None)
    seen = comm.collect(probe.is_dir)
    comm.collect(lambda: probe.rmdir() if comm.rank == 0 else None)
    if not all(seen):
        raise UserError(
            f"output.dir: rank(s) {[rank for rank, sees in enumerate(seen) if not sees]} do not see {claim.folder} of "
            "rank 0, and weights of a first-order run are in its snapshots alone, which all ranks write; name a folder "
            "that all hosts share"
        )


def cut_log(claim: Claim, num_steps: int, comm: Communicator) -> Claim:
    """Cut the claimed trajectory after ``num_steps`` steps, for a run that has to take the later ones again.
    Collective.

    Raises:
        UserError: it cannot be read or written.
    """
    kept = read_log(claim.folder, comm, num_steps)

    def cut() -> None:
        if comm.rank == 0:
            os.truncate(claim.trajectory, kept.size)

    comm.collect(cut)
    return Claim(claim.folder, dataclasses.replace(kept, torn=0))


def read_log(folder: Path, comm: Communicator, num_steps: int | None = None) -> trajectory.Log:
    """The trajectory in ``folder``, read by rank 0, on all ranks. Collective. Raises as `trajectory.read` does.

    Args:
        folder: the run folder.
        comm: the ranks.
        num_steps: see `trajectory.parse`.
    """
    path, problem, data = folder / trajectory.FILE, "", b""
    if comm.rank == 0:
        try:
            trajectory.read(path)
            data = trajectory.read_bytes(path)
        except UserError as error:
            problem = str(error)
    problem = comm.broadcast_text(problem)
    if problem:
        raise UserError(problem)
    log = trajectory.parse(comm.broadcast_bytes(data), path, num_steps)
    assert log is not None
    return log


def _claim(wanted: Path, if_exists: str) -> tuple[Path, int]:
    """The folder to use, made if need be, and its lock (an open file)."""
    folder, lock = _first_free(wanted) if if_exists == "new" else _claim_named(wanted, if_exists)
    try:
        _tidy(folder)
    except BaseException:
        os.close(lock)
        raise
    return folder, lock


def _first_free(wanted: Path) -> tuple[Path, int]:
    """The first of ``NAME``, ``NAME-2`` ... that holds no run and that no other job has just begun to use."""
    number, folder = 1, wanted
    while True:
        if not os.path.lexists(folder / trajectory.FILE):
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(_InUseError):
                lock = _lock(folder)
                if not os.path.lexists(folder / trajectory.FILE):  # the other job may be done already
                    return folder, lock
                os.close(lock)
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")


def holds_run(folder: Path, if_exists: str) -> bool:
    """Whether a run is there. Raises UserError if none may be."""
    is_there = os.path.lexists(folder / trajectory.FILE)
    if is_there and if_exists == "error":
        raise UserError(
            f"{folder} already holds a run; go on with it (--output.if_exists=resume), keep it and use a new folder "
            f"(--output.if_exists=new), or name another one (--output.dir)"
        )
    return is_there


def check_trajectory(folder: Path) -> None:
    """Raise UserError if a link or a folder stands where the trajectory should be."""
    if not is_plain_file(folder / trajectory.FILE):
        raise UserError(f"{folder / trajectory.FILE} is a link or a folder, not a file; put the file itself there")


def _claim_named(folder: Path, if_exists: str) -> tuple[Path, int]:
    replaces = holds_run(folder, if_exists) and if_exists == "replace"
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    if replaces:
        _rename_old(folder)
        os.close(lock)
        folder.mkdir()
        lock = _lock(folder)
    return folder, lock


def _rename_old(folder: Path) -> None:
    number, old = 1, folder.with_name(f"{folder.name}.old")
    while os.path.lexists(old):
        number += 1
        old = folder.with_name(f"{folder.name}.old-{number}")
    folder.rename(old)
    log.warning("the run that was in %s is in %s now", folder, old)


def _tidy(folder: Path) -> None:
    """Prepare a folder that may come from anybody, or from a job that was killed.

    What an interrupted write has left is removed. Links, and folders in the place of files, are moved aside: nothing
    that is written is to end elsewhere, and no damage to a file beside the trajectory is to stop a run.
    """
    check_trajectory(folder)
    for name in _FILES:
        if not is_plain_file(folder / name):
            move_aside(folder / name)
    for name in _FOLDERS:
        if not is_plain_folder(folder / name):
            move_aside(folder / name)
    snapshots = [folder / SNAPSHOTS / f".step-*.{end}" for end in ("part", "old")]
    for path in [folder / name for name in _UNFINISHED] + [p for s in snapshots for p in s.parent.glob(s.name)]:
        if os.path.lexists(path):
            log.info("%s is removed: its writing was interrupted", path)
            remove(path)


class _InUseError(UserError):
    """Another job has the lock."""


def in_use(folder: Path, owner: bytes) -> _InUseError:
    """The error that says who has the lock.

    Args:
        folder: the run folder.
        owner: contents of the lock file.
    """
    name = owner[:200].decode(errors="replace").strip() or "unknown"
    return _InUseError(
        f"{folder} is in use by another job ({name}); end that one, or name another folder (--output.dir)"
    )


def _lock(folder: Path) -> int:
    """Take the folder's lock. Raises _InUseError, which says who has it."""
    if not is_plain_file(folder / LOCK):
        move_aside(folder / LOCK)
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(handle, 200, 0)
        os.close(handle)
        raise in_use(folder, owner) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        log.warning("%s: this file system has no locks: see to it that no other job writes to it", folder)
    if not _is_at(handle, folder / LOCK):  # the job that had it was refused just now, and removed it
        os.close(handle)
        folder.mkdir(parents=True, exist_ok=True)
        return _lock(folder)
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return handle


def _is_at(handle: int, path: Path) -> bool:
    """An open file is the one that stands there."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
