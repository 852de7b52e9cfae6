"""The report: everything that the files say about a run, on one page that stands alone."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mezo_dist import cli
from mezo_dist.algorithms.base import Losses
from mezo_dist.errors import UserError
from mezo_dist.monitoring import html_report, run_data
from mezo_dist.storage.trajectory import Header, Mark, Step
from mezo_dist.storage.trajectory_writer import TrajectoryWriter

CONFIG = {"task": {"name": "films <&>"}, "train": {"steps": 4}, "algorithm": {"name": "mezo-svrg"}}
HEADER = Header(CONFIG, "d" * 64, "a/model", "0" * 16, "law/v1", "float32, to nearest", 0, 30, "0.1.0")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three of four steps, one of them skipped, with a restart in between."""
    writer = TrajectoryWriter.begin(tmp_path / "trajectory.jsonl", HEADER)
    writer.append(Step(0, (Losses((0.75, 0.25)),), "0" * 8))
    writer.append(Step(1, (), skipped="a loss is not finite"))
    writer.append(Step(2, (Losses((0.5, 0.25)),), "0" * 8))
    writer.append(Mark(3, "fedcba9876543210"))
    writer.close()
    return tmp_path


def lines(path: Path, *items: Any) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def page(folder: Path) -> str:
    assert cli.main(["report", str(folder)]) == 0
    text = (folder / "report.html").read_text()
    HTMLParser().feed(text)
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ET.fromstring(svg)
    return text


def titles(text: str) -> list[str]:
    """Titles of the plots."""
    return [title for title in re.findall(r">([^<>]+)</text>", text) if title in TITLES]


TITLES = [
    "Training loss",
    "Evaluation: accuracy",
    "Evaluation: loss",
    "Throughput",
    "Peak memory of rank 0",
    "Trajectory",
]


def test_a_trajectory_alone_is_enough(run: Path) -> None:
    text = page(run)
    assert titles(text) == ["Training loss"]
    assert run_data.read_scalars(run / "metrics.jsonl", []) == {}
    for fact in (
        "3 of 4",
        "1 steps without a finite loss",
        "fedcba9876543210 after step 3",
        "a/model on films &lt;&amp;&gt;",
    ):
        assert fact in text
    assert "No evaluation is finished" in text


def test_what_a_run_leaves_is_shown(run: Path) -> None:
    lines(
        run / "metrics.jsonl",
        {"step": 0, "scalars": {"eval/test/loss": 0.9, "eval/test/accuracy": 0.5}},
        {"step": 1, "scalars": {"loss/train": 0.5, "memory/peak_rss_GiB": 1.5, "trajectory/bytes": 400}},
        {"step": 3, "scalars": {"loss/train": None, "throughput/samples_per_s": 12.0}},
    )
    lines(
        run / "events.jsonl",
        {"time": "2026-01-01T00:00:00", "event": "started", "step": 0, "ranks": 2},
        {"time": "2026-01-01T00:01:00", "event": "resumed", "step": 1, "torn_bytes": 17},
    )
    (run / "results.json").write_text(json.dumps({"before": {"loss": None, "accuracy": 0.5}, "after": {"loss": 0.25}}))
    (run / "config.yaml").write_text("a: <b>\n")
    text = page(run)
    assert titles(text) == TITLES
    assert "<td>not finite</td><td>0.5000</td>" in text
    assert "<td>0.2500</td>" in text
    assert "1 restarts, 0 times told to stop" in text
    assert "resumed after step 1 (torn_bytes 17)" in text
    assert "a: &lt;b&gt;" in text
    assert not re.search(r'(src|href)="(?!#)', text.replace("xlink:href", "href")), "nothing is loaded from elsewhere"


def test_it_is_the_same_page_every_time(run: Path) -> None:
    assert page(run) == page(run)


def test_lines_that_are_no_json_are_passed_over(run: Path) -> None:
    (run / "metrics.jsonl").write_bytes(b'{"step": 1, "scalars": {"loss/train": 0.5}}\n\xff\n[1]\n{"step": 2, "sca')
    assert run_data.read_scalars(run / "metrics.jsonl", []) == {"loss/train": {1: 0.5}}
    page(run)


def test_where_it_cannot_be_written(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--to .*: cannot be written"):
        html_report.write(run, tmp_path / "nowhere" / "report.html")
    with pytest.raises(UserError, match="not a run folder"):
        html_report.write(tmp_path / "nowhere", tmp_path / "report.html")
