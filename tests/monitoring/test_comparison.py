"""A report about several runs."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mezo_dist import cli
from mezo_dist.monitoring import comparison
from mezo_dist.monitoring.plots import MOST_SERIES
from tests.monitoring.report_runs import write_run


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Titles in place of plots: drawing takes longer than all the rest."""
    monkeypatch.setattr(comparison, "draw", lambda panel: f"<svg><text>{panel.title}</text></svg>")


def page(*runs: Path, to: Path) -> str:
    assert cli.main(["report", *map(str, runs), "--to", str(to)]) == 0
    text = to.read_text()
    HTMLParser().feed(text)
    return text


def plots(text: str) -> list[list[str]]:
    """The texts of every plot."""
    drawn = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    return [
        [element.text or "" for element in ET.fromstring(svg).iter() if element.tag.endswith("text")] for svg in drawn
    ]


def table(text: str, title: str) -> dict[str, list[str]]:
    """Rows of the table under a title."""
    part = text[text.index(f"<h2>{title}</h2>") :]
    part = part[: part.index("</table>")]
    rows = re.findall(r"<tr><th>([^<]*)</th>((?:<t[dh]>[^<]*</t[dh]>)+)</tr>", part)
    return {name: re.findall(r"<t[dh]>([^<]*)</t[dh]>", cells) for name, cells in rows}


def test_curves_figures_and_settings_that_differ(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    two = write_run(tmp_path / "two", 6, counted=False, algorithm={"name": "mezo", "lr": 0.3, "only": {"here": [1]}})
    text = page(one, two, to=tmp_path / "report.html")
    drawn = plots(text)
    titles = ["Training loss", "Validation: accuracy", "Validation: loss"]
    assert [title for texts in drawn for title in texts if title in titles] == [t for t in titles for _ in range(2)]
    for texts in drawn:
        assert ("steps done" in texts) != ("forward passes of one sample" in texts)
        # The second run did not count them.
        assert (" two" in texts) is ("steps done" in texts)
    assert "not counted when these runs were made: two." in text
    assert "<th>one</th><td>Accuracy on 872 test samples rose from 53.0 % to 81.7 % in 4 steps" in text
    final = table(text, "Final figures")
    assert final[""] == ["one", "two"]
    assert final["steps"] == ["4", "6"]
    assert final["forward passes"] == ["4,000", "-"]
    assert final["test, after: accuracy"] == ["81.7 %", "81.7 %"]
    assert table(text, "Settings that differ") == {
        "": ["one", "two"],
        "algorithm.lr": ["0.1", "0.3"],
        "algorithm.only.here": ["-", "[1]"],
        "train.steps": ["4", "6"],
    }
    assert not re.search(r'(src|href)="(?!#)', text.replace("xlink:href", "href")), "nothing is loaded from elsewhere"


@pytest.mark.usefixtures("no_plots")
def test_runs_of_one_name_and_one_that_is_named_twice(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name / "run") for name in ("a", "b")]
    text = page(*runs, runs[0], to=tmp_path / "report.html")
    assert table(text, "Final figures")[""] == ["a/run (1)", "b/run", "a/run (3)"]
    assert "None: these runs have the same settings." in text


@pytest.mark.usefixtures("no_plots")
def test_calibrated_losses_have_a_plot_of_their_own(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    two = write_run(tmp_path / "two", train={"steps": 4, "calibrate": True})
    metrics = (two / "metrics.jsonl").read_text()
    (two / "metrics.jsonl").write_text(metrics.replace("loss/train", "loss/train_calibrated_biased_low"))
    text = page(one, two, to=tmp_path / "report.html")
    assert sum("Calibrated training loss" in texts for texts in plots(text)) == 2
    assert sum("Training loss" in texts for texts in plots(text)) == 2
    assert "is biased low" in text


@pytest.mark.usefixtures("no_plots")
def test_where_several_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(write_run(tmp_path / name)) for name in ("a", "b")]
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", *runs]) == 0
    assert (tmp_path / "report.html").exists()
    assert "wrote report.html" in capsys.readouterr().out
    assert cli.main(["report", *runs, "nowhere"]) == 2
    assert cli.main(["report", *[runs[0]] * (MOST_SERIES + 1)]) == 2
    assert f"name {MOST_SERIES} at most" in capsys.readouterr().err


def test_names_are_text(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "<script>" / name, law=f"<b>{name}\x1b") for name in ("_a", "$x$")]
    text = page(*runs, to=tmp_path / "report.html")
    assert "<script" not in text
    assert table(text, "Settings that differ")["law"] == ["&lt;b&gt;_a\\x1b", "&lt;b&gt;$x$\\x1b"]
    assert any(" _a" in texts and " $x$" in texts for texts in plots(text))
