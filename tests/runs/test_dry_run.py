"""`mezo-dist train --dry-run`: what the run would do and take, with nothing left behind."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from mezo_dist import cli
from mezo_dist.config import reader
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.errors import UserError
from mezo_dist.monitoring import curve_writers
from mezo_dist.runs import dry_run, training
from mezo_dist.runs.build import build_run
from mezo_dist.runs.dry_run import Measured, Pace, _evaluating, _whole
from mezo_dist.storage.foreseen import look_at_folder
from mezo_dist.storage.run_files import LOCK
from mezo_dist.storage.run_folder import claim_folder
from mezo_dist.testing import spawn, write_tiny_config


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


def test_what_it_says_and_what_it_leaves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny_config(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    assert cli.main(["train", str(path), "--train.steps", "100", "--dry-run", "--train.evaluate_every=20"]) == 0
    assert contents(tmp_path) == before
    output = capsys.readouterr().out
    assert "step 3/3" in output
    assert re.search(r"anchor step +\d.* s.*; 50 to take", output)
    assert re.search(r"inner step +\d.* s.*; 50 to take", output)
    assert "(validation 6 x 20 samples, test 2 x 20 samples)" in output
    assert re.search(r"all +about \d", output)
    assert re.search(r"measured +\d+\.\d\d GiB", output)
    assert re.search(r"planned +\d+\.\d\d GiB when ", output)


def on_two(comm: Communicator, path: str) -> str:
    config = reader.load(path, ["layout.name=fsdp", "train.calibrate=true"])
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        dry_run.try_out(config, comm)
    return output.getvalue()


@pytest.mark.distributed
def test_two_processes(tmp_path: Path) -> None:
    path = write_tiny_config(tmp_path, algorithm="mezo")
    before = contents(tmp_path)
    main, other = spawn(on_two, 2, str(path))
    assert contents(tmp_path) == before
    assert other == ""
    assert "fsdp, 2 process(es)" in main
    assert re.search(r"measured +\d+\.\d\d, \d+\.\d\d GiB", main)
    assert "offsets 2 x 30" in main


def test_it_fails_as_the_run_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny_config(tmp_path, algorithm="mezo")
    training.train(reader.load(path, ["output.export=false"]), Communicator(), quiet=True)
    before = contents(tmp_path)
    faults = []
    for train in (dry_run.try_out, training.train):
        with pytest.raises(UserError) as caught:
            train(reader.load(path, ["output.if_exists=error"]), Communicator())
        faults.append(str(caught.value))
    assert faults[0] == faults[1]
    assert "already holds a run" in faults[0]
    monkeypatch.setitem(curve_writers.PACKAGES, "wandb", "no_such_package")
    with pytest.raises(UserError, match=r"monitor: wandb is not installed"):
        dry_run.try_out(reader.load(path, ["output.if_exists=resume", "monitor=[wandb]"]), Communicator())
    with pytest.raises(UserError, match=r"settings differ from those of the trajectory: seed"):
        dry_run.try_out(reader.load(path, ["output.if_exists=resume", "seed=3"]), Communicator())
    dry_run.try_out(reader.load(path, ["output.if_exists=resume"]), Communicator())
    output = capsys.readouterr().out
    assert "holds 6 of 6 steps; the run goes on after them" in output
    assert "test 1 x 20 samples" in output  # no evaluation before training
    assert contents(tmp_path) == before


def test_the_folder_that_would_be_used(tmp_path: Path) -> None:
    path, comm = write_tiny_config(tmp_path), Communicator()
    new, error, replace = (reader.load(path, [f"output.if_exists={rule}"]) for rule in ("new", "error", "replace"))
    folder = Path(new.output.dir)
    assert look_at_folder(new, comm).folder == folder
    with claim_folder(new, comm):
        for config in (error, replace):
            with pytest.raises(UserError, match=r"is in use by another job \(process \d+"):
                look_at_folder(config, comm)
        assert look_at_folder(new, comm).folder == folder.with_name("run-2")
    assert look_at_folder(error, comm).folder == folder
    folder.mkdir()  # what was claimed for nothing is gone
    (folder / LOCK).touch()
    assert look_at_folder(error, comm).folder == folder  # the lock file alone is no run
    (folder / "trajectory.jsonl").write_text("damaged")
    assert look_at_folder(replace, comm).log is None
    assert look_at_folder(new, comm).folder == folder.with_name("run-2")
    assert not folder.with_name("run-2").exists()
    (tmp_path / "file").touch()
    for look in (look_at_folder, lambda config, comm: claim_folder(config, comm).__enter__()):
        with pytest.raises(UserError, match=r"cannot be made or written to \(Not a directory\)"):
            look(reader.load(path, [f"output.dir={tmp_path / 'file' / 'run'}"]), comm)


def test_times_are_added_up(tmp_path: Path) -> None:
    """10 s to start, 2 s more for the first step; a first epoch of 5 steps of 3 s, 15 of 1 s; 3 validations and 2
    tests, each 20 s at first and 10 s later."""
    config = reader.load(write_tiny_config(tmp_path, algorithm="mezo"), ["train.steps=20", "train.evaluate_every=10"])
    run = build_run(config, Communicator())
    paces = {name: Pace(1.0, 0.5) for name in ("validation", "test")}
    measured = Measured(10.0, {"minibatch": Pace(3.0, 1.0)}, 2.0, paces)
    assert _evaluating(run, measured, 0)[0] == 70.0
    rows = dict(_whole(run, measured, 0))
    assert rows["steps"] == "32s"
    assert rows["all"].startswith("about 1m52s on these 1 process(es)")
    assert dict(_whole(run, measured, 12))["steps"] == "10s"
