"""The run folder: who may write to it, what it holds, and what happened to it.

trajectory.jsonl   all that the fine-tuned model is, beside its base     config.yaml    every setting
snapshots/         weights, to go on from                                events.jsonl   starts, stops and faults
metrics.jsonl, tensorboard/   curves                                     results.json, model/   what came out
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mezo_dist.config.schema import RunConfig
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.errors import UserError
from mezo_dist.storage import trajectory
from mezo_dist.storage.files import cut_torn_line, replace_file

log = logging.getLogger(__name__)
CONFIG, EVENTS, RESULTS, SNAPSHOTS, LOCK = "config.yaml", "events.jsonl", "results.json", "snapshots", ".lock"


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
    folder, data, lock, problem = Path(config.output.dir), b"", None, ""
    try:
        if comm.rank == 0:
            try:
                folder, lock = _claim(folder, config.output.if_exists)
                path = folder / trajectory.FILE
                data = trajectory.read_bytes(path) if config.output.if_exists == "resume" and path.exists() else b""
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = f"{folder} cannot be made or written to ({error.strerror}); name another (--output.dir)"
        problem, name = comm.broadcast_text(f"{problem}\n{folder}").rsplit("\n", 1)
        if problem:
            raise UserError(f"output.dir: {problem}")
        folder, data = Path(name), comm.broadcast_bytes(data)
        yield Claim(folder, trajectory.parse(data, folder / trajectory.FILE) if data else None)
    finally:
        if lock is not None:
            os.close(lock)  # a process that dies lets go of it too


def read_log(folder: Path, comm: Communicator) -> trajectory.Log:
    """The trajectory in ``folder``, read by rank 0, on all ranks. Collective. Raises as `trajectory.read` does."""
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
    log = trajectory.parse(comm.broadcast_bytes(data), path)
    assert log is not None
    return log


def _claim(wanted: Path, if_exists: str) -> tuple[Path, int]:
    """The folder to use, made if need be, and its lock (an open file)."""
    number, folder = 1, wanted
    while if_exists == "new" and (folder / trajectory.FILE).exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    holds_run = (folder / trajectory.FILE).exists()
    if holds_run and if_exists == "error":
        raise UserError(
            f"{folder} already holds a run; go on with it (--output.if_exists=resume), keep it and use a new folder "
            f"(--output.if_exists=new), or name another one (--output.dir)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    if holds_run and if_exists == "replace":
        move_aside(folder)
        os.close(lock)
        folder.mkdir()
        lock = _lock(folder)
    return folder, lock


def _lock(folder: Path) -> int:
    """Take the folder's lock, or say who has it."""
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(handle, 200, 0).decode(errors="replace").strip() or "unknown"
        os.close(handle)
        raise UserError(
            f"{folder} is in use by another job ({owner}); end that one, or name another folder (--output.dir)"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        log.warning("%s: this file system has no locks: see to it that no other job writes to it", folder)
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return handle


def move_aside(folder: Path) -> None:
    """Rename a folder to the next free one of ``NAME.old``, ``NAME.old-2`` ..."""
    number, aside = 1, folder.with_name(f"{folder.name}.old")
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.old-{number}")
    folder.rename(aside)
    log.warning("what was in %s is in %s now", folder, aside)


def note(folder: Path, event: str, step: int, **facts: Any) -> None:
    """Add to the diary of what happened to the run: starts, stops, faults. Only rank 0 may call it.

    Wall-clock time is for people alone: nothing in the run depends on it, so a clock may jump.
    """
    path = folder / EVENTS
    time = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    if path.exists():
        cut_torn_line(path)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": time, "event": event, "step": step, **facts}) + "\n")


def save_config(config: RunConfig, folder: Path) -> None:
    """Write the resolved config, which `mezo-dist train` reads, with its SHA-256 in the first line."""
    body = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
    digest = hashlib.sha256(body.encode()).hexdigest()
    replace_file(folder / CONFIG, f"# sha256 of the lines below: {digest}\n{body}".encode())


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write ``results.json``; what is not finite becomes null, as JSON has no NaN."""
    text = json.dumps(_finite(results), indent=2, allow_nan=False)
    replace_file(folder / RESULTS, f"{text}\n".encode())


def read_results(folder: Path) -> dict[str, Any]:
    """What `write_results` wrote; empty if nothing readable is there."""
    try:
        found = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s)", folder / RESULTS, error)
        return {}
    return found if isinstance(found, dict) else {}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
