"""Bad input, through the command line: one message that names the setting and the fix, exit status 2, no traceback.

Most run in this process, as that proves the same; the last ones start processes, with torchrun and without.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mezo_dist import cli
from mezo_dist.errors import UserError
from mezo_dist.testing import write_tiny_config, write_tiny_model
from tests import forked_ranks
from tests.faults.jobs import start
from tests.forked import Program

ROOT = Path(__file__).resolve().parents[2]
DATA_ROWS = 96
TRAIN_ROWS = 30  # of the config of `write_tiny_config`


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, a model and data that work."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_config(folder, steps=2)
    write_tiny_model(folder / "bert", "bert")
    return folder


@pytest.fixture
def fault(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the tiny config with overrides that do not work; returns the message."""

    def fault(*overrides: str, command: str = "train") -> str:
        run = (
            ["train", str(tiny / "config.yaml"), f"--output.dir={tmp_path / 'run'}"]
            if command == "train"
            else [command]
        )
        assert cli.main([*run, *overrides]) == UserError.exit_status
        errors = capsys.readouterr().err
        assert "Traceback" not in errors
        messages = re.findall(r"^mezo-dist: error: (.*)", errors, re.MULTILINE | re.DOTALL)
        assert len(messages) == 1
        assert not (tmp_path / "run" / "trajectory.jsonl").exists(), "it is found before the first step"
        return str(messages[0]).replace(f"{tmp_path}/", "").strip()

    return fault


def test_the_tiny_config_works(tiny: Path, tmp_path: Path) -> None:
    """Else the tests below could fail for another reason."""
    assert cli.main(["train", str(tiny / "config.yaml"), f"--output.dir={tmp_path}"]) == 0
    assert json.loads((tmp_path / "results.json").read_text())["steps"] == 2


# Data


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_missing_data_file(fault: Callable[..., str]) -> None:
    message = fault("--task.data=nowhere.jsonl")
    assert message == f"task.data: file {Path.cwd() / 'nowhere.jsonl'} does not exist"


def test_an_empty_data_file(fault: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    assert fault(f"--task.data={tmp_path / 'empty.jsonl'}") == "task.data: empty.jsonl is empty"


def test_a_label_that_is_not_in_the_list(fault: Callable[..., str], tmp_path: Path) -> None:
    rows = [{"text": "a film", "label": number % 3} for number in range(DATA_ROWS)]
    message = fault(f"--task.data={write_rows(tmp_path / 'data.jsonl', rows)}")
    assert re.match(r"train sample \d+, \{'label': 2, 'text': 'a film'\}: task\.labels: the label is 2, ", message)
    assert message.endswith(
        "the task knows ['0', '1']; add it, or leave such rows out with task.where: {drop: {label: [2]}}"
    )


def test_a_field_that_is_not_there(fault: Callable[..., str]) -> None:
    assert "task.label: there is no field 'stars', only ['label', 'text']" in fault("--task.label=stars")
    message = fault("--task.prompt={{ review }} It was {{ answer }}")
    assert "'review' is undefined (the fields are ['label', 'text'])" in message


def test_a_split_that_is_not_there_or_has_nothing_left(fault: Callable[..., str]) -> None:
    message = fault("--task.splits.test.source=test")
    assert message.startswith("task.splits.test.source: ")
    assert message.endswith("has no split 'test', only ['train']")
    message = fault("--task.splits.train.size=null")
    assert message.startswith("task.splits.validation.size: 20 samples wanted, but ")
    assert message.endswith("has 96, of which 96 are taken by the splits before; make a split smaller")


def test_a_batch_larger_than_the_data(fault: Callable[..., str]) -> None:
    message = fault(f"--train.batch_size={TRAIN_ROWS + 1}")
    assert message == f"train.batch_size 31 is larger than the training split ({TRAIN_ROWS} samples)"


def test_a_full_batch_larger_than_the_data(fault: Callable[..., str]) -> None:
    message = fault(f"--train.full_size={TRAIN_ROWS + 1}")
    assert message == f"train.full_size 31 is larger than the training split ({TRAIN_ROWS} samples)"


def test_a_prompt_longer_than_the_window(fault: Callable[..., str]) -> None:
    message = fault("--train.max_tokens=2")
    assert "task.prompt: it needs 3 tokens even without the text of ['text'] (task.truncate), but " in message
    assert message.endswith("train.max_tokens, or else the model's window, is 2")


def test_a_label_word_of_several_tokens(fault: Callable[..., str]) -> None:
    message = fault("--task.labels=[{value: 0, word: terrible}, {value: 1, word: magnificent}]")
    assert "task.labels: 'magnificent' is not one token after this prompt but " in message
    assert message.endswith("; choose a word that is one")


# Models


def test_a_model_folder_that_is_not_there(fault: Callable[..., str]) -> None:
    message = fault("--model.name=./nowhere")
    assert message == f"model.name: folder {Path.cwd() / 'nowhere'} does not exist"


def test_an_unknown_hub_name_without_network(fault: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # as HF_HUB_OFFLINE=1 does at the start
    message = fault("--model.name=nobody/never-published")
    assert message.startswith("model.name: 'nobody/never-published' could not be loaded from the hub (no folder has ")
    assert "Check your internet connection" in message


def test_a_masked_model_whose_tokenizer_has_no_mask(fault: Callable[..., str], tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny / "bert", tmp_path / "bert")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["mask_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    message = fault(f"--model.name={folder}")
    assert message == "model.kind: the tokenizer of 'bert' has no mask token, which kind: masked needs"


def test_bad_data_is_found_before_a_model_is_looked_for(fault: Callable[..., str]) -> None:
    assert fault("--model.name=./nowhere", "--task.data=nowhere.jsonl").startswith("task.data: ")


# Folders


def test_a_folder_with_a_run(tiny: Path, tmp_path: Path, fault: Callable[..., str]) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "trajectory.jsonl").touch()
    message = fault(f"--output.dir={folder}")
    assert message.startswith(
        "output.dir: old already holds a run; go on with it (--output.if_exists=resume), keep it "
    )
    assert list(folder.iterdir()) == [folder / "trajectory.jsonl"]


def test_a_folder_that_cannot_be_made(fault: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = fault(f"--output.dir={tmp_path / 'file' / 'run'}")
    assert message == "output.dir: file/run cannot be made or written to (Not a directory); name another (--output.dir)"


@pytest.mark.parametrize("command", ["evaluate", "export", "replay"])
def test_commands_on_a_folder_without_a_run(fault: Callable[..., str], tmp_path: Path, command: str) -> None:
    folders = [str(tmp_path / "nothing")] + ([str(tmp_path / "exported")] if command == "export" else [])
    assert fault(*folders, command=command).startswith("nothing/trajectory.jsonl does not exist: not a run folder, or ")


def test_an_export_over_something(fault: Callable[..., str], tmp_path: Path) -> None:
    assert fault("run", str(tmp_path), command="export").endswith("exists; name a folder that does not")


# Losses that are not finite


def test_a_run_without_finite_losses_gives_up(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["--algorithm.eps=1e38", "--train.steps=9", "--train.max_skipped=3"]
    status = cli.main(["train", str(tiny / "config.yaml"), f"--output.dir={tmp_path / 'run'}", *overrides])
    output = capsys.readouterr()
    assert status == UserError.exit_status
    assert "error: train.max_skipped: 3 steps in a row had no finite loss, the last one step 3; the " in output.err
    assert "learning rate or eps is probably too large" in output.err
    for number in (1, 2, 3):
        assert f"step {number}/9 skipped: a loss is not finite ({number} in a row)\n" in output.out
    lines = (tmp_path / "run" / "trajectory.jsonl").read_text().splitlines()[1:]
    assert [json.loads(line)["skipped"] for line in lines] == ["a loss is not finite"] * 3


# Several processes


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def ours(output: str) -> list[str]:
    """Lines of a traceback that come from our code."""
    return re.findall(rf'File "{ROOT}/mezo_dist/.*', output)


@pytest.mark.distributed
def test_under_torchrun_rank_0_finds_the_fault_and_all_ranks_leave(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "trajectory.jsonl").touch()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "mezo_dist", "train", str(tiny / "config.yaml"), f"--output.dir={tmp_path}"]
    with forked_ranks.environment() as ranks, Program(command, environment={**environment(), **ranks}) as program:
        status, _, errors = program.finish()
    assert status != 0
    assert re.search(r"^mezo-dist \(rank \d\): error: output\.dir: .* already holds a run; go on ", errors, re.M)
    codes = set(re.findall(r"exitcode *: (-?\d+)", errors))
    assert "2" in codes
    assert codes <= {"2", "75", "-15"}  # of a rank that misses the other, and of one that torchrun had to stop
    assert not ours(errors)
    assert list(tmp_path.iterdir()) == [tmp_path / "trajectory.jsonl"]


@pytest.mark.distributed
def test_a_fault_on_one_rank_ends_all(tiny: Path, tmp_path: Path) -> None:
    """Without a launcher that would stop them: the data is missing on rank 1 only, and rank 0 says so, too."""
    command = ["train", str(tiny / "config.yaml"), f"--output.dir={tmp_path / 'run'}"]
    with start(tmp_path, 2, command, more={1: ["--task.data=nowhere.jsonl"]}) as job:
        codes, errors = job.wait(), [path.read_text() for path in job.errors]
    assert codes == [2, 2], errors
    for rank, said in enumerate(errors):
        why = f"rank(s) [1]: task.data: file {Path.cwd() / 'nowhere.jsonl'} does not exist"
        assert f"mezo-dist (rank {rank}): error: {why}" in said
    assert "Traceback" not in "".join(errors)
