"""Programs that answer a line of JSON with a number: asked with a time limit, started again when they die."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Any, final

from mezo_dist.errors import UserError
from mezo_dist.objectives.rewards.refused import NoReward, checked_number

LONGEST_ANSWER = 65_536
"""Bytes of a line."""
START_S = 60.0
"""Seconds that a program may take for its first answer on top of the limit: it may have things to load."""


@final
class Program:
    """One process of a program; a context manager that ends it.

    Args:
        setting: that names the program, for messages.
        command: the program and its arguments.
        timeout_s: seconds for one answer.

    Raises:
        UserError: the program cannot be started.
    """

    def __init__(self, setting: str, command: Sequence[str], timeout_s: float) -> None:
        self._setting, self._command, self._timeout_s = setting, list(command), timeout_s
        self._rest, self._warming = b"", START_S
        self._process: subprocess.Popen[bytes] | None = self._started()

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def ask(self, row: Mapping[str, Any], text: str) -> float:
        """The program's number for a text.

        Raises:
            NoReward: it gave none in time, or died. The next question goes to a new process.
        """
        process = self._process = self._process or self._started()
        question = json.dumps({"row": row, "text": text}, default=str).encode() + b"\n"
        try:
            answer = json.loads(self._exchange(process, question))
        except NoReward:
            self._end()
            raise
        except ValueError as error:
            self._end()  # its lines may no longer belong to our questions
            raise NoReward(f"{self._setting}: its answer is not JSON ({error})") from error
        self._warming = 0.0
        if isinstance(answer, dict) and "error" in answer:
            raise NoReward(f"{self._setting}: {str(answer['error'])[:200]}")
        return checked_number(answer, self._setting)

    def _started(self) -> subprocess.Popen[bytes]:
        try:
            process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
        except (OSError, ValueError) as error:
            raise UserError(f"{self._setting}: {self._command[0]} cannot be started: {error}") from error
        os.set_blocking(_fileno(process.stdin), False)
        self._rest, self._warming = b"", START_S
        return process

    def _end(self) -> None:
        """Kill the process, and what it started."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]

    def _exchange(self, process: subprocess.Popen[bytes], question: bytes) -> bytes:
        """Write a line and read a line, whichever can go on."""
        deadline = time.monotonic() + self._timeout_s + self._warming
        to, back = _fileno(process.stdin), _fileno(process.stdout)
        with selectors.DefaultSelector() as selector:
            selector.register(back, selectors.EVENT_READ)
            selector.register(to, selectors.EVENT_WRITE)
            while b"\n" not in self._rest:
                left = deadline - time.monotonic()
                events = selector.select(max(0.0, left))
                if not events:
                    raise NoReward(f"{self._setting}: no answer within reward.timeout_s ({self._timeout_s:g} s)")
                for key, _ in events:
                    if key.fd == to:
                        question = self._write(process, question)
                        if not question:
                            selector.unregister(to)
                    else:
                        self._read(process)
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _write(self, process: subprocess.Popen[bytes], question: bytes) -> bytes:
        """What is left of it."""
        try:
            return question[os.write(_fileno(process.stdin), question) :]
        except BrokenPipeError:
            raise self._died(process) from None

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        piece = os.read(_fileno(process.stdout), LONGEST_ANSWER)
        if not piece:
            raise self._died(process)
        self._rest += piece
        if len(self._rest) > LONGEST_ANSWER:
            raise NoReward(f"{self._setting}: its answer is longer than {LONGEST_ANSWER} bytes")

    def _died(self, process: subprocess.Popen[bytes]) -> NoReward:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        return NoReward(f"{self._setting}: it ended (status {process.returncode}); it is started again")


def _fileno(pipe: IO[bytes] | None) -> int:
    assert pipe is not None  # all processes here have pipes
    return pipe.fileno()
