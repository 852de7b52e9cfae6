"""The examples run, and do what they say."""

from __future__ import annotations

import json
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


def test_estimator_quality(tmp_path: Path) -> None:
    labels = ["MeZO", "MeZO, 16 directions", "MeZO-SVRG, q = 2"]
    run("examples/studies/estimator_quality.py", "--estimates", "8", "--out", str(tmp_path), "--only", *labels)
    found = json.loads((tmp_path / "estimator_quality-small-1.25.json").read_text())
    rows = {row["label"]: row for row in found["rows"]}
    assert rows.keys() == set(labels)
    for row in rows.values():
        assert row["passes_per_step"] == 160
        assert 0.05 * found["weights"] < row["error"] < 20 * found["weights"], "about as many as there are weights"
    svrg = rows["MeZO-SVRG, q = 2"]
    assert 1.8 < svrg["run_error"] / svrg["best_error"] < 2.2, "both steps of a cycle err alike"
    assert (tmp_path / "estimator_quality-small-1.25.png").stat().st_size > 1000


@pytest.mark.parametrize("options", [[], ["--processes", "2"]], ids=["in one process", "in two more"])
def test_minimize(options: list[str]) -> None:
    output = run("examples/minimize.py", "--steps", "12", *options)
    found = re.search(r"down for ([\d.]+)% before, ([\d.]+)% after", output)
    assert found, output
    assert float(found[1]) > 90
    assert float(found[2]) < 20
