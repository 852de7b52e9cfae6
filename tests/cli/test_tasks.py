"""``mezo-dist tasks``: the list, and what a task looks like to a model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from mezo_dist.cli import main
from mezo_dist.config.reader import load
from mezo_dist.config.shipped import shipped_tasks
from mezo_dist.testing import write_tiny_config, write_tiny_data, write_tiny_model
from tests.tasks.kind_configs import MODELS, TASKS, rows

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


def test_a_folder_of_data_does_not_hide_the_task_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sst2").mkdir()
    assert load(write_tiny_config(tmp_path), ["task=sst2"]).task.name == "sst2"


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
    assert main(["tasks", "show", "reviews.yaml", "--model", str(model), "--rows", "8", "train.max_tokens=10"]) == 0
    shown = capsys.readouterr().out
    assert "reviews (classification): 8 train, 8 validation, 8 test" in shown
    assert "It was" in shown
    assert "of 8 are shortened" in shown
    assert "label tokens: 'terrible' is" in shown
    assert "shortened from" in shown
    assert re.search(r"right: (terrible|great)", shown)
    assert "the untrained model on 8 training samples: loss " in shown
    prior = shown.splitlines()[-1].split()
    assert abs(float(prior[-3].rstrip(",")) + float(prior[-1]) - 1) < 2e-3


SHOWN = {
    "choice": ["option 0, 2 tokens: '", "right: option ", "samples: loss ", ", accuracy "],
    "completion": ["to be predicted, ", "samples: loss ", ", perplexity ", ", token-accuracy "],
    "generation": ["to be predicted, ", "right: 'was ", "on 4 training samples: loss ", "it writes for sample 3: '"],
    "regression": ["    right: ", "samples: loss ", ", pearson "],
    "long words": [
        "option 1, 2 tokens: 'great film'",
        "right: terrible film",
        "prior of the untrained model, mean over 9",
    ],
}


@pytest.mark.parametrize("name", SHOWN)
def test_every_kind_is_shown(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = write_tiny_model(tmp_path / "model", MODELS[name])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    splits = {split: {"source": "train", "size": 9} for split in ("train", "validation", "test")}
    task = {"name": name, "data": "rows.jsonl", "splits": splits, **TASKS[name]}
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
    assert main(["tasks", "show", "task.yaml", "--model", str(model), "--rows", "9"]) == 0
    shown = capsys.readouterr().out
    assert "9 train, 9 validation, 9 test" in shown
    assert "train sample 8, " in shown
    for part in SHOWN[name]:
        assert part in shown
