"""Jobs to be disturbed: processes that run the command line, one for each rank, and faults that strike inside them.

They are forked off a process that has imported everything, so a job of two ranks takes about a second.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mezo_dist.testing import PRELOAD

PATIENCE_S = 120.0
"""For a job that takes seconds, on a busy machine."""
STEPS = 12
OPTIONS = ["--output.test=false", "--output.export=false", "--output.snapshot_every=4"]


def arguments(root: Path, folder: Path, *more: str) -> list[str]:
    """The command line of a run of ``root``'s config (see conftest.py) in ``folder``, begun or gone on with."""
    resume = "--output.if_exists=resume"
    return ["train", str(root / "config.yaml"), f"--output.dir={folder}", resume, *OPTIONS, *more]


class Trap(Protocol):
    """Something that will go wrong on one rank."""

    @property
    def rank(self) -> int:
        """On which."""

    def install(self) -> None:
        """Set it in this process."""


@dataclass(frozen=True)
class Fault:
    """A signal: what happens when ``function`` (module:name) is called for the ``count``-th time on ``rank``.

    ``when`` says whether the call itself is made before the fault strikes, after it, or (of writing bytes) by half.
    """

    function: str
    count: int
    rank: int
    strike: str = "SIGKILL"
    when: str = "before"

    def install(self) -> None:
        """Set the trap in this process."""
        module, _, path = self.function.partition(":")
        owner: Any = __import__(module, fromlist=["_"])
        *outer, name = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        real, calls = getattr(owner, name), [0]

        @functools.wraps(real)
        def trapped(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] != self.count:
                return real(*args, **kwargs)
            if self.when == "half":
                real(args[0], args[1][: len(args[1]) // 2])
            result = real(*args, **kwargs) if self.when == "after" else None
            os.kill(os.getpid(), getattr(signal, self.strike))
            return result if self.when == "after" else real(*args, **kwargs)

        setattr(owner, name, trapped)


@dataclass(frozen=True)
class Job:
    """Running processes of one job, and what they wrote to standard error."""

    processes: list[Any]
    errors: list[Path] = field(default_factory=list)

    def wait(self, grace_s: float = PATIENCE_S) -> list[int]:
        """Exit status of every rank (minus the signal's number if one ended it).

        As a launcher does, it kills what is left ``grace_s`` after a rank died: one that was still looking for the
        others when rank 0 died would look for ``distributed.timeout_s``.
        """
        deadline, died = time.monotonic() + PATIENCE_S, False
        while any(process.exitcode is None for process in self.processes) and time.monotonic() < deadline:
            if not died and any(process.exitcode for process in self.processes):
                died, deadline = True, min(deadline, time.monotonic() + grace_s)
            time.sleep(0.01)
        codes = [process.exitcode for process in self.processes]
        self.end()
        if grace_s < PATIENCE_S:
            return [process.exitcode for process in self.processes]
        assert None not in codes, f"ranks {[r for r, c in enumerate(codes) if c is None]} hang:\n{self.output()}"
        return codes

    def end(self) -> None:
        """Make sure that nothing is left."""
        for process in self.processes:
            process.kill()
            process.join()

    def output(self) -> str:
        """What all ranks wrote to standard error."""
        return "".join(path.read_text(errors="replace") for path in self.errors if path.exists())


@contextlib.contextmanager
def start(
    folder: Path,
    world_size: int,
    arguments: Sequence[str],
    fault: Trap | None = None,
    more: Mapping[int, Sequence[str]] | None = None,
) -> Iterator[Job]:
    """A job that runs ``mezo-dist ARGUMENTS`` on so many ranks (``more`` on some); its rest is killed at the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    folder.mkdir(parents=True, exist_ok=True)
    errors = [folder / f"stderr-{rank}" for rank in range(world_size)]
    for path in errors:
        path.unlink(missing_ok=True)
    port = free_port()
    job = Job(
        [
            context.Process(
                target=_rank,
                args=(rank, world_size, port, [*arguments, *(more or {}).get(rank, [])], fault, str(errors[rank])),
            )
            for rank in range(world_size)
        ],
        errors,
    )
    for process in job.processes:
        process.start()
    try:
        yield job
    finally:
        job.end()


def run(*args: Any, **kwargs: Any) -> tuple[list[int], str]:
    """Exit statuses and error output of a job, with `start`'s arguments."""
    with start(*args, **kwargs) as job:
        return job.wait(), job.output()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _rank(rank: int, world_size: int, port: int, arguments: list[str], fault: Trap | None, errors: str) -> None:
    import torch

    from mezo_dist import cli

    handle = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    if fault is not None and fault.rank == rank:
        fault.install()
    sys.exit(cli.main(arguments))


def kill_at_random(job: Job, draw: random.Random, longest_s: float) -> bool:
    """SIGKILL one rank after a random time. False if the rank was done by then."""
    delay, victim = draw.uniform(0.0, longest_s), draw.choice(job.processes)
    victim.join(delay)
    if victim.exitcode is not None:
        return False
    victim.kill()
    return True


def steps_of(folder: Path) -> list[bytes]:
    """The lines of a run's trajectory that say what was done (not the fingerprints, which follow from them)."""
    lines = (folder / "trajectory.jsonl").read_bytes().split(b"\n")[1:-1]
    return [line for line in lines if line.startswith(b'{"step"')]
