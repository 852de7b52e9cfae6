"""``metrics.jsonl`` and TensorBoard's event files: the same scalars in both."""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, final

from mezo_dist.storage.files import cut_torn_line

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)


@final
class Curves:
    """The files of one run; `open` makes them."""

    def __init__(self, jsonl: TextIO, tensorboard: SummaryWriter) -> None:
        self._jsonl = jsonl
        self._tensorboard = tensorboard

    @staticmethod
    @contextmanager
    def open(folder: Path, first_step: int) -> Iterator[Curves]:
        """Files in ``folder`` that go on after ``first_step`` steps, or start anew if that is 0."""
        # TensorBoard's own switch; without it, it imports TensorFlow wherever that is installed: seconds, and
        # memory that would be reported as ours.
        sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))
        # Imported here, because it takes a second and the command line imports this module.
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        resumed = first_step > 0
        if resumed and path.exists():
            cut_torn_line(path)
        # An evaluation after first_step steps was done before the break: only later steps are purged.
        purge_step = first_step + 1 if resumed else 0
        with path.open("a" if resumed else "w", encoding="utf-8") as jsonl, _writer_thread_is_quiet():
            tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step, flush_secs=10)
            try:
                yield Curves(jsonl, tensorboard)
            finally:
                try:
                    tensorboard.close()
                except OSError as error:  # not in place of the error that may be under way
                    log.warning("TensorBoard's files in %s lack their end (%s)", folder, error)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Put a text under ``tag`` in TensorBoard."""
        self._tensorboard.add_text(tag, markdown, step)

    def write(self, step: int, scalars: Mapping[str, float], **facts: float | str) -> None:
        """One line, on its way to disk when this returns; TensorBoard follows within seconds.

        Raises:
            OSError: a file could not be written, this time or, TensorBoard's, before.
        """
        finite = {tag: value if math.isfinite(value) else None for tag, value in scalars.items()}
        self._jsonl.write(json.dumps({"step": step, **facts, "scalars": finite}, allow_nan=False) + "\n")
        self._jsonl.flush()
        for tag, value in scalars.items():
            self._tensorboard.add_scalar(tag, value, step)


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
