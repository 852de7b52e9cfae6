"""Ranks end with the launcher that started them, and only with one that owns them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mezo_dist.testing import write_tiny_config
from tests.faults.jobs import steps_of

RANK = """
import os, signal, sys, time
from mezo_dist.distributed import orphans
orphans.LOOK_S = 0.05
signal.signal(signal.SIGTERM, lambda *_: print("told to stop", flush=True))
orphans.end_with_launcher({launcher!r}, lambda: {is_stopping})
print(os.getpid(), flush=True)
deadline = time.monotonic() + 60
while os.getppid() == {parent} and time.monotonic() < deadline:
    time.sleep(0.01)
time.sleep(0.5)
print("goes on", flush=True)
"""
LAUNCHER = """
import os, subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1].replace("{parent}", str(os.getpid()))])
"""


@pytest.mark.parametrize(
    ("launcher", "is_stopping", "told"),
    [("torchrun", False, True), ("torchrun", True, False), ("RANK and WORLD_SIZE", False, False), ("", False, False)],
)
def test_a_rank_whose_launcher_is_killed_stops(launcher: str, is_stopping: bool, told: bool) -> None:
    code = RANK.format(launcher=launcher, is_stopping=is_stopping, parent="{parent}")
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", LAUNCHER, code], stdout=pipe, stderr=pipe, text=True) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()  # the rank is there
        parent.kill()
        output, errors = parent.communicate(timeout=60)
    assert ("told to stop" in output) == told
    assert output.endswith("goes on\n")
    assert (f"torchrun (process {parent.pid}) is gone, which started this rank" in errors) == (launcher == "torchrun")


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_a_run_whose_torchrun_is_killed_saves_and_ends(tmp_path: Path) -> None:
    config, folder = write_tiny_config(tmp_path, steps=100_000), tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = ["--output.test=false", "--output.export=false", f"--output.dir={folder}"]
    with (tmp_path / "output").open("w") as output:
        launcher = subprocess.Popen(
            [*torchrun, "-m", "mezo_dist", "train", str(config), *options], stdout=output, stderr=output
        )
    deadline = time.monotonic() + 200
    try:
        while not (folder / "trajectory.jsonl").exists() or not steps_of(folder):
            assert launcher.poll() is None, (tmp_path / "output").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        launcher.send_signal(signal.SIGKILL)
        launcher.wait()
    while (tmp_path / "output").read_text().count("go on with --output.if_exists=resume") < 2:
        assert time.monotonic() < deadline, (tmp_path / "output").read_text()
        time.sleep(0.1)
    assert "torchrun (process " in (tmp_path / "output").read_text()
