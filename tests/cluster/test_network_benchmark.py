"""The benchmark of slow links, on a tiny model: what a step puts on the comm, as the network card counts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mezo_dist.planning.framing import framing_of, messages_of_reduce

from .conftest import ROOT, need

pytestmark = pytest.mark.distributed


def test_a_step_sends_a_few_hundred_bytes_whatever_the_link(tmp_path: Path) -> None:
    need({})
    given = ["--shape=tiny", "--rounds=1", "--steps=20", "--patience=2", "--json", f"--plot={tmp_path / 'comm.png'}"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "benchmarks" / "network.py"), *given],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["payload_bytes_per_step"] == 256
    # gloo puts its own few words before each message; the card counts those, and headers and acknowledgements.
    assert 256 <= figures["tcp_payload_bytes_per_step"] < figures["bytes_per_step"] < 2048
    counted = 256 + framing_of(messages_of_reduce(256, 2), 256, 2)
    assert figures["bytes_per_step"] == pytest.approx(counted, rel=0.2), "what mezo-dist plan says"
    weights = 3_000_000
    assert figures["ddp_bytes_per_step"] > 4 * weights, "a gradient of all weights"
    assert (tmp_path / "comm.png").stat().st_size > 1000
