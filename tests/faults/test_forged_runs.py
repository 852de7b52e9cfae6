"""Configs and run folders of other people: nothing in them is imported, and settings that were edited are refused."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mezo_dist import cli
from mezo_dist.config import reader
from mezo_dist.config.schema import digest_of
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.runs import training
from mezo_dist.storage import trajectory
from mezo_dist.testing import write_tiny_config

EVIL = """\
import pathlib
pathlib.Path(__file__).with_suffix(".ran").touch()
class Label:
    def __init__(self, **_):
        pathlib.Path(__file__).with_suffix(".ran").touch()
"""
CLASSES = ["evil.Label", "run.evil.Label"]
PLACES = [
    "task",
    "task.name",
    "task.labels",
    "task.labels.0",
    "task.labels.0.word",
    "task.splits",
    "task.splits.train",
    "task.plain",
    "algorithm",
    "algorithm.name",
    "algorithm.annealing",
    "model",
    "model.name",
    "model.peft",
    "train",
    "train.steps",
    "output",
    "evil",
]
TEXT = ["model.name", "task.name"]
"""Whatever stands on the command line for them is text."""
QUICK = ["--output.test=false", "--output.export=false"]
COMMANDS = {
    "evaluate": ["evaluate", "run"],
    "export": ["export", "run", "exported"],
    "replay": ["replay", "run"],
    "report": ["report", "run"],
    "resume": ["train", "config.yaml", "--output.dir=run", "--output.if_exists=resume", *QUICK],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config and a run of it."""
    root = tmp_path_factory.mktemp("trained")
    path = write_tiny_config(root, steps=2)
    training.train(reader.load(path, QUICK), Communicator())
    return root


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, importable as under `python -m`: a config, a run, and a module to leave alone in both."""
    shutil.copytree(trained / "run", tmp_path / "run")
    shutil.copy(trained / "config.yaml", tmp_path / "config.yaml")
    for folder in (tmp_path, tmp_path / "run"):
        (folder / "evil.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("evil", "run", "run.evil"):
        sys.modules.pop(name, None)


def forge(data: dict[str, Any], name: str, kind: str) -> dict[str, Any]:
    """``data`` with a mapping that names a class in the place ``name``."""
    forged = json.loads(json.dumps(data))
    *parents, last = name.split(".")
    at: Any = forged
    for part in parents:
        at = at[int(part)] if isinstance(at, list) else at.setdefault(part, {})
    mapping = {"class_path": kind, "init_args": {}}
    at[int(last) if isinstance(at, list) else last] = [mapping, mapping] if name.endswith("labels") else mapping
    return forged


def write_header(folder: Path, config: dict[str, Any], **more: Any) -> None:
    """Put settings into the header of a run, with a right check; the lines below it stay."""
    path = folder / trajectory.FILE
    head, *lines = path.read_bytes().splitlines(keepends=True)
    content = json.loads(head)
    del content["check"]
    new, _ = trajectory.to_line({**content, "config": config, **more}, "")
    path.write_bytes(b"".join([new, *lines]))


def assert_unimported(folder: Path) -> None:
    assert not list(folder.rglob("*.ran"))
    assert not {"evil", "run.evil"} & set(sys.modules)


@pytest.mark.parametrize("kind", CLASSES)
def test_the_planted_module_would_show_itself(place: Path, kind: str) -> None:
    """Else the tests below could not fail."""
    importlib.import_module(kind.rpartition(".")[0])
    with pytest.raises(AssertionError):
        assert_unimported(place)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", PLACES)
def test_no_config_names_anything_to_import(
    place: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    forged = forge(yaml.safe_load((place / "config.yaml").read_text()), name, kind)
    (place / "forged.yaml").write_text(yaml.safe_dump(forged))
    assert cli.main(["train", "forged.yaml", "--output.dir=new"]) == 2
    if name.startswith("task."):
        (place / "task.yaml").write_text(yaml.safe_dump(forged["task"]))
        assert cli.main(["train", "config.yaml", "--task=task.yaml", "--output.dir=new"]) == 2
    value = json.dumps({"class_path": kind, "init_args": {}})
    for text in (value, f"[{value}, {value}]", kind, f"!!python/name:{kind}") if name not in TEXT else ():
        assert cli.main(["train", "config.yaml", f"--{name}={text}", "--output.dir=new"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert_unimported(place)


@pytest.mark.parametrize(
    "tag", ["python/name:evil.Label", "python/object:evil.Label", "python/object/apply:evil.Label"]
)
def test_no_tag_names_anything_to_import(place: Path, tag: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (place / "config.yaml").read_text()
    (place / "forged.yaml").write_text(f"{text}\nseed: !!{tag} {{}}\n")
    assert cli.main(["train", "forged.yaml", "--output.dir=new"]) == 2
    assert f"tags (tag:yaml.org,2002:{tag}) are not taken" in capsys.readouterr().err
    assert_unimported(place)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_header_names_anything_to_import(place: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = trajectory.read(place / "run" / trajectory.FILE).header.config
    head = (place / "run" / trajectory.FILE).read_bytes().splitlines(keepends=True)[0]
    for kind in CLASSES:
        for name in (
            PLACES if command not in ("report", "resume") else ["task.labels", "algorithm"]
        ):  # figures and models take time
            (place / "run" / trajectory.FILE).write_bytes(head)  # no steps: theirs would be chained to other settings
            forged = forge(config, name, kind)
            write_header(place / "run", forged, config_digest=digest_of(forged))
            status = cli.main(COMMANDS[command])
            errors = capsys.readouterr().err
            assert status == 2 or command == "report", (name, errors)  # a report shows whatever a header says
            assert "Traceback" not in errors
            assert_unimported(place)


EDITS = {"algorithm": {"lr": 0.5}, "task": {"label": "other"}, "model": {"name": "elsewhere"}, "train": {"steps": 9}}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("section", EDITS)
def test_settings_in_a_header_that_were_edited_are_refused(
    place: Path, command: str, section: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = trajectory.read(place / "run" / trajectory.FILE).header.config
    config[section] |= EDITS[section]
    write_header(place / "run", config)  # its digest, to which the steps are chained, stays
    assert cli.main(COMMANDS[command]) == 2
    message = "trajectory.jsonl, line 1 (offset 0): the header's settings do not fit their digest"
    assert message in capsys.readouterr().err
