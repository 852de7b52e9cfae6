"""What tests see of a machine's GPUs.

Tests compute on a GPU where there is one, as users would. Processes that tests start see none: several would have to
share it, which NCCL refuses, and the worlds of `mezo_dist.testing.spawn` are joined over gloo. So whatever a test holds
against what another process computed must come from the CPU, too: tests that are marked `distributed` or `assets` see
no GPU in this process either, nor do those that ask for the fixture `no_gpu`.
"""

from __future__ import annotations

import os

import pytest

VISIBLE = "CUDA_VISIBLE_DEVICES"
_AT_START = os.environ.get(VISIBLE)
kept = False
"""This process sees a GPU."""


def keep() -> None:
    """Let this process go on seeing the GPUs that it sees, and processes that it starts from now on none."""
    global kept
    import torch  # not where tests are only dealt out, which is in the process that starts pytest-xdist's workers

    if torch.cuda.is_available():
        kept = True
        torch.cuda.init()
        torch.cuda.device_count()  # torch remembers the answer from now on
    os.environ[VISIBLE] = ""


def environment() -> dict[str, str]:
    """The environment of a process that is to see the GPUs that pytest saw when it started."""
    others = {name: value for name, value in os.environ.items() if name != VISIBLE}
    return others if _AT_START is None else {**others, VISIBLE: _AT_START}


def hide(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is seen in this process until that is undone."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
