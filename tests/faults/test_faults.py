"""Faults other than kills, each really caused: signals, hangs, disagreement, disks, damage, clocks, two jobs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mezo_dist import checkpoint, cli, trajectory
from mezo_dist.testing import write_tiny_data
from tests.faults.jobs import STEPS, Fault, arguments, run, start, steps_of

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def weights(folder: Path) -> str:
    found: str = json.loads((folder / "results.json").read_text())["weights"]
    return found


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def finish(root: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Go on with a run in this process; it must end as the undisturbed one. Returns what it said."""
    assert cli.main(arguments(root, folder)) == 0
    assert weights(folder) == weights(root / "undisturbed")
    assert steps_of(folder) == steps_of(root / "undisturbed")
    return capsys.readouterr().err


# Signals and hangs


@pytest.mark.parametrize(("status", "rank"), [(143, 0), (0, 1)])
def test_sigterm_finishes_the_step_and_saves(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int, rank: int
) -> None:
    """As SLURM does before it preempts a job. One rank is told; all finish the same step."""
    folder, option = tmp_path / "run", f"--distributed.stop_exit_code={status}"
    told = Fault("mezo_dist.evaluation:Evaluator.losses", 6, rank, strike="SIGTERM")
    codes, output = run(tmp_path, 2, arguments(root, folder, option), told)
    assert codes == [status, status], output
    assert output.count("stopped after step 6 of 12; go on with --output.if_exists=resume") == 2
    assert len(steps_of(folder)) == 6
    assert [path.name for path in checkpoint.snapshots(folder / "snapshots")] == ["step-00000004", "step-00000006"]
    assert [event["event"] for event in events(folder)] == ["started", "stopped"]
    assert "rebuilt steps 6 to 6" in finish(root, folder, capsys)


def test_a_rank_that_hangs_is_named_with_the_step(root: Path, tmp_path: Path) -> None:
    """SIGSTOP: alive, its connections open, but silent."""
    options = ["--distributed.timeout_s=6", "--distributed.patience_s=1"]
    stopped = Fault("mezo_dist.evaluation:Evaluator.losses", 6, 1, strike="SIGSTOP")
    with start(tmp_path, 3, arguments(root, tmp_path / "run", *options), stopped) as job:
        for rank in (0, 2):
            job.processes[rank].join(60)
        assert [process.exitcode for process in job.processes] == [75, None, 75], job.output()
        output = job.output()
    assert "step 6: waiting for rank(s) [1] for 1 s" in output
    assert output.count("error: step 6: rank(s) [1] stopped, or did not answer within distributed.timeout_s") == 2


# Disagreement


@pytest.mark.parametrize(
    ("what", "option"), [("config", "--algorithm.lr=7e-5"), ("config", "--seed=1"), ("data", "--task.data={other}")]
)
def test_a_rank_that_starts_with_something_else(root: Path, tmp_path: Path, what: str, option: str) -> None:
    write_tiny_data(tmp_path / "other.jsonl", seed=1)
    more = {1: [option.format(other=tmp_path / "other.jsonl")]}
    codes, output = run(tmp_path, 2, arguments(root, tmp_path / "run"), more=more)
    assert codes == [2, 2], output
    assert output.count(" of rank(s) [1] differs from rank 0's; all ranks must run the same") == 2
    assert f"error: {what} of rank" in output or what == "data"
    assert not (tmp_path / "run" / "trajectory.jsonl").exists()


@dataclass(frozen=True)
class OtherCode:
    """A rank on which the package's sources are not the same."""

    rank: int

    def install(self) -> None:
        from mezo_dist import runs

        runs._code_digest = lambda: "another checkout"


def test_a_rank_with_other_code(root: Path, tmp_path: Path) -> None:
    codes, output = run(tmp_path, 2, arguments(root, tmp_path / "run"), OtherCode(1))
    assert codes == [2, 2], output
    assert output.count("error: code of mezo_dist of rank(s) [1] differs from rank 0's") == 2


@dataclass(frozen=True)
class OtherDirection:
    """A rank that takes another direction in its sixth step: a fault of software or memory."""

    rank: int

    def install(self) -> None:
        from mezo_dist.algorithms.base import Problem

        real = Problem.direction_seed

        def direction_seed(problem: Problem, step: int, index: int = 0) -> int:
            return real(problem, step, index) ^ (step == 5)

        setattr(Problem, "direction_seed", direction_seed)  # noqa: B010 (mypy refuses to assign methods)


@dataclass(frozen=True)
class FlippedBit:
    """A rank on which one bit of one weight changes in the sixth step."""

    rank: int

    def install(self) -> None:
        from mezo_dist.engines.engine import Engine

        real, calls = Engine.apply, [0]

        def apply(engine: Engine, *args: Any) -> None:
            real(engine, *args)
            calls[0] += 1
            if calls[0] == 6:
                next(iter(engine.shards())).tensor.view(-1)[:1].view(torch.int32).bitwise_xor_(1)

        setattr(Engine, "apply", apply)  # noqa: B010 (mypy refuses to assign methods)


def test_a_rank_that_falls_out_of_step_is_named(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codes, output = run(tmp_path, 3, arguments(root, tmp_path / "run"), OtherDirection(2))
    assert 0 not in codes
    for rank in range(3):
        assert f"rank(s) [2] evaluate another round than the other ranks (seen on rank {rank}, " in output
    assert "step 6): step, seeds or settings differ" in output
    assert len(steps_of(tmp_path / "run")) == 5
    finish(root, tmp_path / "run", capsys)


def test_weights_that_differ_are_found_before_they_are_saved(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes, output = run(tmp_path, 2, arguments(root, tmp_path / "run"), FlippedBit(1))
    assert codes == [2, 2]
    assert "error: weights after step 8 of rank(s) [1] differs from rank 0's" in output
    assert [p.name for p in checkpoint.snapshots(tmp_path / "run" / "snapshots")] == ["step-00000004"]


# Disks


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
        from mezo_dist import keeper

        real, calls = getattr(keeper.Keeper, self.function), [0]

        def fill_first(*args: Any) -> Any:
            calls[0] += 1
            if calls[0] == self.count:
                fill(Path(self.disk), self.spare)
            return real(*args)

        setattr(keeper.Keeper, self.function, fill_first)


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
        assert [path.name for path in checkpoint.snapshots(folder / "snapshots")] == ["step-00000004"]
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


# Damage


def unfinished(root: Path, tmp_path: Path, steps: int = 10) -> Path:
    """The undisturbed run as it was after so many steps, with the snapshots of steps 4 and 8."""
    folder = Path(shutil.copytree(root / "undisturbed", tmp_path / "run"))
    lines = (folder / "trajectory.jsonl").read_bytes().splitlines(keepends=True)
    last = next(i for i, line in enumerate(lines) if line.startswith(b'{"step":%d,' % (steps - 1)))
    (folder / "trajectory.jsonl").write_bytes(b"".join(lines[: last + 1]))
    assert [path.name for path in checkpoint.snapshots(folder / "snapshots")] == ["step-00000004", "step-00000008"]
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


# Clocks, and two jobs


def test_a_clock_that_jumps_changes_nothing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wall clock goes back by a year in the middle, and forth."""
    now, calls = time.time(), [0]

    def jumping() -> float:
        calls[0] += 1
        return now - 3e7 * (calls[0] % 2)

    monkeypatch.setattr(time, "time", jumping)
    finish(root, tmp_path / "run", capsys)
    assert calls[0] > 0
    assert trajectory.read(tmp_path / "run" / "trajectory.jsonl").marks[STEPS] == weights(root / "undisturbed")


def test_two_jobs_do_not_write_to_one_folder(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    paused = Fault("mezo_dist.evaluation:Evaluator.losses", 6, 0, strike="SIGSTOP")
    with start(tmp_path, 1, arguments(root, folder), paused) as job:
        while not (folder / "trajectory.jsonl").exists() or len(steps_of(folder)) < 5:
            time.sleep(0.01)
            assert job.processes[0].exitcode is None, job.output()
        owner = f"process {job.processes[0].pid} on "
        for option in ("resume", "replace"):
            assert cli.main(arguments(root, folder, f"--output.if_exists={option}")) == 2
            message = capsys.readouterr().err
            assert "run is in use by another job (" + owner in message
            assert "end that one, or name another folder (--output.dir)" in message
        os.kill(job.processes[0].pid, signal.SIGCONT)
        assert job.wait() == [0]
    assert weights(folder) == weights(root / "undisturbed")
