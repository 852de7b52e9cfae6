"""A run is not gone on with by mistake: other settings, a changed trajectory or base model, a folder that is gone."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mezo_dist import cli
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.errors import UserError
from mezo_dist.runs import recorder, training
from mezo_dist.storage import trajectory
from mezo_dist.storage.trajectory import Header, Step
from tests.cases import CASES
from tests.run_folders import loaded_run, results
from tests.runs.cut_short import STEPS, killed, load, train_undisturbed


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run, in mezo/run."""
    root = tmp_path_factory.mktemp("resume")
    train_undisturbed(root, ["mezo"])
    return root


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["algorithm.lr=2e-3"], ["algorithm.lr (0.001 there, 0.002 here)"]),
        (["algorithm.lr=auto"], ["algorithm.lr (0.001 there, auto here)"]),
        (["seed=5", "train.batch_size=4"], ["seed (0 there, 5 here)", "train.batch_size (5 there, 4 here)"]),
        (
            ["task.splits.seed=1", "law=rademacher"],
            ["law (gaussian there, rademacher here)", "task.splits.seed (0 there, 1 here)"],
        ),
    ],
)
def test_a_resume_with_other_settings_names_them(
    root: Path, tmp_path: Path, options: list[str], named: list[str]
) -> None:
    folder = killed(root, "mezo", 2, tmp_path / "run")
    config = load(root, "mezo", f"output.dir={folder}", "output.if_exists=resume", *options)
    message = f"settings differ from those of the trajectory: {', '.join(named)}; put back what they were"
    with pytest.raises(UserError, match=re.escape(message)):
        training.train(config, Communicator())


def rewritten(folder: Path, change: Callable[[int, dict[str, Any]], None]) -> Path:
    """The run's trajectory with lines changed by ``change(line number, content)``, their checks right again."""
    path, check, lines = folder / "trajectory.jsonl", "", []
    for number, line in enumerate(path.read_bytes().splitlines()):
        content = json.loads(line)
        del content["check"]
        change(number, content)
        new, line_check = trajectory.to_line(content, check)
        check = check if "done" in content else line_check
        lines.append(new)
        if number == 0:
            check = Header(**{key: value for key, value in content.items() if key != "format"}).identity
    path.write_bytes(b"".join(lines))
    return path


def test_another_base_model_under_the_same_name_is_noticed(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "mezo", tmp_path / "mezo")

    def change(number: int, content: dict[str, Any]) -> None:
        if number == 0:
            content["base_fingerprint"] = "f" * 16

    rewritten(tmp_path / "mezo" / "run", change)
    with pytest.raises(UserError, match="was made from another base model"):
        loaded_run(tmp_path / "mezo" / "run")


def test_losses_that_do_not_give_the_logged_update_are_noticed(root: Path, tmp_path: Path) -> None:
    folder = killed(root, "mezo", 3, tmp_path / "run", b"")

    def change(number: int, content: dict[str, Any]) -> None:
        if number == 2:
            content["loss"][0]["mean"][0] += 0.125

    rewritten(folder, change)
    with pytest.raises(UserError, match="step 1 is not what this version of the algorithm makes of its losses"):
        training.train(load(root, "mezo", f"output.dir={folder}", "output.if_exists=resume"), Communicator())


def test_weights_that_are_not_what_they_were_are_noticed(root: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(root / "mezo" / "run", tmp_path / "run"))

    def change(number: int, content: dict[str, Any]) -> None:
        if "done" in content:
            content["weights"] = "0" * 16

    rewritten(folder, change)
    with pytest.raises(
        UserError, match=f"after step {STEPS} the weights have the fingerprint .*, but had 0000000000000000"
    ):
        loaded_run(folder)


def test_a_run_folder_that_is_renamed_while_the_run_goes_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, real, count = tmp_path / "run", recorder.RunRecorder.append, [0]

    def append(self: Any, step: Step) -> None:
        count[0] += 1
        if count[0] == 4:
            folder.rename(tmp_path / "aside")
        real(self, step)

    arguments = ["train", str(root / "mezo" / "config.yaml"), f"--output.dir={folder}", "--output.if_exists=resume"]
    arguments += [f"--{option}" for option in CASES["mezo"].options]
    with monkeypatch.context() as patch:
        patch.setattr(recorder.RunRecorder, "append", append)
        assert cli.main(arguments) == 2
    assert "was removed or renamed while the run went on" in capsys.readouterr().err
    assert not folder.exists()
    (tmp_path / "aside").rename(folder)
    assert cli.main(arguments) == 0
    assert results(folder) == results(root / "mezo" / "run")


@pytest.mark.parametrize(
    ("number", "is_there", "remedy"),
    [
        (errno.EFBIG, True, "make room"),
        (errno.ENOENT, False, "put it back where it was"),
        (errno.ENOENT, True, None),
        (errno.EPERM, True, None),
    ],
)
def test_errors_of_the_disk_are_explained(tmp_path: Path, number: int, is_there: bool, remedy: str | None) -> None:
    folder = tmp_path if is_there else tmp_path / "gone"
    expected = UserError if remedy else OSError
    with pytest.raises(expected, match=remedy), training._disk_errors_explained(folder):
        raise OSError(number, os.strerror(number))


def test_force_new_moves_the_old_run_aside(root: Path, tmp_path: Path) -> None:
    folder = killed(root, "mezo", 2, tmp_path / "run")
    train = ["train", str(root / "mezo" / "config.yaml"), f"--output.dir={folder}", "--train.steps=1", "--force-new"]
    for aside in ("run.old", "run.old-2"):
        before = (folder / "trajectory.jsonl").read_bytes()
        assert cli.main([*train, "--output.test=false", "--output.export=false"]) == 0
        assert (tmp_path / aside / "trajectory.jsonl").read_bytes() == before
        assert len(trajectory.read(folder / "trajectory.jsonl").steps) == 1
