"""Damage to what a run left behind, each really done: to snapshots, and to the model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mezo_dist import cli
from mezo_dist.config import reader
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.runs import training
from mezo_dist.storage import safetensors_io, snapshots
from mezo_dist.testing import write_tiny_config
from tests.faults.jobs import arguments
from tests.faults.outcomes import finish, weights
from tests.run_folders import loaded_run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def unfinished(root: Path, tmp_path: Path, steps: int = 10) -> Path:
    """The undisturbed run as it was after so many steps, with the snapshots of steps 4 and 8."""
    folder = Path(shutil.copytree(root / "undisturbed", tmp_path / "run"))
    lines = (folder / "trajectory.jsonl").read_bytes().splitlines(keepends=True)
    last = next(i for i, line in enumerate(lines) if line.startswith(b'{"step":%d,' % (steps - 1)))
    (folder / "trajectory.jsonl").write_bytes(b"".join(lines[: last + 1]))
    assert [path.name for path in snapshots.snapshots(folder / "snapshots")] == ["step-00000004", "step-00000008"]
    return folder


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 16
    path.write_bytes(data)


def forge(snapshot: Path, *, anchor: bool = False) -> None:
    """One bit of a weight becomes another, and the index says that this is right."""
    path = snapshot / "rank-00000.safetensors"
    names = [name for name in safetensors_io.read_header(path) if name.startswith("anchor:") == anchor]
    data = bytearray(path.read_bytes())
    data[safetensors_io.read_header(path)[names[0]].start + 1] ^= 16
    path.write_bytes(data)
    edit(snapshot, files={path.name: safetensors_io.sha256(path)})


def forge_all(folder: Path) -> None:
    for snapshot in snapshots.snapshots(folder):
        forge(snapshot)


def edit(snapshot: Path, **changes: object) -> None:
    """Change the index."""
    index = snapshot / "snapshot.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))


def rename(snapshot: Path, step: int) -> None:
    """The snapshot of step 4 takes the place of this one, which it calls step ``step``."""
    shutil.rmtree(snapshot)
    shutil.copytree(snapshot.with_name("step-00000004"), snapshot)
    edit(snapshot, step=step)


DAMAGE: dict[str, tuple[Callable[[Path], object], int]] = {
    "nothing": (lambda snapshot: None, 8),
    "a bit flipped": (lambda snapshot: flip(snapshot / "rank-00000.safetensors"), 4),
    "truncated": (lambda snapshot: os.truncate(snapshot / "rank-00000.safetensors", 5000), 4),
    "data deleted": (lambda snapshot: (snapshot / "rank-00000.safetensors").unlink(), 4),
    "index deleted": (lambda snapshot: (snapshot / "snapshot.json").unlink(), 4),
    "index torn": (lambda snapshot: os.truncate(snapshot / "snapshot.json", 200), 4),
    "deleted": (shutil.rmtree, 4),
    "all deleted": (lambda snapshot: shutil.rmtree(snapshot.parent), 0),
    "forged": (forge, 4),
    "forged, all of them": (lambda snapshot: forge_all(snapshot.parent), 0),
    "renamed": (lambda snapshot: rename(snapshot, 4), 4),
    "renamed, the index too": (lambda snapshot: rename(snapshot, 8), 4),
}
SILENT = ("nothing", "index deleted", "deleted", "all deleted")


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_snapshot_is_passed_over(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    folder = unfinished(root, tmp_path)
    damage, start_from = DAMAGE[what]
    damage(folder / "snapshots" / "step-00000008")
    said = finish(root, folder, capsys)
    assert f"rebuilt steps {start_from} to 10" in said
    assert ("a snapshot cannot be used, so an older one is tried, or the base model: " in said) == (what not in SILENT)


def test_a_forged_copy_of_the_anchor_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The planner asks for it in a run that stores its anchors, of which 0 and 5 are the first."""
    options = ["algorithm.anchor=stored", "algorithm.q=5", "output.test=false", "output.export=false"]
    options += ["output.snapshot_every=2", "output.snapshots_kept=9"]
    config = write_tiny_config(tmp_path, "gpt2", "mezo-svrg", steps=7)
    training.train(reader.load(config, options), Communicator())
    path = tmp_path / "run" / "trajectory.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b"".join(line for line in whole.splitlines(keepends=True) if not line.startswith(b'{"step":6')))
    path.write_bytes(path.read_bytes()[: path.read_bytes().index(b'{"done":7')])
    forge(tmp_path / "run" / "snapshots" / "step-00000006", anchor=True)
    loaded_run(tmp_path / "run")  # whoever evaluates needs no anchor
    assert "cannot be used" not in caplog.text
    training.train(reader.load(config, [*options, "output.if_exists=resume"]), Communicator())
    assert "step-00000006: its copy of the anchor is not the one of the run" in caplog.text
    assert path.read_bytes() == whole


def test_snapshots_whose_trajectory_is_gone_are_moved_aside(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = unfinished(root, tmp_path)
    (folder / "trajectory.jsonl").unlink()
    for snapshot in snapshots.snapshots(folder / "snapshots"):
        forge(snapshot)
    assert cli.main(arguments(root, folder, "--output.snapshot_every=0")) == 0
    assert "snapshots is at " in capsys.readouterr().err
    assert not (folder / "snapshots").exists()
    assert len(snapshots.snapshots(folder / "snapshots.aside")) == 2
    assert weights(folder) == weights(root / "undisturbed")


def test_snapshots_of_another_run_or_of_later_steps_are_not_taken(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = unfinished(root, tmp_path, steps=6)  # the trajectory was put back to an earlier state
    index = folder / "snapshots" / "step-00000004" / "snapshot.json"
    index.write_text(index.read_text().replace('"identity": "', '"identity": "f'))
    said = finish(root, folder, capsys)
    assert "step-00000004 belongs to another run; it is left alone" in said
    assert "rebuilt steps 0 to 6" in said


def test_a_corrupted_model_is_noticed(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, model = unfinished(root, tmp_path), tmp_path / "model"
    shutil.copytree(root / "model", model)
    shutil.copy(root / "config.yaml", tmp_path)
    flip(model / "model.safetensors")
    config = (tmp_path / "config.yaml").read_text().replace(str(root / "model"), str(model))
    (tmp_path / "config.yaml").write_text(config)
    assert cli.main(arguments(tmp_path, folder)) == 2
    assert "settings differ from those of the trajectory: model.name" in capsys.readouterr().err
    shutil.copytree(root / "model", tmp_path / "sound")
    flip(root / "model" / "model.safetensors")
    try:
        assert cli.main(arguments(root, folder)) == 2
        assert "the trajectory was made from another base model" in capsys.readouterr().err
        os.truncate(root / "model" / "model.safetensors", 5000)
        assert cli.main(arguments(root, folder)) == 2
        assert "error: model.name: " in capsys.readouterr().err
    finally:
        shutil.copy(tmp_path / "sound" / "model.safetensors", root / "model")
    finish(root, folder, capsys)
