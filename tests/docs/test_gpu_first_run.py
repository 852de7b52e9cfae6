"""The first half hour on a GPU, rehearsed on the CPU: the same code with tiny shapes."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from tests.forked import ROOT

METHODS = {"forward", "mezo gaussian", "mezo rademacher", "mezo lowrank", "mezo per sample", "svrg cycle of 2",
           "textbook MeZO", "in-place LOZO"}  # fmt: skip


def test_every_part_runs_and_leaves_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "gpu"))
    parts = importlib.import_module("parts")
    rows = {}
    for part in parts.PARTS:
        monkeypatch.setattr(sys, "argv", ["parts.py", part, "--rehearse", "--out", str(tmp_path)])
        parts.main()
        results = json.loads((tmp_path / f"{part}.json").read_text())
        assert results["rehearsal"] is True
        rows[part] = results["rows"]
    assert rows["directions"][0]["of a copy"] == 1
    assert all(row["GB/s"] > 0 for row in rows["directions"])
    assert {row["method"] for row in rows["steps"]} == {row["method"] for row in rows["memory"]} == METHODS
    assert all(row["forwards"] > 0 for row in rows["steps"])
    assert rows["generation"][0]["both signs tokens/s"] > 0


def test_the_script_names_every_part() -> None:
    script = (ROOT / "examples" / "gpu" / "first_run.sh").read_text()
    assert "directions | steps | memory | generation)" in script
    assert "\ntests)" in script
    assert "\nevidence)" in script
