"""Programs that answer a line of JSON with a number: asked with a time limit, started again when they die."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any, final

from mezo_dist.errors import UserError
from mezo_dist.objectives.rewards.refused import NoReward, TooSlow, checked_number
from mezo_dist.objectives.rewards.worker import READY

WORKER = "mezo_dist.objectives.rewards.worker"
LONGEST_ANSWER = 65_536
"""Bytes of a line."""
START_S = 60.0
"""Seconds for loading: until a function's worker says that it is ready, or on top of the limit until a program has
given its first answer."""
SURPLUS_S = 0.05
"""Seconds after its first answer in which a program must say no more."""


@final
class Program:
    """One process of a program, until `end`.

    Args:
        setting: that names the program, for messages.
        command: the program and its arguments; or the file and the name of a function.
        timeout_s: seconds for one answer.
        says_ready: it is a function, whose worker says ``READY`` before the first question.

    Raises:
        UserError: the program cannot be started, or says why it is not ready.
    """

    def __init__(self, setting: str, command: Sequence[str], timeout_s: float, *, says_ready: bool = False) -> None:
        self._setting, self._command, self._timeout_s = setting, list(command), timeout_s
        self._says_ready, self._rest, self._is_new = says_ready, b"", True
        self._loading_s = 0.0 if says_ready else START_S
        if not says_ready and shutil.which(command[0]) is None:
            raise UserError(f"{setting}: {command[0]} cannot be started: there is no such program")
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = self._started()
        except NoReward as reason:
            self.end()
            raise UserError(str(reason)) from None

    def ask(self, row: Mapping[str, Any], text: str) -> float:
        """The program's number for a text.

        Raises:
            NoReward: it gave none in time, died, or says more than it is asked. The next question goes to a new
                process.
        """
        try:
            process = self._process = self._process or self._started()
            question = json.dumps({"row": row, "text": text}, default=str).encode() + b"\n"
            self._refuse_surplus(process, 0.0)
            answer = self._exchange(process, question, self._timeout_s + self._loading_s)
            if self._is_new:  # one that says two lines for a text does so from the start
                self._refuse_surplus(process, SURPLUS_S)
        except NoReward:
            self.end()
            raise
        self._loading_s, self._is_new = 0.0, False
        if isinstance(answer, dict) and "error" in answer:
            raise NoReward(f"{self._setting}: {str(answer['error'])[:200]}")
        return checked_number(answer, self._setting)

    def _started(self) -> subprocess.Popen[bytes]:
        command = self._command if self._says_ready else ["--", *self._command]
        worker = [sys.executable, "-m", WORKER, str(os.getpid())]
        try:
            process = subprocess.Popen(
                [*worker, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
        except (OSError, ValueError) as error:
            raise NoReward(f"{self._setting}: {self._command[0]} cannot be started: {error}") from error
        os.set_blocking(_fileno(process.stdin), False)
        self._rest, self._process, self._is_new = b"", process, True
        if self._says_ready:
            answer = self._exchange(process, b"", START_S)
            if answer != READY:
                reason = answer.get("error") if isinstance(answer, dict) else answer
                raise NoReward(f"{self._setting}: {str(reason)[:200]}")
        return process

    def end(self) -> None:
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

    def _exchange(self, process: subprocess.Popen[bytes], question: bytes, limit_s: float) -> Any:
        """Write a line and read a line of JSON, whichever can go on.

        Args:
            process: that is asked.
            question: the line; empty: there is none.
            limit_s: seconds for both.
        """
        deadline = time.monotonic() + limit_s
        to, back = _fileno(process.stdin), _fileno(process.stdout)
        with selectors.DefaultSelector() as selector:
            selector.register(back, selectors.EVENT_READ)
            if question:
                selector.register(to, selectors.EVENT_WRITE)
            while b"\n" not in self._rest:
                events = selector.select(max(0.0, deadline - time.monotonic()))
                if not events:
                    raise TooSlow(f"{self._setting}: no answer within {limit_s:g} s (reward.timeout_s)")
                for key, _ in events:
                    if key.fd == to:
                        question = self._write(process, question)
                        if not question:
                            selector.unregister(to)
                    else:
                        self._read(process)
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            return json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            raise NoReward(f"{self._setting}: its answer is not JSON ({str(error)[:200]})") from error

    def _refuse_surplus(self, process: subprocess.Popen[bytes], wait_s: float) -> None:
        """Raises NoReward if a running program says, within ``wait_s``, what it was not asked for."""
        with selectors.DefaultSelector() as selector:
            selector.register(_fileno(process.stdout), selectors.EVENT_READ)
            if (self._rest or selector.select(wait_s)) and process.poll() is None:
                raise NoReward(f"{self._setting}: it says more than one line for a text: which one counts?")

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
