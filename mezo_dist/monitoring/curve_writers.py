"""Where curves go beside metrics.jsonl (``monitor`` in a config): what a curve writer is, and what keeps a run from it.

A run does not depend on any: one that fails is left out from then on, with one warning. The packages behind them are
imported only where they are asked for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, final

from mezo_dist.errors import UserError, printable
from mezo_dist.json_types import JsonObject

log = logging.getLogger(__name__)
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
"""Monitor -> the package that it needs."""
MOST_WAITING = 10_000
"""Calls that may wait for a service; with more, it is left out."""
LAST_WAIT_S = 90.0
"""Seconds that the end of a run waits for a service to take what is left."""


class CurveWriter(Protocol):
    """Takes the curves of one run to one place. Any method may raise anything."""

    def settings(self, settings: JsonObject) -> None:
        """Take the resolved config, as `RunConfig.to_dict` has it."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Take scalars, tag -> value, after ``step`` steps. Values may be not finite."""

    def close(self, *, finished: bool) -> None:
        """Write what is left. ``finished``: the run came to its end."""


Opener = Callable[[Path, int | None], CurveWriter]
"""Opens a writer of the run in a folder, of which some steps were done before: None if it begins anew."""


def check_installed(monitors: Sequence[str]) -> None:
    """Check that the packages of monitors can be imported; none is imported.

    Raises:
        UserError: one is missing.
    """
    for name in monitors:
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(f"monitor: {name} is not installed: pip install {PACKAGES[name]}, or leave it out")


def open_writer(name: str, folder: Path, first_step: int | None) -> CurveWriter:
    """A curve writer whose methods raise nothing.

    Args:
        name: a monitor's, such as ``wandb``.
        folder: of the run.
        first_step: steps done before; None if the run begins anew. A run that goes on before its first step (0) has
            evaluations from before training, which are not done again.
    """
    opener = _opener(name)
    if name in ("wandb", "mlflow"):
        return _InBackground(name, lambda: opener(folder, first_step))
    return _Guarded(name, lambda: opener(folder, first_step))


def _opener(name: str) -> Opener:
    def opened(folder: Path, first_step: int | None) -> CurveWriter:
        if name == "tensorboard":
            from mezo_dist.monitoring.tensorboard_files import TensorBoardFiles

            return TensorBoardFiles(folder, first_step)
        if name == "wandb":
            from mezo_dist.monitoring.wandb_run import WandbRun

            return WandbRun(folder, first_step)
        if name == "mlflow":
            from mezo_dist.monitoring.mlflow_run import MlflowRun

            return MlflowRun(folder, first_step)
        from mezo_dist.monitoring.csv_file import CsvFile

        return CsvFile(folder, first_step)

    return opened


@final
class _Guarded:
    """A writer of which the first failure is a warning, and the last call.

    Args:
        name: the monitor's.
        opened: opens the writer.
    """

    def __init__(self, name: str, opened: Callable[[], CurveWriter]) -> None:
        self._name = name
        self._writer: CurveWriter | None = None
        self._attempt("cannot be opened", lambda: setattr(self, "_writer", opened()))

    def settings(self, settings: JsonObject) -> None:
        """See `CurveWriter`."""
        if (writer := self._writer) is not None:
            self._attempt("failed", lambda: writer.settings(settings))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `CurveWriter`."""
        if (writer := self._writer) is not None:
            self._attempt(f"failed at step {step}", lambda: writer.write(step, scalars))

    def close(self, *, finished: bool) -> None:
        """See `CurveWriter`."""
        if (writer := self._writer) is not None:
            self._attempt("lacks its end", lambda: writer.close(finished=finished))
            self._writer = None

    def _attempt(self, what: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - whatever a service, its client or a disk may think of
            reason = printable(f"{type(error).__name__}: {error}"[:500])
            log.warning(
                "monitor: %s %s (%s); the run goes on without it, and metrics.jsonl has its curves",
                self._name,
                what,
                reason,
            )
            if (writer := self._writer) is not None:
                self._writer = None
                with contextlib.suppress(Exception):
                    writer.close(finished=False)


@final
class _InBackground:
    """A writer to a service, called in a thread: no step waits for a network.

    Args:
        name: the monitor's.
        opened: opens the writer.
    """

    def __init__(self, name: str, opened: Callable[[], CurveWriter]) -> None:
        self._name = name
        self._calls: queue.Queue[Callable[[CurveWriter], None] | None] = queue.Queue(MOST_WAITING)
        self._is_lost = False
        self._thread = threading.Thread(target=self._work, args=(opened,), name=f"monitor {name}", daemon=True)
        self._thread.start()

    def settings(self, settings: JsonObject) -> None:
        """See `CurveWriter`."""
        self._put(lambda writer: writer.settings(settings))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `CurveWriter`."""
        self._put(lambda writer: writer.write(step, scalars))

    def close(self, *, finished: bool) -> None:
        """See `CurveWriter`. Waits `LAST_WAIT_S` at most."""
        self._put(lambda writer: writer.close(finished=finished))
        self._put(None)
        if self._is_lost:
            return
        self._thread.join(LAST_WAIT_S)
        if self._thread.is_alive():
            log.warning(
                "monitor: %s did not take the end of the curves in %.0f s; metrics.jsonl has it",
                self._name,
                LAST_WAIT_S,
            )

    def _put(self, call: Callable[[CurveWriter], None] | None) -> None:
        if self._is_lost:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._is_lost = True
            log.warning(
                "monitor: %s left %d calls unanswered; the run goes on without it, and metrics.jsonl has its curves",
                self._name,
                MOST_WAITING,
            )

    def _work(self, opened: Callable[[], CurveWriter]) -> None:
        writer = _Guarded(self._name, opened)
        while (call := self._calls.get()) is not None:
            call(writer)
