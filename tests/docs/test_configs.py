"""Every shipped config really trains, on a tiny model and tiny data, and so do tasks of each shape.

What a model reads of every task file is tested in tests/tasks/test_shipped.py.

The model is replaced by a tiny one of the same architecture and the data by made-up rows with the fields, labels and
splits that the task names; everything else is as shipped. So a broken file fails here, without any download.
"""

from __future__ import annotations

import json
import random
import re
import shlex
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import pytest
import tokenizers
import yaml

from mezo_dist import cli
from mezo_dist.algorithms.operations import Add
from mezo_dist.config.kinds import Task
from mezo_dist.config.kinds.choice import ChoiceTask
from mezo_dist.config.kinds.classification import ClassificationTask
from mezo_dist.config.kinds.generation import GenerationTask
from mezo_dist.config.reader import load
from mezo_dist.config.schema import RunConfig
from mezo_dist.config.task import ANSWER
from mezo_dist.directions.combination import ZERO
from mezo_dist.storage import trajectory
from mezo_dist.tasks.templates import ROW
from mezo_dist.testing import WORDS, tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TASKS = sorted((ROOT / "configs" / "tasks").glob("*.yaml"))
CONFIGS = sorted(set((ROOT / "configs").rglob("*.yaml")) - set(TASKS))
# Every config with its own task; in the quickstart, a task of one text, one of two fields with a boolean label, and one
# for masked models whose labels go by name.
SHAPES = [task for task in TASKS if task.stem in ("movie-sentences", "boolq", "trec-masked")]
RUNS = [(config, None) for config in CONFIGS] + [(ROOT / "configs" / "quickstart.yaml", task) for task in SHAPES]
ARCHITECTURES = {
    "opt": "opt",
    "distilroberta": "roberta",
    "distilbert": "distilbert",
    "roberta": "roberta",
    "bert": "bert",
    "gpt2": "gpt2",
}
ROWS_PER_SOURCE = 64


def name(path: Path | None) -> str:
    return str(path.relative_to(ROOT)) if path else "its own task"


def header(path: Path) -> str:
    """The comment that a file starts with."""
    lines = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))
    return re.sub(r"^# ?", "", lines[0], flags=re.MULTILINE) if lines else ""


def fields(task: Task) -> list[str]:
    """The fields of a row that the task's templates use, and those that a reward looks at."""
    environment = jinja2.Environment()
    environment.filters |= dict.fromkeys(("upper_first", "lower_first", "drop_last", "strip_end"), str)
    settings = vars(task)
    given = (settings.get("prompt", ""), settings.get("completion", ""), *settings.get("plain", ()))
    trees = [environment.parse(template) for template in (*given, *settings.get("options", ()))]
    used = {field for tree in trees for field in jinja2.meta.find_undeclared_variables(tree)} - {ANSWER, ROW}
    used |= {"topic"} if isinstance(task, GenerationTask) else set()
    return sorted(used | {node.attr for tree in trees for node in tree.find_all(jinja2.nodes.Getattr)})  # row.answer


def write_data(task: Task, folder: Path) -> Path:
    """A folder with a file of made-up rows for every split that the task draws from."""
    draw = random.Random(0)
    folder.mkdir()
    for source in {split.source for split in (task.splits.train, task.splits.validation, task.splits.test)}:
        rows = []
        for number in range(ROWS_PER_SOURCE):
            row: dict[str, Any] = {
                field: " ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for field in fields(task)
            }
            if isinstance(task, ClassificationTask):
                row[task.label] = task.labels[number % len(task.labels)].value
            elif isinstance(task, ChoiceTask):
                row[task.label] = task.labels[number % len(task.labels)] if task.labels else number % len(task.options)
            rows.append(row)
        (folder / f"{source}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_model(config: RunConfig, folder: Path) -> Path:
    """A tiny model of the config's architecture, whose tokeniser knows the label words."""
    known = [kind for part, kind in ARCHITECTURES.items() if part in config.model.name.lower()]
    usual = "roberta" if config.task.name.endswith("-masked") else "llama-tied"
    tiny_model(known[0] if known else usual).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    words = config.task.words
    if isinstance(config.task, ChoiceTask):  # an option is a text of several words
        words = sorted({word for option in words for word in option.split()})
    tokenizer.add_tokens([tokenizers.AddedToken(word, single_word=True) for word in words])
    assert len(tokenizer) <= 64, "too many label words for the tiny vocabulary"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_the_header_of_a_config_says_how_to_run_it(path: Path) -> None:
    commands = [shlex.split(line) for line in header(path).splitlines() if re.match(r" +\S.*\btrain configs/", line)]
    assert commands, f"{name(path)} names no command that runs it: '#   mezo-dist train {name(path)}'"
    for command in commands:
        place = command.index("train")
        assert command[:place] == ["mezo-dist"] or command[place - 2 : place] == ["-m", "mezo_dist"]
        assert command[place + 1] == name(path)
        load(ROOT / command[place + 1], command[place + 2 :])


@pytest.mark.parametrize("path", TASKS, ids=name)
def test_the_header_of_a_task_says_what_it_is(path: Path) -> None:
    assert len(header(path).split()) >= 5


@pytest.mark.parametrize(("path", "task"), RUNS, ids=name)
def test_it_trains(path: Path, task: Path | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"--task={task}"] if task else []
    config = load(path, given)
    small = {
        "model.name": write_model(config, tmp_path / "model"),
        "model.trainable": '["*"]',  # patterns name weights of the config's own model
        "model.freeze": "[]",
        "model.peft.target_modules": "[]",
        "task.data": write_data(config.task, tmp_path / "data"),
        "task.splits.train.size": 12,
        "task.splits.validation.size": 6,
        "task.splits.test.size": 6,
        "train.steps": 3,
        "train.batch_size": 4,
        "train.full_size": 8,
        "train.evaluate_every": 2,
        "output.dir": tmp_path / "run",
    }
    overrides = [f"--{key}={value}" for key, value in small.items()]
    assert cli.main(["train", str(path), *given, *overrides]) == 0, capsys.readouterr().err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["steps"] == 3
    assert results["skipped_steps"] == 0
    assert config.task.metric in results["validation"]
    steps = trajectory.read(tmp_path / "run" / "trajectory.jsonl").steps
    if config.train.objective == "loss":  # what takes few values changes rarely on a tiny model
        assert all(step.update not in ("", trajectory.digest([Add(ZERO)])) for step in steps), (
            "every step moves the weights"
        )
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert resolved["algorithm"] == config.to_dict()["algorithm"]


def test_there_is_something_to_test() -> None:
    assert ROOT / "configs" / "quickstart.yaml" in CONFIGS
    assert ROOT / "configs" / "tasks" / "movie-sentences.yaml" in TASKS
    assert len(SHAPES) == 3
