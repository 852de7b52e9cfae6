"""Writing the trajectory: nothing is overwritten, and a step is there or has left no trace."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from mezo_dist.algorithms.base import Losses
from mezo_dist.errors import UserError
from mezo_dist.storage.trajectory import Mark, Step, read
from mezo_dist.storage.trajectory_writer import TrajectoryWriter
from tests.storage.trajectories import FINGERPRINT, HEADER, STEPS


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("count", [1, 20])
def test_what_is_not_finite_is_not_written(tmp_path: Path, bad: float, count: int) -> None:
    writer = TrajectoryWriter.begin(tmp_path / "t.jsonl", HEADER)
    with pytest.raises(ValueError, match="a loss is not finite"):
        writer.append(Step(0, (Losses((0.5,), ((bad,) * count,)),), "0" * 8))
    writer.append(STEPS[0])
    writer.close()
    assert read(tmp_path / "t.jsonl").steps == STEPS[:1]


def test_going_on_appends(trajectory_path: Path) -> None:
    writer = TrajectoryWriter.go_on(trajectory_path, read(trajectory_path))
    writer.append(Step(3, (Losses((1.0,)),), "0" * 8))
    writer.append(Mark(4, FINGERPRINT, "a" * 16))
    writer.close()
    log = read(trajectory_path)
    assert [step.step for step in log.steps] == [0, 1, 2, 3]
    assert log.marks == {2: Mark(2, FINGERPRINT), 4: Mark(4, FINGERPRINT, "a" * 16)}


def test_a_new_trajectory_never_overwrites_one(trajectory_path: Path) -> None:
    before = trajectory_path.read_bytes()
    with pytest.raises(FileExistsError):
        TrajectoryWriter.begin(trajectory_path, HEADER)
    trajectory_path.write_bytes(b"something else\n")
    with pytest.raises(UserError, match="not a trajectory"):
        TrajectoryWriter.begin(trajectory_path, HEADER)
    trajectory_path.write_bytes(before[:50])  # not even a header: nothing is lost
    TrajectoryWriter.begin(trajectory_path, HEADER).close()
    assert read(trajectory_path).header == HEADER


def test_a_file_that_grew_since_it_was_read_is_left_alone(trajectory_path: Path) -> None:
    log = read(trajectory_path)
    TrajectoryWriter.go_on(trajectory_path, log).append(Mark(3, FINGERPRINT))
    with pytest.raises(UserError, match="changed since it was read: another job is writing to it"):
        TrajectoryWriter.go_on(trajectory_path, log)


@pytest.mark.parametrize(("sync_s", "synced"), [(0.0, [1, 1, 1, 1]), (10.0, [0, 0, 1, 0]), (None, [0, 0, 0, 0])])
def test_how_often_it_waits_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync_s: float | None, synced: list[int]
) -> None:
    count, now = [0], [0.0]

    def fsync(handle: int) -> None:
        count[0] += 1

    TrajectoryWriter.begin(tmp_path / "t.jsonl", HEADER).close()
    writer = TrajectoryWriter(tmp_path / "t.jsonl", HEADER.identity, sync_s, clock=lambda: now[0])
    monkeypatch.setattr(os, "fsync", fsync)
    waits = []
    for number in range(4):
        before, now[0] = count[0], now[0] + 4
        writer.append(Step(number, (Losses((0.5,)),), "0" * 8))
        waits.append(count[0] - before)
        assert len(read(tmp_path / "t.jsonl").steps) == number + 1, "in the system's hands, if not on the disk"
    assert waits == synced


@pytest.mark.parametrize("fails", ["write", "fsync"])
def test_a_step_that_cannot_be_written_leaves_no_trace(
    trajectory_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    whole, real = trajectory_path.read_bytes(), os.write
    writer = TrajectoryWriter.go_on(trajectory_path, read(trajectory_path))

    def write_some(handle: int, data: bytes) -> int:
        if fails == "write" and len(data) < 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data[:30])  # as a disk that is nearly full does

    def fsync(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write_some)
        if fails == "fsync":
            patch.setattr(os, "fsync", fsync)
        with pytest.raises(
            UserError, match=r"output.dir: .*: step 3 could not be logged \((No space|Input).*--output.if_ex"
        ):
            writer.append(Step(3, (Losses((1.0,)),), "0" * 8))
    assert trajectory_path.read_bytes() == whole
    writer.append(Step(3, (Losses((1.0,)),), "0" * 8))
    assert len(read(trajectory_path).steps) == 4


@pytest.mark.parametrize("how", ["renamed", "removed", "replaced"])
def test_a_file_that_is_gone_is_noticed(trajectory_path: Path, how: str) -> None:
    whole = trajectory_path.read_bytes()
    writer = TrajectoryWriter.go_on(trajectory_path, read(trajectory_path))
    aside = trajectory_path.rename(trajectory_path.with_name("aside"))
    if how == "removed":
        aside.unlink()
    if how == "replaced":
        trajectory_path.write_bytes(whole)
    with pytest.raises(UserError, match="was removed or renamed while the run went on"):
        writer.append(Step(3, (Losses((1.0,)),), "0" * 8))
    if how != "removed":
        assert aside.read_bytes() == whole


def test_a_link_is_not_written_through(trajectory_path: Path) -> None:
    recorded = read(trajectory_path)
    trajectory_path.rename(trajectory_path.with_name("elsewhere"))
    trajectory_path.symlink_to(trajectory_path.with_name("elsewhere"))
    with pytest.raises(UserError, match=r"cannot be written \(Too many levels of symbolic links\)"):
        TrajectoryWriter.go_on(trajectory_path, recorded)


def test_an_append_costs_the_same_after_many_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a clock: what it reads, writes and asks of the file system, early and late."""
    writer = TrajectoryWriter.begin(tmp_path / "t.jsonl", HEADER, sync_s=None)
    calls: list[tuple[str, object]] = []
    for name in ("write", "read", "pread", "fstat", "stat", "open", "ftruncate", "fsync"):
        known = getattr(os, name)

        def counted(*given: Any, name: str = name, known: Any = known, **options: Any) -> Any:
            calls.append((name, len(given[1]) if name == "write" else None))
            return known(*given, **options)

        monkeypatch.setattr(os, name, counted)
    costs = []
    for step in range(10_000, 12_000):  # numbers of as many digits
        calls.clear()
        writer.append(Step(step, (Losses((0.5, 0.25)),), "00000000"))
        costs.append(list(calls))
    assert costs[0] == costs[-1]
    assert [name for name, _ in costs[0]].count("write") == 1
    monkeypatch.undo()
    writer.close()
