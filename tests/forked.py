"""Programs run as ``python ARGUMENTS`` would run them, without the seconds that the imports take.

A child is forked off a helper process that has imported what takes long and done nothing else. For tests whose subject
is what a program does, not how its process comes into being.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mezo_dist.testing import PRELOAD

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 280.0


class Program:
    """A program that runs; leaving the context ends it."""

    def __init__(self, arguments: Sequence[str], folder: Path = ROOT, environment: Mapping[str, str] | None = None):
        """Start it.

        Args:
            arguments: what follows ``python``: ``-m MODULE``, ``-c CODE`` or a script, and its arguments.
            folder: where it runs.
            environment: replaces that of this process, whole.
        """
        self._arguments, self._output = list(arguments), tempfile.TemporaryDirectory()
        self._files = [Path(self._output.name) / name for name in ("stdout", "stderr")]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        given = dict(os.environ if environment is None else environment)
        self._process = context.Process(target=run, args=(self._arguments, str(folder), given, self._files))
        self._process.start()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._output.cleanup()

    def finish(self) -> tuple[int, str, str]:
        """Exit status (minus the signal's number if one ended it), standard output and error; fails on a hang."""
        self._process.join(PATIENCE_S)
        output, errors = (path.read_text(errors="replace") if path.exists() else "" for path in self._files)
        if self._process.exitcode is None:
            pytest.fail(f"{shlex.join(self._arguments)} hangs:\n{output}{errors}", pytrace=False)
        return self._process.exitcode, output, errors


def output_of(arguments: Sequence[str], folder: Path = ROOT, environment: Mapping[str, str] | None = None) -> str:
    """Standard output of a program that must succeed; see `Program`."""
    with Program(arguments, folder, environment) as program:
        status, output, errors = program.finish()
    assert status == 0, f"{shlex.join(arguments)}\n{output}{errors}"
    return output


def run(arguments: list[str], folder: str, environment: dict[str, str], files: Sequence[Path | int]) -> None:
    """What a forked process does: see `Program`.

    Args:
        arguments: what follows ``python``.
        folder: where to run.
        environment: all of it.
        files: for standard output and error: paths, or file descriptors.
    """
    import torch

    for number, file in enumerate(files, start=1):
        handle = file if isinstance(file, int) else os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if threads := environment.get("OMP_NUM_THREADS"):  # read when torch was loaded, which it is
        torch.set_num_threads(int(threads))
    with contextlib.suppress(ValueError):
        sys.path.remove("")
    first, *rest = arguments
    if first in ("-m", "-c"):
        sys.path.insert(0, folder)
        what, *rest = rest
        sys.argv = [first, *rest]
        if first == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            names: dict[str, Any] = {"__name__": "__main__"}
            exec(what, names)
    else:
        sys.path.insert(0, str(Path(first).resolve().parent))
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")
