"""``mezo-dist simulate`` as people call it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mezo_dist.cli import main

pytest.importorskip("simpy")
MODEL = ["opt-125m", "--ranks-per-host", "2", "--weeks", "1"]


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEZO_DIST_CACHE", str(tmp_path / "cache"))


def answered(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["simulate", *arguments, "--json"]) == 0
    data: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return data


def test_jobs_and_sensitivities(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = answered(capsys, *MODEL, "--hosts", "1", "200", f"--plot={tmp_path / 'week.png'}")
    assert [(row["hosts"], row["job"].split(", ")[1]) for row in data["rows"]] == [
        (hosts, job) for hosts in (1, 200) for job in ("mezo", "mezo-svrg", "whole (DDP)")
    ]
    for row in data["rows"]:
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert row["goodput"] == pytest.approx(row["shares"]["useful"])
    one, many = (row["samples_per_s"] for row in data["rows"] if row["job"] == "replicated, mezo")
    assert 50 * one < many < 200 * one
    effects = {effect["name"]: effect for effect in data["sensitivity"]["effects"]}
    assert effects["latency"]["doubled"] < 0 < effects["latency"]["halved"], "a ring of 400 ranks"
    assert "latency" in data["carrying"]
    assert data["sensitivity"]["hierarchical"] > 0
    assert (tmp_path / "week.png").stat().st_size > 1000


def test_layouts_and_directions_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    given = [*MODEL, "--hosts", "4", "--algorithm", "mezo", "--grow", "directions", "--every-layout"]
    data = answered(capsys, *given, "--launcher", "slurm", "--spares", "1", "--reduce", "tree", "--snapshots", "none")
    layouts = [row["job"].split()[0].strip(",") for row in data["rows"]]
    assert layouts == ["replicated", "fsdp", "zero", "AdamW"]
    assert {row["snapshot_every"] for row in data["rows"][:3]} == {0}
    assert data["sensitivity"]["hierarchical"] is None


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *MODEL, "--hosts", "2", "--time", "1d"]) == 0
    text = capsys.readouterr().out
    assert "what gets done" in text
    assert "rests on" in text
    assert "Not simulated" in text
    assert max(map(len, text.splitlines())) <= 118


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["MODEL"]),
        (["opt-13"], ["MODEL", "opt-13b"]),
        (["opt-125m", "--hosts", "0"], ["--hosts"]),
        (["opt-125m", "--hosts", "1000000"], ["--hosts", "100,000"]),
        (["opt-125m", "--time", "x"], ["--time"]),
        (["opt-125m", "--time", "0s"], ["--time"]),
        (["opt-125m", "--weeks", "0"], ["--weeks"]),
        (["opt-125m", "--spares", "-1"], ["--spares"]),
        (["opt-125m", "--snapshots", "often"], ["--snapshots"]),
        (["opt-125m", "--assume", "mtbf=never"], ["mtbf"]),
        (["opt-125m", "--stragglers", "nowhere"], ["--stragglers", "nowhere"]),
        (["opt-125m", "--plot", "week.txt"], ["--plot"]),
        (["opt-125m", "--calibrate"], ["mezo-dist plan --calibrate"]),
        (["opt-175b", "--hosts", "1"], ["nothing fits"]),
    ],
)
def test_errors_name_the_option(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *arguments]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
