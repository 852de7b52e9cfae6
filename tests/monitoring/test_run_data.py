"""Side files of a run folder are read whatever is in them: what is left out is named."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from mezo_dist.monitoring import run_data
from mezo_dist.monitoring.run_data import as_number, read_run, read_scalars
from tests.storage.trajectories import STEPS, write


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (1, 1.0),
        (-0.5, -0.5),
        (10**400, None),
        (1e101, None),
        (math.nan, None),
        (-math.inf, None),
        (True, None),
        ("1", None),
        (None, None),
        ([1], None),
    ],
)
def test_numbers_that_fit(value: object, number: float | None) -> None:
    assert as_number(value) == number


def test_a_value_that_is_measured_again_counts_and_steps_are_in_order(tmp_path: Path) -> None:
    lines = [{"step": step, "scalars": {"a": step + again}} for again, step in ((0, 1), (0, 3), (0, 2), (5, 3))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    problems: list[str] = []
    (series,) = read_scalars(tmp_path / "metrics.jsonl", problems).values()
    assert list(series.items()) == [(1, 1.0), (2, 2.0), (3, 8.0)]
    assert problems == []


def test_what_is_no_scalar_of_a_step_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1, "scalars": {"a": 0.5, "b": null, "c": 1' + b"0" * 400 + b', "d": "x"}}\n\xff\n[1]\n'
        b'{"step": -1, "scalars": {"a": 1}}\n{"step": true, "scalars": {"a": 1}}\n{"step": 2, "scalars": [1]}\n'
        + b"[" * 10**5
        + b'\n{"step": 1'
        + b"0" * 5000
        + b'}\n{"step": 2, "sca'
    )
    problems: list[str] = []
    assert read_scalars(path, problems) == {"a": {1: 0.5}}
    assert problems == [
        "metrics.jsonl: 5 lines that are no JSON objects are left out; the first of them is line 2 of those read",
        "metrics.jsonl: 3 lines without a step and its scalars are left out",
        "metrics.jsonl: 2 values that are no numbers, or too large for a plot, are left out",
    ]


def test_of_a_long_log_the_end_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "scalars": {"a": 1}}) + "\n" for step in range(100, 200)]
    path.write_text("".join(lines))
    monkeypatch.setattr(run_data, "MOST_LOG_BYTES", 5 * len(lines[0]) + 3)
    problems: list[str] = []
    assert list(read_scalars(path, problems)["a"]) == [195, 196, 197, 198, 199]
    assert problems == [f"metrics.jsonl: of {100 * len(lines[0]):,} bytes the last {5 * len(lines[0]) + 3} are read"]


def test_lines_and_tags_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": n, "scalars": {f"t{n}": 1, "t0": n}}) + "\n" for n in range(9)))
    monkeypatch.setattr(run_data, "MOST_LINES", 8)
    monkeypatch.setattr(run_data, "MOST_TAGS", 3)
    problems: list[str] = []
    series = read_scalars(path, problems)
    assert sorted(series) == ["t0", "t1", "t2"]
    assert list(series["t0"]) == list(range(8))
    assert problems == [
        "metrics.jsonl: lines after the first 8 are left out",
        "metrics.jsonl: 5 values of tags after the first 3 are left out",
    ]
    monkeypatch.setattr(run_data, "MOST_LINE_BYTES", 10)
    assert read_scalars(path, []) == {}


@pytest.mark.parametrize("kind", ["folder", "fifo", "link", "device", "large"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "results.json", "config.yaml"])
def test_what_lies_in_place_of_a_file_is_named(trajectory_path: Path, name: str, kind: str) -> None:
    path, secret = trajectory_path.with_name(name), trajectory_path.with_name("secret")
    secret.write_text('{"step": 1, "scalars": {"secret": 1}}')
    match kind:
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "link":
            path.symlink_to(secret)
        case "device":
            path.symlink_to("/dev/zero")
        case "large":
            with path.open("wb") as file:
                file.truncate(1 << 31)  # a hole: no room on disk
    data = read_run(trajectory_path.parent)
    assert (data.scalars, data.events, data.results, data.config) == ({}, [], {}, "")
    assert data.problems
    assert all(problem.startswith(name) for problem in data.problems)


def test_missing_files_are_no_problem(tmp_path: Path) -> None:
    data = read_run(write(tmp_path / "trajectory.jsonl", [*STEPS]).parent)
    assert (data.scalars, data.events, data.results, data.config, data.problems) == ({}, [], {}, "", [])


@pytest.mark.parametrize("content", [b"\xff", b"[1]", b"{", b"", b"null"])
def test_results_that_are_no_object(trajectory_path: Path, content: bytes) -> None:
    trajectory_path.with_name("results.json").write_bytes(content)
    data = read_run(trajectory_path.parent)
    assert data.results == {}
    (problem,) = data.problems
    assert problem.startswith("results.json cannot be read: it is no")
