"""Ranks of torchrun, forked as `tests.forked` forks programs: ``PYTHON_EXEC`` tells torchrun what to start.

What it gets there is a script that takes milliseconds to start. It hands its arguments, its environment and its output
over to this process, which has the program forked, and ends as that does. For tests whose subject is not how ranks
begin or who their parents are.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from multiprocessing import connection, reduction
from pathlib import Path

from mezo_dist.testing import PRELOAD
from tests import forked

STAND_IN = """#!{python} -IS
import json, os, signal, socket, sys

there = socket.socket(socket.AF_UNIX)
there.connect({path!r})
there.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, b"".join(n.to_bytes(4, sys.byteorder) for n in (1, 2)))])
arguments = [word for word in sys.argv[1:] if word != "-u"]
there.sendall(json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode() + b"\\n")
answers = there.makefile()
process = int(answers.readline())
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: os.kill(process, number))
status = int(answers.readline())
if status < 0:
    if -status in (signal.SIGTERM, signal.SIGINT):
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@contextlib.contextmanager
def environment() -> Iterator[dict[str, str]]:
    """For torchrun: that of this process, and a Python which is there within."""
    with python() as path:
        yield {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON_EXEC": path}


@contextlib.contextmanager
def python() -> Iterator[str]:
    """The path of a script, for ``PYTHON_EXEC``; within, it works."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{folder}/socket")
        server.listen()
        script = Path(folder, "python")
        script.write_text(STAND_IN.format(python=sys.executable, path=f"{folder}/socket"))
        script.chmod(0o755)
        threading.Thread(target=_serve, args=(server,), daemon=True).start()
        try:
            yield str(script)
        finally:
            server.shutdown(socket.SHUT_RDWR)  # wakes the thread


def _serve(server: socket.socket) -> None:
    """Answer all scripts until nobody listens any more."""
    with contextlib.suppress(OSError):
        while True:
            client, _ = server.accept()
            threading.Thread(target=_run, args=(client,), daemon=True).start()


def _run(client: socket.socket) -> None:
    """Run a program; one whose script is gone is killed."""
    with client:
        _, outputs, *_ = socket.recv_fds(client, 1, 2)
        with client.makefile() as lines:
            arguments, folder, environment = json.loads(lines.readline())
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        process = context.Process(target=forked.run, args=(arguments, folder, environment, [*map(Handle, outputs)]))
        process.start()
        for output in outputs:
            os.close(output)
        client.sendall(f"{process.pid}\n".encode())
        if process.sentinel not in connection.wait([process.sentinel, client]):
            process.kill()
        process.join()
        with contextlib.suppress(OSError):
            client.sendall(f"{process.exitcode}\n".encode())


class Handle:
    """A file descriptor of this process that a forked one gets, too."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[object, ...]:
        return _received, (reduction.DupFd(self.number),)


def _received(handle: object) -> int:
    return handle.detach()  # type: ignore[attr-defined]
