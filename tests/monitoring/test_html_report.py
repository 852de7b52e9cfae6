"""The report: everything that the files say about a run, on one page that stands alone."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mezo_dist import cli
from mezo_dist.algorithms.base import Losses
from mezo_dist.config.schema import digest_of
from mezo_dist.errors import UserError
from mezo_dist.monitoring import html_report, plots
from mezo_dist.monitoring.scalars import train_loss_tag
from mezo_dist.storage.trajectory import Mark, Step
from mezo_dist.storage.trajectory_writer import TrajectoryWriter
from tests.storage import trajectories

CONFIG = {"task": {"name": "films <&>"}, "train": {"steps": 4}, "algorithm": {"name": "mezo-svrg"}}
HEADER = dataclasses.replace(
    trajectories.HEADER, config=CONFIG, config_digest=digest_of(CONFIG), base_model="a/model", seed=0
)


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
    "Calibrated training loss",
    "Evaluation: accuracy",
    "Evaluation: loss",
    "Throughput",
    "Peak memory of rank 0",
    "Trajectory",
]


def test_a_trajectory_alone_is_enough(run: Path) -> None:
    text = page(run)
    assert titles(text) == ["Training loss"]
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
    assert titles(text) == [title for title in TITLES if title != "Calibrated training loss"]
    assert "<td>not finite</td><td>0.5000</td>" in text
    assert "<td>0.2500</td>" in text
    assert "1 restarts, 0 times told to stop" in text
    assert "resumed after step 1 (torn_bytes 17)" in text
    assert "a: &lt;b&gt;" in text
    assert not re.search(r'(src|href)="(?!#)', text.replace("xlink:href", "href")), "nothing is loaded from elsewhere"


def test_answers_and_classes_are_shown(run: Path) -> None:
    counts = [[90, 10], [0, 1234]]
    answers = {
        "confusion": {"split": "test", "classes": ["<bad>", "good"], "counts": counts},
        "samples": {
            "split": "validation",
            "asked": [{"prompt": "a <film>\nIt was", "right": "good", "before": "bad", "after": "good"}, {"after": 7}],
        },
    }
    (run / "answers.json").write_text(json.dumps(answers))
    text = page(run)
    assert "Of 1,334 test samples" in text
    assert "<tr><th>&lt;bad&gt;</th><td style=" in text
    assert [int(n.replace(",", "")) for n in re.findall(r"<td style=[^>]*>([\d,]+)</td>", text)] == [
        *counts[0],
        *counts[1],
    ]
    assert "<tr><td>a &lt;film&gt;\nIt was</td><td>good</td><td>bad</td><td>good</td></tr>" in text
    assert "<tr><td>-</td><td>-</td><td>-</td><td>-</td></tr>" in text


@pytest.mark.parametrize(
    "answers",
    [
        {"confusion": 7, "samples": 7},
        {"confusion": {"classes": ["a", "b"], "counts": [[1, 2]]}, "samples": {"asked": {}}},
        {"confusion": {"classes": ["a"], "counts": [["<script>"]]}, "samples": {"asked": [7, None]}},
        {"confusion": {"classes": ["a"], "counts": [[True]]}},
        {"confusion": {"classes": ["a"] * 1000, "counts": [[1] * 1000] * 1000}},
        {"confusion": {"classes": ["a"], "counts": [[1e400]]}},
    ],
)
def test_answers_that_make_no_sense_are_left_out(run: Path, answers: Any) -> None:
    (run / "answers.json").write_text(json.dumps(answers))
    text = page(run)
    assert "Which classes were taken" not in text
    assert "Some samples" not in text


def test_axes_of_memory_and_bytes_start_at_zero(run: Path) -> None:
    memory = {f"step {n}": n for n in range(3)}
    lines(
        run / "metrics.jsonl",
        *({"step": n, "scalars": {"memory/peak_rss_GiB": 500 + n, "eval/test/loss": 500 + n}} for n in memory.values()),
    )
    (_, loss, peak) = re.findall(r"<svg.*?</svg>", page(run), re.DOTALL)
    assert ">0</text>" in peak.split("steps done")[1]
    assert ">0</text>" not in loss.split("steps done")[1]


def test_it_is_the_same_page_every_time(run: Path) -> None:
    assert page(run) == page(run)


def test_names_are_text_and_nothing_else(run: Path, tmp_path: Path) -> None:
    """Not markup of HTML, of SVG or of matplotlib, and no control characters."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    name = "$\\frac{$<script>\x1b[2J\n\ud800\ufffe</svg>"
    config = {"task": {"name": name}, "train": {"steps": 10**400, "calibrate": True}, "algorithm": {"name": [[]]}}
    header = dataclasses.replace(
        HEADER, config=config, config_digest=digest_of(config), base_model=name, version="v" * 10**6
    )
    writer = TrajectoryWriter.begin(folder / "trajectory.jsonl", header)
    writer.append(Step(0, (Losses((1e308, 1e308)),), "0" * 8))
    writer.close()
    tags = [f"eval/{split}/{name}" for split in ("_one", name.replace("/", ""))] + ["eval/test/" + "long" * 10**5]
    lines(folder / "metrics.jsonl", {"step": 1, "scalars": dict.fromkeys(tags, 1e100)})
    lines(folder / "events.jsonl", {"time": [name], "event": name, "step": {}, name: name, "deep": [[[]]]})
    (folder / "results.json").write_text(json.dumps({"before": {name: 1e308, "n": 10**400, "t": name}, "after": 3}))
    (folder / "config.yaml").write_bytes(b"a: <script>\x1b[2J\r\nb: 1\n")
    text = page(folder)
    assert "<script" not in text
    assert "&lt;script&gt;\\x1b[2J\\n\\ud800\\ufffe" in text
    assert "a: &lt;script&gt;\\x1b[2J\nb: 1" in text
    assert "$\\frac{$" in "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert " _one</text>" in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    assert len(text) < 200_000


def test_what_cannot_be_read_is_named(run: Path) -> None:
    os.mkfifo(run / "metrics.jsonl")
    (run / "events.jsonl").symlink_to("/dev/zero")
    (run / "results.json").write_text("[" * 10**5)
    (run / "config.yaml").mkdir()
    text = page(run)
    assert titles(text) == ["Training loss"]
    problems = re.findall("<li>(.*?)</li>", text)
    assert problems == [
        "metrics.jsonl cannot be read: not a regular file",
        "events.jsonl cannot be read: a symbolic link, which is not followed",
        "results.json cannot be read: it is no JSON object",
        "config.yaml cannot be read: not a regular file",
    ]


def test_the_number_of_plots_and_events_is_bounded(run: Path) -> None:
    tags = {f"eval/test/name{number:03}": 0.5 for number in range(300)} | {"lr": 1e-6, "other": 1.0}
    lines(run / "metrics.jsonl", {"step": 1, "scalars": tags})
    lines(run / "events.jsonl", *({"event": f"event{number}", "step": number} for number in range(1000)))
    text = page(run)
    assert text.count("<svg") == plots.MOST_PLOTS
    assert "metrics.jsonl: eval/test/name018, eval/test/name019" in text
    assert "name027 and 273 more." in text
    assert "The 800 events before these" in text
    assert text.count("event9") == 100  # 900 to 999


def test_a_calibrated_loss_says_so(run: Path) -> None:
    lines(run / "metrics.jsonl", {"step": 1, "scalars": {train_loss_tag(calibrated=True): 0.5}})
    assert "Do not compare" not in page(run)
    config = {**CONFIG, "train": {"steps": 4, "calibrate": True}}
    header = dataclasses.replace(HEADER, config=config, config_digest=digest_of(config))
    (run / "trajectory.jsonl").unlink()
    TrajectoryWriter.begin(run / "trajectory.jsonl", header).close()
    text = page(run)
    assert titles(text) == ["Calibrated training loss"]
    assert "calibrated loss (biased low)" in text
    assert "Do not compare it with the validation loss" in text


def test_a_report_is_not_written_through_a_link(run: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("report.html", ".report.html.part"):
        (run / name).symlink_to(victim)
    page(run)
    assert victim.read_text() == "precious"
    assert not (run / "report.html").is_symlink()


def test_where_it_cannot_be_written(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--to .*: cannot be written"):
        html_report.write([run], tmp_path / "nowhere" / "report.html")
    with pytest.raises(UserError, match="not a run folder"):
        html_report.write([tmp_path / "nowhere"], tmp_path / "report.html")


def test_a_baseline_is_no_base_model_and_a_log(tmp_path: Path) -> None:
    header = dataclasses.replace(HEADER, weights="float32, by adamw of torch, from snapshots alone")
    writer = TrajectoryWriter.begin(tmp_path / "trajectory.jsonl", header)
    writer.append(Step(0, (Losses((0.75,)),), "0" * 8))
    writer.close()
    text = page(tmp_path)
    assert "losses alone, weights are in snapshots" in text
    assert "exact gradients" in text
    assert "with the base model, it is" not in text
