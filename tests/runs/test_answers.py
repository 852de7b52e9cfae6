"""What a run notes of its model's answers, and the looks that it takes along the way."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mezo_dist.config import reader
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.runs import training
from mezo_dist.runs.answers import LONGEST, _before_in, confusion
from mezo_dist.runs.build import Run
from mezo_dist.tasks.kind import Answer
from mezo_dist.testing import write_tiny_config
from tests.tasks.kind_configs import TASKS, write_kind_config

SMALL = ["algorithm.lr=1e-2", "output.export=false", "monitor=[]", "train.steps=2"]


def answers(folder: Path) -> Any:
    return json.loads((folder / "answers.json").read_text())


def evaluations(folder: Path, split: str) -> list[int]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line.get("split") == split]


@pytest.mark.parametrize("name", TASKS)
def test_samples_are_kept_with_what_was_said_before_and_after(tmp_path: Path, name: str) -> None:
    path = write_kind_config(tmp_path, name)
    folder = training.train(reader.load(path, [*SMALL, "output.answers=3"]), Communicator(), quiet=True)
    kept = answers(folder)
    assert kept["samples"]["split"] == "validation"
    assert [sorted(item) for item in kept["samples"]["asked"]] == [["after", "before", "prompt", "right"]] * 3
    rows = {json.loads(line)["text"]: json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()}
    for item in kept["samples"]["asked"]:
        row = rows[max((text for text in rows if text in item["prompt"]), key=len)]
        right, said = item["right"], item["after"]
        match name:
            case "choice":
                assert right == row["options"][row["label"]]
                assert said in row["options"]
                assert item["prompt"].endswith("It was")
            case "completion":
                assert right == f"was {row['options'][0]}"
                assert said.endswith(" tokens right")
            case "generation":
                assert right == f"was {row['options'][0]}"
                assert item["prompt"].endswith("It")
            case "regression":
                assert float(right) == pytest.approx(row["score"], rel=1e-3)
                assert float(said) == pytest.approx(float(said))
            case "long words":
                assert right == ["terrible film", "great film"][row["label"]]
    table = kept.get("confusion")
    assert (table is not None) is (name == "long words")
    if table is not None:
        counts = table["counts"]
        assert (table["split"], table["classes"]) == ("test", ["terrible film", "great film"])
        assert sum(map(sum, counts)) == 20
        results = json.loads((folder / "results.json").read_text())
        f1 = 2 * counts[1][1] / max(1, 2 * counts[1][1] + counts[0][1] + counts[1][0])
        assert results["after"]["f1"] == pytest.approx(f1)
        assert results["samples"] == {"train": 20, "validation": 20, "test": 20}


def test_the_table_fits_the_accuracy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tiny_config(tmp_path, "opt", "mezo")
    folder = training.train(reader.load(path, [*SMALL, "output.test=false"]), Communicator(), quiet=True)
    table = answers(folder)["confusion"]
    assert (table["split"], table["classes"]) == ("validation", ["terrible", "great"])
    accuracy = json.loads((folder / "results.json").read_text())["validation"]["accuracy"]
    assert (table["counts"][0][0] + table["counts"][1][1]) / 20 == accuracy
    (item, *_) = answers(folder)["samples"]["asked"]
    assert "before" not in item, "nobody asked for an evaluation before training"
    assert "answers before training cannot be read" not in caplog.text


def test_nothing_is_kept_where_nothing_is_wanted(tmp_path: Path) -> None:
    path = write_tiny_config(tmp_path, "opt", "mezo")
    folder = training.train(reader.load(path, [*SMALL, "output.answers=0"]), Communicator(), quiet=True)
    assert not (folder / "answers.json").exists()


def test_answers_before_a_break_are_kept(tmp_path: Path) -> None:
    config = reader.load(write_tiny_config(tmp_path, "opt", "mezo"), SMALL)
    folder = training.train(config, Communicator(), quiet=True)
    kept = answers(folder)
    training.train(reader.load(tmp_path / "config.yaml", [*SMALL, "output.if_exists=resume"]), Communicator())
    assert answers(folder) == kept


def test_where_nothing_was_answered_before_there_is_nothing_to_say(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert _before_in(tmp_path) == {}
    assert not caplog.text


@pytest.mark.parametrize("damage", ["{", '{"samples": {"asked": [7]}}', "[]", '{"samples": {"asked": [{}]}}'])
def test_answers_before_that_cannot_be_read_are_none(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "answers.json").write_text(damage)
    assert _before_in(tmp_path) == {}
    assert "the answers before training cannot be read" in caplog.text


def test_looks_change_no_bit(tmp_path: Path) -> None:
    path = write_tiny_config(tmp_path, "opt", "mezo")
    few = ["algorithm.lr=1e-2", "task.splits.validation.size=2", "output.export=false", "monitor=[]"]
    lines, weights = [], []
    for looks, steps in ((0, [6]), (8, [0, 2, 4, 6])):
        folder = training.train(
            reader.load(path, [*few, f"output.looks={looks}", f"output.dir={tmp_path / str(looks)}"]),
            Communicator(),
            quiet=True,
        )
        assert evaluations(folder, "validation") == steps
        lines.append((folder / "trajectory.jsonl").read_bytes().splitlines()[1:])
        weights.append(json.loads((folder / "results.json").read_text())["weights"])
    assert lines[0] == lines[1]
    assert weights[0] == weights[1]


def test_looks_that_would_cost_too_much_are_left_out(tmp_path: Path) -> None:
    path = write_tiny_config(tmp_path, "opt", "mezo")
    folder = training.train(reader.load(path, SMALL), Communicator(), quiet=True)
    assert evaluations(folder, "validation") == [2], "20 samples are more than a tenth of 2 steps of 12 passes"
    given = [*SMALL, "train.evaluate_every=1", f"output.dir={tmp_path / 'given'}"]
    assert evaluations(training.train(reader.load(path, given), Communicator(), quiet=True), "validation") == [0, 1, 2]


@pytest.mark.parametrize(
    ("words", "classes", "is_there"), [(["a", "b"], (0, 1), True), ([], (0, 1), False), (["a"] * 51, (0, 1), False),
                                       (["a", "b"], None, False)]
)  # fmt: skip
def test_a_table_of_classes_that_can_be_looked_at(words: list[str], classes: Any, is_there: bool) -> None:
    run = cast("Run", SimpleNamespace(config=SimpleNamespace(task=SimpleNamespace(words=words))))
    table = confusion(run, "test", [Answer("x" * LONGEST, "y", classes)])
    assert (table is not None) is is_there
