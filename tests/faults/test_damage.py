"""Damage to what a run left behind, each really done: to snapshots, and to the model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mezo_dist import cli
from mezo_dist.storage import snapshots
from tests.faults.jobs import arguments
from tests.faults.outcomes import finish

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


DAMAGE: dict[str, tuple[Callable[[Path], object], int]] = {
    "nothing": (lambda snapshot: None, 8),
    "a bit flipped": (lambda snapshot: flip(snapshot / "rank-00000.safetensors"), 4),
    "truncated": (lambda snapshot: os.truncate(snapshot / "rank-00000.safetensors", 5000), 4),
    "data deleted": (lambda snapshot: (snapshot / "rank-00000.safetensors").unlink(), 4),
    "index deleted": (lambda snapshot: (snapshot / "snapshot.json").unlink(), 4),
    "index torn": (lambda snapshot: os.truncate(snapshot / "snapshot.json", 200), 4),
    "deleted": (shutil.rmtree, 4),
    "all deleted": (lambda snapshot: shutil.rmtree(snapshot.parent), 0),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_snapshot_is_passed_over(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    folder = unfinished(root, tmp_path)
    damage, start_from = DAMAGE[what]
    damage(folder / "snapshots" / "step-00000008")
    said = finish(root, folder, capsys)
    assert f"rebuilt steps {start_from} to 10" in said
    assert ("a snapshot cannot be used, an older one may do: " in said) == (
        what in ("a bit flipped", "truncated", "data deleted", "index torn")
    )


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
