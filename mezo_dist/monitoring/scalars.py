"""``metrics.jsonl`` and TensorBoard's event files: the same scalars in both.

The run does not depend on these files: anything in their place that a resumed run cannot append to is moved aside.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import threading
import time
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, final

from mezo_dist.storage.files import move_aside, open_log

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)


def train_loss_tag(*, calibrated: bool) -> str:
    """The tag of a step's loss.

    The calibrated loss of a minibatch has a tag that says so: it is biased low, as the offsets of the classes are
    fitted to that minibatch, and must not be compared with a validation loss.
    """
    return "loss/train_calibrated_biased_low" if calibrated else "loss/train"


@final
class Curves:
    """The curve files of one run. `open` makes one.

    Args:
        jsonl: metrics.jsonl, opened to append to.
        tensorboard: the writer of the event files.
    """

    def __init__(self, jsonl: TextIO, tensorboard: SummaryWriter) -> None:
        self._jsonl = jsonl
        self._tensorboard = tensorboard

    @staticmethod
    @contextmanager
    def open(folder: Path, first_step: int) -> Iterator[Curves]:
        """Context manager around the files of a run; leaving it closes them.

        Args:
            folder: the run folder; made if it is missing.
            first_step: steps done before. If there are any, the files go on after them; if 0, they start anew.

        Raises:
            OSError: the folder cannot be written to.
        """
        # TensorBoard's own switch; without it, it imports TensorFlow wherever that is installed: seconds, and
        # memory that would be reported as ours.
        sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))
        # Imported here, because it takes a second and the command line imports this module.
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        resumed = first_step > 0
        # An evaluation after first_step steps was done before the break: only later steps are purged.
        purge_step = first_step + 1 if resumed else 0
        events = _events_folder(folder / "tensorboard")
        _wait_for_a_later_name(events)
        with open_log(folder / "metrics.jsonl", anew=not resumed) as jsonl, _writer_thread_is_quiet():
            tensorboard = SummaryWriter(str(events), purge_step=purge_step, flush_secs=10)
            try:
                yield Curves(jsonl, tensorboard)
            finally:
                try:
                    tensorboard.close()
                except OSError as error:  # not in place of the error that may be under way
                    log.warning("TensorBoard's files in %s lack their end (%s)", folder, error)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Put a text under ``tag`` in TensorBoard.

        Args:
            tag: its name there.
            markdown: the text.
            step: steps done.
        """
        self._tensorboard.add_text(tag, markdown, step)

    def write(self, step: int, scalars: Mapping[str, float], **facts: float | str) -> None:
        """Write one line, which the operating system has when this returns; TensorBoard's follows within seconds.

        Args:
            step: steps done.
            scalars: tag -> value. One that is not finite becomes null in the line, as JSON has no NaN.
            facts: stand in the line beside the scalars, and not in TensorBoard.

        Raises:
            OSError: a file could not be written, this time or, TensorBoard's, before.
        """
        finite = {tag: value if math.isfinite(value) else None for tag, value in scalars.items()}
        self._jsonl.write(json.dumps({"step": step, **facts, "scalars": finite}, allow_nan=False) + "\n")
        self._jsonl.flush()
        for tag, value in scalars.items():
            self._tensorboard.add_scalar(tag, value, step)


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


@contextmanager
def _writer_thread_is_quiet() -> Iterator[None]:
    """TensorBoard writes in a thread, which would print a traceback; its error comes back with the next write."""
    real = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (issubclass(args.exc_type, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
            real(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = real
