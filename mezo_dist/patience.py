"""Long silent work says what it is: nothing if it is short, else a reason in words, and at its end how long it took.

Log lines do that for everybody; the command line shows a spinner on a terminal (`show_with`). No result depends on
anything here.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

log = logging.getLogger(__name__)
SILENT_S = 2.0
"""Work that is done sooner is not worth a word."""
Display = Callable[[str], AbstractContextManager[object]]
"""Shows a text as long as the context lasts."""
_display: list[Display] = []


def show_with(display: Display | None) -> None:
    """Show what is waited for in this way, too; None: by log lines alone."""
    _display[:] = [] if display is None else [display]


@contextlib.contextmanager
def patience(what: str, *, silent_s: float = SILENT_S) -> Iterator[None]:
    """Context manager around work that may take long.

    Args:
        what: is done, in words: ``loading the weights of MODEL``.
        silent_s: seconds after which it is said.
    """
    with contextlib.ExitStack() as shown:
        was_said = threading.Event()

        def say() -> None:
            was_said.set()
            log.info("%s ...", what)
            for display in _display:
                shown.enter_context(display(what))

        timer, began = threading.Timer(silent_s, say), time.monotonic()
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()  # it may be about to speak
    if was_said.is_set():
        log.info("%s: %.1f s", what, time.monotonic() - began)
