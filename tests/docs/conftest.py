"""What the documentation promises is tried on the CPU, with shapes that are tiny for a GPU."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def on_the_cpu(no_gpu: None) -> None:
    """Most of it runs in processes of its own, which see no GPU."""
