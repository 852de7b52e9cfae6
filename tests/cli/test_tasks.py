"""``mezo-dist tasks``: the list, and what a task looks like to a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mezo_dist.cli import main
from mezo_dist.config.reader import load
from mezo_dist.config.shipped import shipped_tasks
from mezo_dist.testing import write_tiny_config, write_tiny_data, write_tiny_model

ROOT = Path(__file__).parents[2]


def test_the_list_names_every_task_that_ships(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == {path.stem for path in (ROOT / "configs" / "tasks").glob("*.yaml")}
    assert {line.split()[1] for line in lines} <= {"classification", "regression", "choice", "completion", "generation"}


def test_a_config_may_name_a_task_that_ships(tmp_path: Path) -> None:
    config = write_tiny_config(tmp_path)
    assert load(config, ["task=sst2"]).task.name == "sst2"
    assert Path(shipped_tasks()["sst2"]).parent.name == "tasks"


def test_a_task_that_does_not_ship(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", "show", "sst3", "--model", str(tmp_path)]) != 0
    error = capsys.readouterr().err
    assert "task: 'sst3' is no file in" in error
    assert "sst2" in error


def test_a_task_is_shown_as_the_model_gets_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, data = write_tiny_model(tmp_path / "model", "llama"), write_tiny_data(tmp_path / "data.jsonl", 24)
    sizes = {name: {"source": "train", "size": 8} for name in ("train", "validation", "test")}
    task = {
        "name": "reviews",
        "data": str(data),
        "splits": sizes,
        "prompt": "{{ text }} . It was {{ answer }}",
        "labels": [{"value": 0, "word": "terrible"}, {"value": 1, "word": "great"}],
    }
    (tmp_path / "reviews.yaml").write_text(yaml.safe_dump(task))
    assert main(["tasks", "show", "reviews.yaml", "--model", str(model), "--rows", "1", "train.max_tokens=10"]) == 0
    shown = capsys.readouterr().out
    assert "reviews (classification): 8 train, 8 validation, 8 test" in shown
    assert "It was" in shown
    assert "of 8 are shortened" in shown
    assert "label tokens: 'terrible' is" in shown
    prior = shown.splitlines()[-1].split()
    assert abs(float(prior[-3].rstrip(",")) + float(prior[-1]) - 1) < 2e-3
