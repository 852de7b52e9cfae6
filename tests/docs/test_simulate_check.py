"""The script that holds the simulation against virtual hosts: its table, for what was measured once."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.forked import ROOT

pytest.importorskip("simpy")
LINK = {"measured": 0.5, "predicted": 0.4, "contents": 700, "framing": 250, "sent": 1000}


def test_it_shows_every_residual(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "scaling_study"))
    script: Any = importlib.import_module("simulate_check")

    class Hosts:
        def __init__(self, count: int) -> None:
            self.hosts = [f"host{number}" for number in range(count)]

        def __enter__(self) -> Hosts:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    def all_reduce(hosts: Hosts, _: int) -> dict[str, float]:
        return {"seconds": 0.001 * (len(hosts.hosts) - 1), "packets": 13.5 if len(hosts.hosts) == 2 else 45.0}

    monkeypatch.setattr(script, "cluster", Hosts)
    monkeypatch.setattr(script, "all_reduce", all_reduce)
    monkeypatch.setattr(script, "slow_link", lambda *_: LINK)
    monkeypatch.setattr(script, "first_start", lambda *_: 20.0)
    monkeypatch.setattr(script, "lost", lambda *_, silent: {"noticed": 7.0, "back": 47.0 if silent else 22.0})
    monkeypatch.setattr(sys, "argv", ["simulate_check.py", "--fast", f"--to={tmp_path / 'all.json'}"])
    script.main()
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads((tmp_path / "all.json").read_text())["rows"]
    assert [round(row["residual"], 2) for row in rows] == [0, 0, 0, -0.1, -0.05, -0.2, -0.05, -0.2, 0, 0]
    assert rows[-2]["predicted"] == pytest.approx(script.TIMEOUT_S + 2 + script.LAST_CALL_S + 20, abs=0.1)
    assert rows[-1]["predicted"] == pytest.approx(2 + 20, abs=0.1)
    assert lines[-1].startswith("10 of 10 within 20%")
