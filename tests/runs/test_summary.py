"""The words at the end of a run, and side files that are not what the run wrote."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mezo_dist import MeZO, cli
from mezo_dist.config import reader
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.runs import training
from mezo_dist.runs.build import Run
from mezo_dist.runs.summary import summary
from mezo_dist.storage import trajectory
from mezo_dist.testing import spawn, write_tiny_config


def stub() -> Run:
    """As much of a run as `summary` reads."""
    task, output = SimpleNamespace(metric="accuracy"), SimpleNamespace(export=True)
    config = SimpleNamespace(task=task, output=output, algorithm=MeZO(), monitor=("tensorboard",))
    pretrained = SimpleNamespace(loader=("json", "JSONDecoder"))
    return cast("Run", SimpleNamespace(config=config, splits={"test": [0] * 7}, pretrained=pretrained))


GOOD = {"loss": 0.75, "accuracy": 0.5}


@pytest.mark.parametrize(
    ("before", "words"),
    [
        (GOOD, "accuracy went from 0.500 to 0.500 and the loss from 0.750 to 0.750"),
        ({"loss": None, "accuracy": 0.5}, "the loss from nan to 0.750"),
        ({}, None),
        ({"loss": 0.5}, None),
        ({"loss": "0.5", "accuracy": 0.5}, None),
        ({"loss": 10**400, "accuracy": 0.5}, None),
        ({"loss": [0.5], "accuracy": 0.5}, None),
        ([0.5], None),
        ("x", None),
    ],
)
def test_results_that_were_edited_are_left_out(tmp_path: Path, before: Any, words: str | None) -> None:
    (tmp_path / trajectory.FILE).write_text("x")
    results = {"before": before, "after": GOOD, "steps": 3, "training_s": 1.0}
    text = "\n".join(summary(stub(), tmp_path, results))
    assert ("held-out test samples" in text) is (words is not None)
    assert words is None or words in text


def test_commands_can_be_copied_into_a_shell(tmp_path: Path) -> None:
    folder = tmp_path / 'it\'s a "run"; $HOME'
    folder.mkdir()
    (folder / trajectory.FILE).write_text("x")
    *_, report, board, python, evaluate = summary(stub(), folder, {"before": {}, "after": {}})
    assert shlex.split(report) == ["mezo-dist", "report", str(folder)]
    assert shlex.split(board) == ["tensorboard", "--logdir", str(folder)]
    assert shlex.split(evaluate) == ["mezo-dist", "evaluate", str(folder)]
    code = shlex.split(python)[2]
    assert code == f"import json as t; t.JSONDecoder.from_pretrained({json.dumps(str(folder / 'model'))})"
    compile(code, "code", "exec")


def test_side_files_do_not_stop_a_resume(tmp_path: Path) -> None:
    config = str(write_tiny_config(tmp_path))
    run = tmp_path / "run"
    assert cli.main(["train", config, "--train.steps=2"]) == 0
    outcome = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({"before": {"loss": "x", "accuracy": [1]}}))
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    (run / "tensorboard").rename(tmp_path / "elsewhere")
    (run / "tensorboard").symlink_to(tmp_path / "elsewhere")
    events = sorted((tmp_path / "elsewhere").iterdir())
    assert cli.main(["train", config, "--train.steps=2", "--output.if_exists=resume"]) == 0
    assert json.loads((run / "results.json").read_text())["weights"] == outcome["weights"]
    assert sorted((tmp_path / "elsewhere").iterdir()) == events
    assert (run / "metrics.jsonl").is_file()


def train_apart(comm: Communicator, root: Path) -> None:
    """Train in a folder that other ranks do not see."""
    home = root / f"host{comm.rank}"
    home.mkdir()
    os.chdir(home)
    training.train(reader.load(root / "config.yaml", ["output.dir=run", "output.export=false", "train.steps=1"]), comm)


@pytest.mark.distributed
def test_ranks_need_not_see_the_run_folder(tmp_path: Path) -> None:
    write_tiny_config(tmp_path)
    spawn(train_apart, 2, tmp_path)
    assert (tmp_path / "host0" / "run" / "results.json").exists()
    assert list((tmp_path / "host1").iterdir()) == []
