"""What the library does without the packages that only parts of it use, and what it says where one is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.packaging import library

ROOT = Path(__file__).resolve().parents[2]
PIP = {
    "greenlet": "greenlet",
    "accelerate": "mezo_dist[trainer]",
    "rich": "rich",
    "rich tables": "rich",
    "datasets": "datasets",
    "datasets of the hub": "datasets",
    "datasets saved": "datasets",
    "torchmetrics": "torchmetrics",
    "torchmetrics of many": "torchmetrics",
}
"""What pip is to install, by what is done without it (see `library.main`)."""


def test_the_library_needs_no_optional_package(tmp_path: Path) -> None:
    """The same bits without them, and a message with the command that installs what is missing."""
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    command = [sys.executable, "-m", "tests.packaging.library", str(tmp_path / "without")]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["imported"] == []
    assert said["results"] == json.loads(json.dumps(library.results(tmp_path / "with")))
    assert "fused cpu kernels are off" in done.stderr
    assert "pip install numba" in done.stderr
    assert said["messages"].keys() == PIP.keys()
    for what, message in said["messages"].items():
        assert f"pip install '{PIP[what]}'" in message, message
