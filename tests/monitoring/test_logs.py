"""Durations in words, and log messages: they name the rank and keep clear of the bars."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator

import pytest

from mezo_dist.monitoring.console import Monitor, configure_logging, format_duration
from tests.monitoring.consoles import scalars, shown, terminal, without_codes


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (83, "1m23s"),
        (3600, "1h00m"),
        (7530, "2h05m"),
        (86399.9, "1d00h"),
        (3 * 86400 + 4 * 3600 + 1, "3d04h"),
    ],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    package = logging.getLogger("mezo_dist")
    handlers, level = package.handlers, package.level
    yield logging.getLogger("mezo_dist.test")
    package.handlers, package.level = handlers, level


@pytest.mark.parametrize(("rank", "info"), [(0, "[rank 0] INFO: facts\n"), (3, "")])
def test_logs_name_the_rank(log: logging.Logger, capsys: pytest.CaptureFixture[str], rank: int, info: str) -> None:
    for _ in range(2):  # a second time changes nothing
        configure_logging(rank, is_terminal=True)
    log.info("facts")
    log.warning("step %d skipped", 7)
    assert capsys.readouterr() == ("", f"{info}[rank {rank}] WARNING: step 7 skipped\n")


def test_logs_in_a_file_name_date_and_module(log: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(1, is_terminal=False)
    log.warning("skipped")
    line = capsys.readouterr().err
    assert re.fullmatch(r"\[rank 1\] \d{4}-\d\d-\d\d [\d:,]+ WARNING mezo_dist\.test: skipped\n", line)


@pytest.mark.parametrize("stderr_is_terminal", [True, False])
def test_logs_go_above_the_bars_unless_they_go_elsewhere(
    log: logging.Logger,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stderr_is_terminal: bool,
) -> None:
    configure_logging(0, is_terminal=True)
    console = terminal(monkeypatch)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: stderr_is_terminal)
    with Monitor.open(None, is_main=True, num_steps=9, console=console) as monitor:
        monitor.step(1, scalars(0.5), samples=1)
        log.warning("skipped")
    line = "[rank 0] WARNING: skipped\n"
    assert (line in without_codes(shown(console))) is stderr_is_terminal
    assert capsys.readouterr().err == ("" if stderr_is_terminal else line)


def test_control_characters_are_shown_and_not_sent(log: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(0, is_terminal=True)
    try:
        raise KeyError("reason")
    except KeyError:
        log.exception("%s is damaged", "run\x1b[2J\n[rank 1] INFO: all is well")
    message, *traceback = capsys.readouterr().err.splitlines()
    assert message == r"[rank 0] ERROR: run\x1b[2J\n[rank 1] INFO: all is well is damaged"
    assert traceback[0].startswith("Traceback")
