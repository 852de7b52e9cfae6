"""The study of predicted against measured seconds runs; what it finds depends on the machine."""

from __future__ import annotations

import importlib
import json
import sys

import pytest

from mezo_dist.algorithms.mezo import MeZO
from tests.forked import ROOT
from tests.planning.test_command import MEASURED


def test_it_shows_every_residual(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "scaling_study"))
    plan_check = importlib.import_module("plan_check")
    case = plan_check.Case("opt-125m", 1, plan_check._setting("2x8", MeZO()))
    monkeypatch.setattr(plan_check, "SMALL", [case])
    monkeypatch.setattr(plan_check, "measure", lambda: MEASURED)
    monkeypatch.setattr(plan_check, "tune_malloc", lambda *, is_sharded: None)
    monkeypatch.setattr(
        sys, "argv", ["plan_check.py", "--cases", "small", "--repeats", "1", "--threads", "1", "--json"]
    )
    plan_check.main()
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert row["residual"] == pytest.approx(row["predicted_s"] / row["measured_s"] - 1)
    assert row["predicted_s"] == pytest.approx(sum(row["parts"].values()))
