"""Disks that are full or can only be read, really so: file systems in memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mezo_dist import cli
from mezo_dist.storage import snapshots
from tests.faults.jobs import STEPS, arguments, run, steps_of
from tests.faults.outcomes import events, finish, weights

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@contextlib.contextmanager
def small_disk(folder: Path, size: str, options: str = "rw") -> Iterator[Path]:
    """A file system in memory of so many bytes."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},{options}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this user may not mount a tmpfs: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, spare: int) -> Path:
    """Leave only ``spare`` bytes (rounded down to whole pages) on a disk."""
    filler = disk / "filler"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    filler.write_bytes(b"\0" * (free - spare))
    return filler


@dataclass(frozen=True)
class FullDisk:
    """The disk that the run is on becomes full when ``function`` is called for the ``count``-th time."""

    disk: str
    function: str
    count: int
    spare: int
    rank: int = 0

    def install(self) -> None:
        from mezo_dist.runs import recorder

        real, calls = getattr(recorder.RunRecorder, self.function), [0]

        def fill_first(*args: Any) -> Any:
            calls[0] += 1
            if calls[0] == self.count:
                fill(Path(self.disk), self.spare)
            return real(*args)

        setattr(recorder.RunRecorder, self.function, fill_first)


def test_a_full_disk_ends_the_run_and_loses_nothing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", "2m") as disk:
        folder = disk / "run"
        options = ["--output.snapshot_every=0"]
        codes, output = run(tmp_path, 2, arguments(root, folder, *options), FullDisk(str(disk), "append", 6, 0))
        assert codes == [2, 75], output
        assert "(No space left on device)" in output
        assert "make room, then go on with --output.if_exists=resume" in output
        assert "Traceback" not in output
        done = len(steps_of(folder))
        assert 5 <= done < STEPS
        (disk / "filler").unlink()
        finish(root, folder, capsys)


def test_a_snapshot_on_a_full_disk_is_given_up_and_the_run_goes_on(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", "2m") as disk:
        folder = disk / "run"
        codes, output = run(tmp_path, 2, arguments(root, folder), FullDisk(str(disk), "snapshot", 2, 40_000))
        assert codes == [0, 0], output
        assert "step-00000008 could not be written" in output
        assert "the run goes on, as the trajectory still holds it" in output
        assert weights(folder) == weights(root / "undisturbed")
        failed = [event for event in events(folder) if event["event"] == "snapshot failed"]
        assert [event["step"] for event in failed] == [8]
        assert [path.name for path in snapshots.snapshots(folder / "snapshots")] == ["step-00000004"]
        assert not list((folder / "snapshots").glob(".*"))


def test_a_folder_that_can_only_be_read(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_disk(tmp_path / "disk", "2m") as disk:
        shutil.copytree(root / "undisturbed", disk / "run")
        shutil.rmtree(disk / "run" / "tensorboard")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert cli.main(arguments(root, disk / "new")) == 2
        assert "new cannot be made or written to (Read-only file system); name another" in capsys.readouterr().err
        assert cli.main(arguments(root, disk / "run")) == 2
        assert "run cannot be made or written to (Read-only file system); name another" in capsys.readouterr().err
        assert cli.main(["evaluate", str(disk / "run"), "--split=validation"]) == 0, "it can still be used"
