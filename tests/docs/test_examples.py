"""The examples run, and do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("options", [[], ["--processes", "2"]], ids=["in one process", "in two more"])
def test_minimize(options: list[str]) -> None:
    output = run("examples/minimize.py", "--steps", "12", *options)
    found = re.search(r"down for ([\d.]+)% before, ([\d.]+)% after", output)
    assert found, output
    assert float(found[1]) > 90
    assert float(found[2]) < 20
