"""What came out of a run, in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mezo_dist.monitoring.outcome import duration, in_words, passes_until, shown
from mezo_dist.monitoring.run_data import read_run
from tests.monitoring.report_runs import lines, write_run

EFFORT = "in 4 steps (4,000 forward passes, 3 min 21 s on 2 processes)."


def sentence(folder: Path) -> str:
    return in_words(read_run(folder))


def test_a_finished_run(tmp_path: Path) -> None:
    text = sentence(write_run(tmp_path / "run"))
    assert text == f"Accuracy on 872 test samples rose from 53.0 % to 81.7 % {EFFORT}"


@pytest.mark.parametrize(
    ("results", "words"),
    [
        (
            {"before": {"accuracy": 0.9}, "after": {"accuracy": 0.8}},
            "Accuracy on the test samples fell from 90.0 % to ",
        ),
        ({"before": {"accuracy": 0.5}, "after": {"accuracy": 0.5}}, "Accuracy on the test samples stayed at 50.0 % in"),
        ({"after": {"accuracy": 0.5}}, "Accuracy on the test samples is 50.0 % in"),
        ({"before": {"loss": 2.0}, "after": {"loss": 1.0}}, "Accuracy on the validation samples rose from 25.0 % to"),
        ({"validation": {"accuracy": 0.75}}, "Accuracy on the validation samples rose from 25.0 % to 75.0 % in"),
        ({"validation": {"accuracy": None}, "samples": 3}, "Accuracy on the validation samples rose from 25.0 % to"),
        ({"before": 7, "after": [], "samples": {"validation": -1}}, "Accuracy on the validation samples rose from "),
    ],
)
def test_whatever_results_there_are(tmp_path: Path, results: Any, words: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "results.json").write_text(json.dumps(results))
    assert sentence(folder).startswith(words)


def test_the_loss_stands_in_for_a_metric_that_nobody_measured(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", task={"name": "films", "metric": "reward"})
    assert sentence(folder).startswith("The loss on 872 test samples fell from 0.7000 to 0.4000 in 4 steps")


def test_a_run_that_is_not_finished(tmp_path: Path) -> None:
    text = sentence(write_run(tmp_path / "run", planned=1234))
    assert text.startswith("Accuracy on the validation samples rose from 25.0 % to 50.0 % in 4 steps")
    assert text.endswith("The run is not finished: it is to have 1,234 steps.")


def test_an_old_run_folder(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=1, planned=1)
    for name in ("metrics.jsonl", "events.jsonl"):
        (folder / name).unlink()
    assert sentence(folder) == "No trained weights have been evaluated yet in 1 step."
    (folder / "results.json").write_text(json.dumps({"training_s": 5.25, "after": {"loss": 1.0}}))
    assert sentence(folder) == "The loss on the test samples is 1.0000 in 1 step (5.2 s)."


def test_steps_that_were_not_written_down_count_as_the_mean(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    counts = {1: 100, 2: 10, 4: 40}
    lines(
        folder / "metrics.jsonl", *({"step": s, "scalars": {"forward_passes_per_step": n}} for s, n in counts.items())
    )
    assert passes_until(read_run(folder)) == {0: 0, 1: 100, 2: 110, 3: 160, 4: 200}


def test_words_for_numbers() -> None:
    assert [duration(s) for s in (0.04, 9.96, 59.6, 3600, 7500)] == ["0.0 s", "10.0 s", "1 min 0 s", "1 h 0 min",
                                                                    "2 h 5 min"]  # fmt: skip
    assert [shown("accuracy", 0.5), shown("accuracy", 1.5), shown("bleu", 0.5), shown("loss", 1e9)] == [
        "50.0 %",
        "1.5000",
        "0.5000",
        "1e+09",
    ]
