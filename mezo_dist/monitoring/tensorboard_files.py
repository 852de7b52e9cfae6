"""TensorBoard's event files, in ``tensorboard/`` of a run folder (``monitor: [tensorboard]``)."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import final

from mezo_dist.json_types import JsonObject
from mezo_dist.storage.files import move_aside

log = logging.getLogger(__name__)


@final
class TensorBoardFiles:
    """A `CurveWriter` (see `mezo_dist.monitoring.curve_writers`). Files of a run that goes on follow the older ones.

    Args:
        folder: of the run.
        first_step: steps done before: what older files have of later steps is purged. None: the run begins anew.
    """

    def __init__(self, folder: Path, first_step: int | None) -> None:
        # TensorBoard's own switch; without it, it imports TensorFlow wherever that is installed: seconds, and
        # memory that would be reported as ours.
        sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))
        from torch.utils.tensorboard import SummaryWriter  # takes a second

        events = _events_folder(folder / "tensorboard")
        _wait_for_a_later_name(events)
        # An evaluation after first_step steps was done before the break: only later steps are purged.
        self._first_step = first_step or 0
        purge_step = 0 if first_step is None else first_step + 1
        self._writer = SummaryWriter(str(events), purge_step=purge_step, flush_secs=10)
        _keep_its_thread_quiet()

    def settings(self, settings: JsonObject) -> None:
        """See `CurveWriter`."""
        self._writer.add_text("config", f"```json\n{json.dumps(settings, indent=2)}\n```", self._first_step)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `CurveWriter`. A fault of the disk is raised by a later call: files are written in a thread."""
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)

    def close(self, *, finished: bool) -> None:
        """See `CurveWriter`."""
        self._writer.close()


def _events_folder(path: Path) -> Path:
    """``path``, free for a folder or one that can be written to; anything else there is moved aside."""
    if os.path.lexists(path) and (path.is_symlink() or not path.is_dir() or not os.access(path, os.W_OK | os.X_OK)):
        log.warning("%s is not a folder that can be written to", path)
        move_aside(path)
    return path


def _wait_for_a_later_name(events: Path) -> None:
    """Wait, a second at most, until a new file of events has a name after those of all that are there.

    TensorBoard reads them in the order of their names, which hold the second, the process and a count without leading
    zeros: a file made in the same second as the one it goes on after could be read before it.
    """
    while any(events.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
        time.sleep(0.05)


def _keep_its_thread_quiet() -> None:
    """TensorBoard writes in a thread, which would print a traceback; its error comes back with the next write."""
    real = threading.excepthook
    if getattr(real, "keeps_tensorboard_quiet", False):
        return

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (issubclass(args.exc_type, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
            real(args)

    hook.keeps_tensorboard_quiet = True  # type: ignore[attr-defined]
    threading.excepthook = hook
