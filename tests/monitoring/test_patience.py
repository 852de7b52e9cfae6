"""Long silent work: nothing is said of short work, a reason and its time of long work."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterator

import pytest

from mezo_dist.monitoring.console import configure_logging
from mezo_dist.patience import _display, patience, show_with


def test_short_work_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), patience("loading"):
        pass
    assert caplog.messages == []


def test_long_work_says_why_and_how_long(caplog: pytest.LogCaptureFixture) -> None:
    events: list[str] = []

    @contextlib.contextmanager
    def display(what: str) -> Iterator[None]:
        events.append(f"shown: {what}")
        try:
            yield
        finally:
            events.append("gone")

    show_with(display)
    try:
        with caplog.at_level(logging.INFO), pytest.raises(ValueError, match="as ever"):  # noqa: PT012
            with patience("loading the weights", silent_s=0.01):
                time.sleep(0.3)
                assert events == ["shown: loading the weights"]
            with patience("loading the weights again", silent_s=0.01):
                time.sleep(0.3)
                raise ValueError("as ever")
    finally:
        show_with(None)
    assert events[1:] == ["gone", "shown: loading the weights again", "gone"]
    assert caplog.messages[0] == "loading the weights ..."
    assert re.fullmatch(r"loading the weights: 0\.[3-9] s", caplog.messages[1])
    assert caplog.messages[2:] == ["loading the weights again ..."]


@pytest.mark.parametrize(("rank", "is_terminal", "shows"), [(0, True, 1), (1, True, 0), (0, False, 0)])
def test_only_rank_0_on_a_terminal_has_a_spinner(rank: int, is_terminal: bool, shows: int) -> None:
    logger = logging.getLogger("mezo_dist")
    before = logger.handlers, logger.level
    try:
        configure_logging(rank, is_terminal)
        assert len(_display) == shows
        for display in _display:
            with display("compiling [kernels]"):  # no markup
                pass
    finally:
        show_with(None)
        logger.handlers, _ = before
        logger.setLevel(before[1])
