"""Disturbances from around a run, each really caused: signals, hangs, a clock that jumps, a second job."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from mezo_dist import cli
from mezo_dist.storage import snapshots, trajectory
from tests.faults.jobs import STEPS, Fault, arguments, run, start, steps_of
from tests.faults.outcomes import events, finish, weights

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

# Signals and hangs


@pytest.mark.parametrize(("status", "rank"), [(143, 0), (0, 1)])
def test_sigterm_finishes_the_step_and_saves(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int, rank: int
) -> None:
    """As SLURM does before it preempts a job. One rank is told; all finish the same step."""
    folder, option = tmp_path / "run", f"--distributed.stop_exit_code={status}"
    told = Fault("mezo_dist.runs.evaluation:Evaluator.losses", 6, rank, strike="SIGTERM")
    codes, output = run(tmp_path, 2, arguments(root, folder, option), told)
    assert codes == [status, status], output
    assert output.count("stopped after step 6 of 12; go on with --output.if_exists=resume") == 2
    assert len(steps_of(folder)) == 6
    assert [path.name for path in snapshots.snapshots(folder / "snapshots")] == ["step-00000004", "step-00000006"]
    assert [event["event"] for event in events(folder)] == ["started", "stopped"]
    assert "rebuilt steps 6 to 6" in finish(root, folder, capsys)


@pytest.mark.parametrize(
    ("world_size", "rank", "place"),
    [
        (1, 0, "mezo_dist.runs.build:load_base"),
        (1, 0, "mezo_dist.runs.evaluation:Evaluator.score"),
        (2, 1, "mezo_dist.runs.build:load_base"),
    ],
)
def test_sigterm_before_the_first_step_ends_the_run_there(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], world_size: int, rank: int, place: str
) -> None:
    folder, options = tmp_path / "run", ["--distributed.stop_exit_code=7", "--output.test=true"]
    codes, output = run(
        tmp_path, world_size, arguments(root, folder, *options), Fault(place, 1, rank, strike="SIGTERM")
    )
    assert codes == [7] * world_size, output
    assert output.count("stopped before the first step; nothing is lost, start it again") == world_size
    assert ("SIGTERM: rank 1 is told to stop before the first step; all ranks do when" in output) is (world_size > 1)
    assert not (folder / trajectory.FILE).exists(), "no evaluation and no step was done"
    assert not (folder / "results.json").exists()
    finish(root, folder, capsys)
    assert len(steps_of(folder)) == STEPS


def test_a_rank_that_hangs_is_named_with_the_step(root: Path, tmp_path: Path) -> None:
    """SIGSTOP: alive, its connections open, but silent."""
    options = ["--distributed.timeout_s=6", "--distributed.patience_s=1"]
    stopped = Fault("mezo_dist.runs.evaluation:Evaluator.losses", 6, 1, strike="SIGSTOP")
    with start(tmp_path, 3, arguments(root, tmp_path / "run", *options), stopped) as job:
        for rank in (0, 2):
            job.processes[rank].join(60)
        assert [process.exitcode for process in job.processes] == [75, None, 75], job.output()
        output = job.output()
    assert "step 6: waiting for rank(s) [1] for 1 s" in output
    assert output.count("error: step 6: rank(s) [1] stopped, or did not answer within distributed.timeout_s") == 2


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
    assert trajectory.read(tmp_path / "run" / "trajectory.jsonl").marks[STEPS].weights == weights(root / "undisturbed")


def test_two_jobs_do_not_write_to_one_folder(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    paused = Fault("mezo_dist.runs.evaluation:Evaluator.losses", 6, 0, strike="SIGSTOP")
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
