"""What tests and the processes that they start see of GPUs."""

from __future__ import annotations

import os

import pytest
import torch

from tests import gpus
from tests.forked import output_of


def test_processes_see_none_unless_they_are_to() -> None:
    seen = "import os; print(repr(os.environ.get('CUDA_VISIBLE_DEVICES')))"
    assert output_of(["-c", seen]) == "''\n"
    assert gpus.environment().get(gpus.VISIBLE) == gpus._AT_START
    assert gpus.environment().keys() | {gpus.VISIBLE} == os.environ.keys()


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("a_gpu")
def test_no_gpu_is_seen_where_it_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.cuda.is_available()
    with monkeypatch.context() as patch:
        gpus.hide(patch)
        assert not torch.cuda.is_available()
    assert torch.cuda.is_available()
