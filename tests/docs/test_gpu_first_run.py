"""The first half hour on a GPU, rehearsed on the CPU: the same code with tiny shapes."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import forked_ranks
from tests.forked import ROOT, Program

METHODS = {"forward", "mezo gaussian", "mezo rademacher", "mezo lowrank", "mezo in registers", "mezo per sample",
           "svrg cycle of 2", "svrg, anchor replayed", "textbook MeZO", "in-place LOZO"}  # fmt: skip


def forked_run(command: list[str], env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of a Python program, without the seconds that it takes to start."""
    with forked_ranks.environment() as ranks, Program(command[1:], environment={**env, **ranks}) as program:
        return subprocess.CompletedProcess(command, *program.finish())


def test_every_part_runs_and_leaves_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "gpu"))
    parts, runs = importlib.import_module("parts"), importlib.import_module("runs")
    monkeypatch.setattr(runs, "subprocess", SimpleNamespace(run=forked_run))
    rows = {}
    only = {"paper": ["--only", "mezo-svrg"]}
    for part in parts.PARTS.keys() - {"tests"}:
        monkeypatch.setattr(sys, "argv", ["parts.py", part, "--rehearse", "--out", str(tmp_path), *only.get(part, [])])
        parts.main()
        results = json.loads((tmp_path / f"{part}.json").read_text())
        assert results["rehearsal"] is True
        rows[part] = results["rows"]
    assert rows["directions"][0]["of a copy"] == 1
    assert all(row["GB/s"] > 0 for row in rows["directions"])
    assert {row["method"] for row in rows["steps"]} == {row["method"] for row in rows["memory"]} == METHODS
    assert all(row["forwards"] > 0 for row in rows["steps"])
    assert {row["law"] for row in rows["linear"]} == {"gaussian", "rademacher"}
    assert all(0 <= row["error"] < 1e-5 and row["materialised ms"] > 0 for row in rows["linear"])
    assert rows["generation"][0]["both signs tokens/s"] > 0
    for row in rows["trajectory"]:  # on one device
        assert row["equal weights after one update"] == 1
        assert row["difference of losses, step 3"] == 0
    assert [row["algorithm"] for row in rows["paper"]] == ["mezo-svrg"]
    assert (tmp_path / "steps.md").read_text().startswith("| shape | method | ms | forwards | published |")


def script(out: Path, part: str, *arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OUT": str(out), "PYTHON": python}
    command = ["sh", str(ROOT / "examples" / "gpu" / "first_run.sh"), part, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def saying(tmp_path: Path) -> str:
    """A Python that says what it is to run, unless that comes from standard input."""
    path = tmp_path / "saying"
    path.write_text(f'#!/bin/sh\n[ "$1" = - ] && exec {sys.executable} "$@"\nshift; echo "runs $*"\n')
    path.chmod(0o755)
    return str(path)


def test_the_script_profiles_what_is_furthest_from_a_copy(tmp_path: Path, saying: str) -> None:
    names = ["copy", "gaussian: update", "lowrank: update", "scale"]
    rows = [{"what": name, "of a copy": value} for name, value in zip(names, (1, 0.5, 0.25, 0.1), strict=True)]
    (tmp_path / "directions.json").write_text(json.dumps({"rows": rows}))
    said = script(tmp_path, "ncu", "--rehearse", python=saying)
    assert said.returncode == 0, said.stderr
    assert said.stdout.endswith(f"runs directions --only lowrank: update --rehearse --out {tmp_path}/ncu\n")


@pytest.mark.parametrize("part", ["tests", "trajectory", "directions", "steps", "memory", "generation", "paper"])
def test_the_script_runs_every_part(part: str, tmp_path: Path, saying: str) -> None:
    said = script(tmp_path, part, "--rehearse", "--only", "x", python=saying)
    assert said.stdout == f"runs {part} --rehearse --out {tmp_path} --only x\n"


def test_an_unknown_part_is_an_error(tmp_path: Path) -> None:
    said = script(tmp_path, "everything")
    assert (said.returncode, said.stderr) == (2, "no part is called everything\n")


def test_the_script_names_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "gpu"))
    parts = importlib.import_module("parts")
    text = (ROOT / "examples" / "gpu" / "first_run.sh").read_text()
    assert f"\n{' | '.join(parts.PARTS)})" in text
    assert "\nncu)" in text
    assert "\nevidence)" in text
