"""Which rows count, as task files say it, and the texts by which values of the data go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mezo_dist.config.kinds.classification import ClassificationTask
from mezo_dist.config.reader import from_dict, load
from mezo_dist.config.values import ClassIndex, Where, names_of
from tests.config.configs import CONFIG, TASK, Write, fault


@pytest.fixture
def write_config(tmp_path: Path) -> Write:
    def write(task: str) -> Path:
        (tmp_path / "tasks").mkdir(exist_ok=True)
        (tmp_path / "tasks" / "reviews.yaml").write_text(task)
        (tmp_path / "run.yaml").write_text(CONFIG)
        return tmp_path / "run.yaml"

    return write


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{drop: {label: [-1]}}", Where(drop={"label": (-1,)})),
        (
            "{keep: {genre: [fiction, yes], ok: [true, null, 1.5]}}",
            {"genre": ("fiction", "yes"), "ok": (True, None, 1.5)},
        ),
        ("{}", Where()),
    ],
)
def test_which_rows_count(write_config: Write, text: str, expected: Any) -> None:
    config = load(write_config(TASK + f"where: {text}\n"))
    assert config.task.where == (expected if isinstance(expected, Where) else Where(keep=expected))
    assert from_dict(config.to_dict(), "a run").task.where == config.task.where
    assert load(write_config(TASK), ["task.where.drop={label: [2]}"]).task.where == Where(drop={"label": (2,)})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "{drop: {label: -1}}",
            "task.where.drop: must be a mapping of text to a list of true or false or a number or text or null",
        ),
        ("{drop: {label: [[1]]}}", "task.where.drop: must be a mapping of text to a list of"),
        ("{drop: {label: []}}", "task.where.drop: label: give at least one value"),
        ("{dorp: {label: [1]}}", "unknown setting 'task.where.dorp'; did you mean 'task.where.drop'?"),
        ("{label: [1]}", "unknown setting 'task.where.label'; did you mean 'task.label'?"),
        ("[label]", "task.where: must hold settings (keep, drop), not ["),
    ],
)
def test_conditions_that_are_none(write_config: Write, text: str, expected: str) -> None:
    assert f"tasks/reviews.yaml: {expected}" in fault(write_config(TASK + f"where: {text}\n"))


@pytest.mark.parametrize(("first", "second"), [("true", '"true"'), ("true", '"True"'), ("0", '"0"')])
def test_labels_that_are_the_same(write_config: Write, first: str, second: str) -> None:
    task = TASK.replace("value: 0", f"value: {first}").replace("value: 1", f"value: {second}")
    assert "task.labels: two labels have the same value" in fault(write_config(task))


def test_a_boolean_label(write_config: Write) -> None:
    task = TASK.replace("value: 0", "value: false").replace("value: 1", "value: true")
    settings = load(write_config(task)).task
    assert isinstance(settings, ClassificationTask)
    assert [label.value for label in settings.labels] == [False, True]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, ("1",)),
        ("01", ("01",)),
        (1.0, ("1", "1.0")),
        (1.5, ("1.5",)),
        (True, ("True", "true", "TRUE")),
        (None, ("null",)),
        (ClassIndex(1, "positive"), ("1", "positive")),
    ],
)
def test_the_texts_that_a_value_goes_by(value: Any, expected: tuple[str, ...]) -> None:
    assert names_of(value) == expected


def test_a_class_is_printed_as_its_number() -> None:
    assert f"{ClassIndex(1, 'positive')} {ClassIndex(1, 'positive')!r}" == "1 1"
