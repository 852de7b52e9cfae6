"""The run folder: claimed by one job, tidied of what a killed one left, and not followed out of."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mezo_dist import cli
from mezo_dist.config import reader
from mezo_dist.config.schema import RunConfig
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.errors import UserError
from mezo_dist.runs import training
from mezo_dist.storage import files
from mezo_dist.storage.run_files import note, read_results, read_scores
from mezo_dist.storage.run_folder import claim_folder
from mezo_dist.testing import write_tiny_config
from tests.run_folders import results

OPTIONS = ["output.snapshot_every=2", "output.if_exists=resume"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, and the undisturbed run of it in run/."""
    root = tmp_path_factory.mktemp("folders")
    training.train(reader.load(write_tiny_config(root, steps=4), OPTIONS), Communicator())
    return root


@pytest.fixture
def config(root: Path, tmp_path: Path) -> RunConfig:
    """The same in a folder of its own, that run having died in its last step."""
    lines = (root / "run" / "trajectory.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "run").mkdir()
    steps = [line for line in lines if not line.startswith((b'{"step":3', b'{"done":4'))]
    (tmp_path / "run" / "trajectory.jsonl").write_bytes(b"".join(steps))
    return reader.load(root / "config.yaml", [*OPTIONS, f"output.dir={tmp_path / 'run'}"])


def goes_on(root: Path, config: RunConfig) -> Path:
    folder = training.train(config, Communicator())
    assert results(folder)["weights"] == results(root / "run")["weights"]
    assert (folder / "trajectory.jsonl").read_bytes() == (root / "run" / "trajectory.jsonl").read_bytes()
    return folder


BEFORE = '{"before": {"loss": %s, "accuracy": 0.5}}'
DAMAGE: dict[str, Callable[[Path], object]] = {
    "nothing there": lambda folder: None,
    "results that are a list": lambda folder: (folder / "results.json").write_text("[1]"),
    "deep results": lambda folder: (folder / "results.json").write_text('{"before": ' + "[" * 100_000),
    "scores that are texts": lambda folder: (folder / "results.json").write_text(BEFORE % '"x"'),
    "a score beyond all floats": lambda folder: (folder / "results.json").write_text(BEFORE % ("9" * 400)),
    "scores of another metric": lambda folder: (folder / "results.json").write_text('{"before": {"loss": 1.0}}'),
    "events that are no text": lambda folder: (folder / "events.jsonl").write_bytes(b"\xff\0" * 99),
    "metrics that are no text": lambda folder: (folder / "metrics.jsonl").write_bytes(b"\xff\0" * 99),
    "a damaged config": lambda folder: (folder / "config.yaml").write_bytes(b"\xff: ["),
    "a damaged lock": lambda folder: (folder / ".lock").write_bytes(b"\xff" * 999),
    "a pipe as lock": lambda folder: os.mkfifo(folder / ".lock"),
    "a pipe as results": lambda folder: os.mkfifo(folder / "results.json"),
    "a file as snapshots": lambda folder: (folder / "snapshots").write_text("x"),
    "a file as model": lambda folder: (folder / "model").write_text("x"),
}
for _name in ("results.json", "events.jsonl", "metrics.jsonl", "config.yaml", ".lock", ".results.json.part"):
    DAMAGE[f"a folder called {_name}"] = lambda folder, name=_name: (folder / name / "inner").mkdir(parents=True)  # type: ignore[misc]


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.timeout(300)
def test_no_damage_beside_the_trajectory_stops_a_run(root: Path, config: RunConfig, what: str) -> None:
    DAMAGE[what](Path(config.output.dir))
    folder = goes_on(root, config)
    assert read_scores(folder, "after", ["loss", "accuracy"])
    last = (folder / "events.jsonl").read_bytes().splitlines()[-1]
    assert json.loads(last)["event"] == "finished"


LINKS = ["results.json", "events.jsonl", "metrics.jsonl", ".lock", ".results.json.part"]
FOLDER_LINKS = ["snapshots", "tensorboard", "model", ".model.part", "snapshots/.step-00000004.part"]


def test_links_in_a_run_folder_are_not_written_through(root: Path, config: RunConfig, tmp_path: Path) -> None:
    folder, outside = Path(config.output.dir), tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("precious")
    (outside / "folder").mkdir()
    (outside / "folder" / "file").write_text("precious")
    (folder / "config.yaml").symlink_to(outside / "gone")
    for name in LINKS:
        (folder / name).symlink_to(outside / "file")
    for name in FOLDER_LINKS[:-1]:
        (folder / name).symlink_to(outside / "folder")
    goes_on(root, config)
    assert sorted(path.name for path in outside.rglob("*")) == ["file", "file", "folder"]
    assert {path.read_text() for path in outside.rglob("file")} == {"precious"}
    assert not any((folder / name).is_symlink() for name in [*LINKS, *FOLDER_LINKS])
    (folder / "trajectory.jsonl").rename(outside / "trajectory.jsonl")
    (folder / "trajectory.jsonl").symlink_to(outside / "trajectory.jsonl")
    with pytest.raises(UserError, match="is a link or a folder, not a file"):
        training.train(config, Communicator())


@pytest.mark.timeout(300)
def test_a_pipe_as_trajectory(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(config.output.dir) / "trajectory.jsonl"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="is a link or a folder, not a file"):
        training.train(config, Communicator())
    assert cli.main(["evaluate", config.output.dir]) == 2


def test_what_a_kill_left_is_swept(root: Path, config: RunConfig) -> None:
    folder = Path(config.output.dir)
    left = [".model.part", "snapshots/.step-00000002.part", "snapshots/.step-00000001.old"]
    for name in left:
        (folder / name).mkdir(parents=True)
        (folder / name / "rank-00000.safetensors").write_bytes(b"x")
    (folder / ".results.json.part").write_text("{")
    (folder / "mine.part").write_text("not ours")
    with claim_folder(config, Communicator()):
        assert sorted(path.name for path in folder.iterdir()) == [".lock", "mine.part", "snapshots", "trajectory.jsonl"]
        assert list((folder / "snapshots").iterdir()) == []


def test_new_started_twice_at_once_takes_the_next_folder(root: Path, tmp_path: Path) -> None:
    config = reader.load(root / "config.yaml", ["output.if_exists=new", f"output.dir={tmp_path / 'run'}"])
    with claim_folder(config, Communicator()) as first, claim_folder(config, Communicator()) as second:
        assert (first.folder.name, second.folder.name) == ("run", "run-2")
        (first.folder / "trajectory.jsonl").write_text("x")
    with claim_folder(config, Communicator()) as third:
        assert third.folder.name == "run-2", "no run was begun there"


def test_a_torn_event_is_cut(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_bytes(b'{"event": "a"}\n{"ev')
    note(tmp_path, "b", 1)
    assert [json.loads(line)["event"] for line in (tmp_path / "events.jsonl").read_text().splitlines()] == ["a", "b"]


def test_results_that_are_not_there(tmp_path: Path) -> None:
    assert read_results(tmp_path) == {}
    assert read_scores(tmp_path, "before", []) == {}


def test_a_file_is_replaced_by_a_new_one(tmp_path: Path) -> None:
    """Not even what another link to it leads to is changed."""
    (tmp_path / "a").write_bytes(b"old")
    os.link(tmp_path / "a", tmp_path / "b")
    (tmp_path / ".a.part").symlink_to(tmp_path / "b")
    files.replace_file(tmp_path / "a", b"new")
    assert ((tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes()) == (b"new", b"old")
    assert not (tmp_path / ".a.part").is_symlink()


def test_a_run_that_is_refused_leaves_nothing(root: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for place in ("a/b/run", "mine"):
        options = ["model.trainable=[nope]", f"output.dir={tmp_path / place}"]
        with pytest.raises(UserError, match="matches no weight"):
            training.train(reader.load(root / "config.yaml", options), Communicator())
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"], "a folder that was there before stays"


def test_a_lock_that_was_removed_meanwhile_is_taken_anew(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that is refused removes its lock, which another job may have opened just before."""
    config = reader.load(root / "config.yaml", [f"output.dir={tmp_path / 'run'}"])
    original, calls = fcntl.flock, list[int]()

    def flock(handle: int, operation: int) -> None:
        if not calls:
            (tmp_path / "run" / ".lock").unlink()
        calls.append(handle)
        original(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        claim_folder(config, Communicator()),
        pytest.raises(UserError, match="is in use by another job"),
        claim_folder(config, Communicator()),
    ):
        pass
