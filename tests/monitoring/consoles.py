"""Consoles whose text can be read, and a clock; for the tests of mezo_dist/monitoring/console.py."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console


class Clock:
    """A clock that stands still until it is told to go."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def wait(self, seconds: float) -> None:
        self.now_s += seconds


def plain(width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=width)


def terminal(monkeypatch: pytest.MonkeyPatch, width: int = 80) -> Console:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Console(file=io.StringIO(), force_terminal=True, width=width)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def without_codes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def scalars(loss: float, gradient: float = 0.5) -> dict[str, float]:
    return {"loss/train": loss, "projected_gradient": gradient, "communicator/payload_bytes": 256}
