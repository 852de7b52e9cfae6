"""A config with its task file, and the message that a bad one is refused with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mezo_dist.config.reader import load
from mezo_dist.errors import UserError

TASK = """\
name: reviews
data: reviews.jsonl
prompt: "{{ text }} It was {{ answer }}"
labels: [{value: 0, word: bad}, {value: 1, word: good}]
"""
CONFIG = """\
model: {name: some/model}
task: tasks/reviews.yaml
algorithm: {name: mezo, lr: 5e-5}
train: {steps: 20, batch_size: 4}
"""
Write = Callable[..., Path]


def fault(path: Path, *overrides: str) -> str:
    """The message that `load` fails with, less the name of the folder."""
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    return str(caught.value).replace(f"{path.parent}/", "")
