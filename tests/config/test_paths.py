"""Relative paths start at the folder of the file that they are written in; on the command line at the current one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from mezo_dist import cli
from mezo_dist.config import reader
from mezo_dist.config.paths import located
from mezo_dist.config.schema import RunConfig
from mezo_dist.errors import UserError
from mezo_dist.testing import write_tiny_config


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """configs/run.yaml and tasks/task.yaml, which name models/tiny and data/data.jsonl by relative paths."""
    root = tmp_path / "project"
    config = yaml.safe_load(write_tiny_config(root / "made", steps=2).read_text())
    for folder in ("configs", "tasks", "models", "data"):
        (root / folder).mkdir()
    (root / "made" / "model").rename(root / "models" / "tiny")
    (root / "made" / "data.jsonl").rename(root / "data" / "data.jsonl")
    task = config["task"] | {"data": "../data/data.jsonl"}
    (root / "tasks" / "task.yaml").write_text(yaml.safe_dump(task))
    config |= {"task": "../tasks/task.yaml", "model": {"name": "../models/tiny"}, "output": {"dir": "run"}}
    (root / "configs" / "run.yaml").write_text(yaml.safe_dump(config))
    return root


def paths(config: RunConfig) -> tuple[str, str]:
    here = config.located()
    return here.model.name, here.task.data


def test_paths_in_files_and_on_the_command_line(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file, wanted = project / "configs" / "run.yaml", (str(project / "models/tiny"), str(project / "data/data.jsonl"))
    config = reader.load(file)
    assert paths(config) == wanted
    saved = tmp_path / "saved.yaml"
    saved.write_text(yaml.safe_dump(config.to_dict()))
    monkeypatch.chdir("/")
    assert paths(config) == paths(reader.load(saved)) == paths(reader.from_dict(config.to_dict(), "header")) == wanted
    monkeypatch.chdir(project / "data")
    override = reader.load(saved, ["model.name=../models/tiny", "task.data=data.jsonl"])
    assert paths(override) == wanted
    assert paths(reader.load(file, ["task=../tasks/task.yaml"])) == wanted
    monkeypatch.chdir(tmp_path)
    project.rename(tmp_path / "moved")
    moved = reader.load(tmp_path / "moved" / "configs" / "run.yaml")
    assert paths(moved)[1] == str(tmp_path / "moved/data/data.jsonl")
    assert moved.digest() == config.digest()  # so a run goes on wherever its files are now
    assert json.loads(json.dumps(config.to_dict()))["model"]["name"] == "../models/tiny"


def test_a_run_works_from_anywhere(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    assert cli.main(["train", "configs/run.yaml", "--output.export=false"]) == 0
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", str(project / "run")]) == 0
    options = ["--output.if_exists=resume", f"--output.dir={project / 'run'}", "--output.export=false"]
    assert cli.main(["train", str(project / "configs/run.yaml"), *options]) == 0
    shutil.copytree(project, tmp_path / "copy")
    shutil.rmtree(project)
    monkeypatch.chdir(tmp_path / "copy" / "configs")  # the folder is gone: as if written on the command line here
    assert cli.main(["evaluate", "../run", "--split=test"]) == 0


def test_what_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "files" / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "other").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    origin = str(tmp_path / "files")
    for name, wanted in {
        "models/mine": f"{origin}/models/mine",
        "random:models/mine": f"random:{origin}/models/mine",
        "./nothing": f"{origin}/nothing",
        "nothing.jsonl": f"{origin}/nothing.jsonl",
        "facebook/opt-125m": "facebook/opt-125m",
        "demo:movie-sentences": "demo:movie-sentences",
        "/there": "/there",
        "~/there": "~/there",
    }.items():
        assert located(name, origin, "model.name") == wanted
    with pytest.raises(UserError, match=r"^model.name: models/other starts at .*, write \.\./models/other$"):
        located("models/other", origin, "model.name")
    assert located("models/other", None, "model.name") == str(tmp_path / "models" / "other")
