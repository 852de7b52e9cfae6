"""Ranks that are killed, at moments that are chosen and at random ones: a restart ends as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mezo_dist.errors import LostRankError
from mezo_dist.storage import trajectory
from tests import forked_ranks
from tests.faults.jobs import STEPS, Fault, arguments, kill_at_random, run, start, steps_of
from tests.run_folders import results

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]
KILLS = 5
GRACE_S = 5.0  # as launchers do, see `Job.wait`


def check_equal(root: Path, folder: Path) -> None:
    """The run in ``folder`` ended as the undisturbed one, bit for bit."""
    assert steps_of(folder) == steps_of(root / "undisturbed")
    assert results(folder) == results(root / "undisturbed")
    assert trajectory.read(folder / "trajectory.jsonl").marks[STEPS].weights == results(folder)["weights"]


# (function, call, rank, when): calls are counted so that the fault strikes in the middle of the run.
MOMENTS = {
    "evaluate": Fault("mezo_dist.engines.engine:Engine._evaluate_group", 16, 1),
    "before the all-reduce": Fault("mezo_dist.distributed.communicator:Communicator._all_reduce", 7, 1),
    "after the all-reduce": Fault("mezo_dist.distributed.communicator:Communicator._all_reduce", 7, 0, when="after"),
    "before the append": Fault("mezo_dist.storage.trajectory_writer:os.write", 9, 0),
    "in the append": Fault("mezo_dist.storage.trajectory_writer:os.write", 9, 0, when="half"),
    "after the append": Fault("mezo_dist.storage.trajectory_writer:os.write", 9, 0, when="after"),
    "in the update": Fault("mezo_dist.directions.law:Law.advance_parts", 110, 1),
    "in the header": Fault("mezo_dist.storage.trajectory_writer:replace_file", 1, 0),
    "in a snapshot's data": Fault("mezo_dist.storage.snapshot_writer:safetensors_io.write", 2, 1),
    "before a snapshot is valid": Fault("mezo_dist.storage.snapshot_writer:_publish", 2, 0),
    "after a snapshot is valid": Fault("mezo_dist.storage.snapshot_writer:_publish", 2, 0, when="after"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_chosen_moment(root: Path, tmp_path: Path, moment: str) -> None:
    fault = MOMENTS[moment]
    folder = tmp_path / "run"
    codes, output = run(tmp_path, 2, arguments(root, folder), fault)
    assert codes[fault.rank] == -signal.SIGKILL, output
    assert codes[1 - fault.rank] == LostRankError.exit_status, output
    assert re.search(rf"error: (start|step \d+): rank\(s\) \[{fault.rank}\] stopped, or did not answer", output)
    before = steps_of(folder) if (folder / "trajectory.jsonl").exists() else []
    assert before == steps_of(root / "undisturbed")[: len(before)]
    assert (len(before) >= 5) == (moment != "in the header"), "the fault struck in the middle"
    codes, output = run(tmp_path, 2, arguments(root, folder))
    assert codes == [0, 0], output
    check_equal(root, folder)


def test_a_run_goes_on_with_other_engines(root: Path, tmp_path: Path) -> None:
    """Snapshots and trajectory know nothing of who owned the weights, nor of how many there were."""
    folder = tmp_path / "run"
    engines: list[list[str]] = [[], ["--layout.name=fsdp"], ["--layout.name=zero"]]
    for number, engine in enumerate(engines):
        in_step_3 = Fault("mezo_dist.runs.evaluation:Evaluator.losses", 3 if number else 6, 1)
        codes, output = run(tmp_path, 2, arguments(root, folder, *engine), in_step_3)
        assert codes[1] == -signal.SIGKILL, output
        assert len(steps_of(folder)) == 5 + 2 * number, output
    codes, output = run(tmp_path, 2, arguments(root, folder, *engines[1]))
    assert codes == [0, 0], output
    check_equal(root, folder)


def test_killed_at_random_moments(root: Path, tmp_path: Path) -> None:
    """Any rank, any moment; what was done is never undone. `examples/benchmarks/soak.py` does it for longer."""
    draw = random.Random(int(os.environ.get("MEZO_DIST_SEED", "0")))
    kills, done, finished = 0, 0, 0
    while kills < KILLS or not finished:
        folder = tmp_path / f"run-{finished}"
        with start(tmp_path, draw.choice([1, 2, 3]), arguments(root, folder)) as job:
            struck = kills < KILLS and kill_at_random(job, draw, 1.5)
            codes = job.wait(grace_s=GRACE_S)
        kills += struck
        lines = steps_of(folder) if (folder / "trajectory.jsonl").exists() else []
        assert len(lines) >= done
        done = len(lines)
        if set(codes) == {0}:
            check_equal(root, folder)
            finished, done = finished + 1, 0
        else:
            assert struck, job.output()
            ended = {0} if done == STEPS else set()  # others had nothing left to do when one was struck at its end
            assert set(codes) <= {LostRankError.exit_status, -signal.SIGKILL} | ended, job.output()


def test_torchrun_restarts_what_was_killed(root: Path, tmp_path: Path) -> None:
    """``--max-restarts``: the launcher itself starts all ranks again, and the run goes on."""
    folder = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    command = [*torchrun, "-m", "mezo_dist", *arguments(root, folder, f"--train.steps={STEPS}")]
    with (tmp_path / "output").open("w") as output, forked_ranks.environment() as environment:
        environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        try:
            killed = kill_once_under_way(launcher, folder)
            assert launcher.wait(timeout=280) == 0, (tmp_path / "output").read_text()
        finally:
            launcher.kill()
            launcher.wait()
    assert killed
    check_equal(root, folder)
    events = [json.loads(line)["event"] for line in (folder / "events.jsonl").read_text().splitlines()]
    assert events == ["started", "resumed", "finished"]


def kill_once_under_way(launcher: subprocess.Popen[bytes], folder: Path) -> bool:
    """SIGKILL rank 1 as soon as the run has done a step."""
    while launcher.poll() is None:
        if (folder / "trajectory.jsonl").exists() and steps_of(folder):
            for process in Path("/proc").glob("[0-9]*"):
                if rank_under(launcher.pid, process) == "1":
                    os.kill(int(process.name), signal.SIGKILL)
                    return True
        time.sleep(0.005)
    return False


def rank_under(parent: int, process: Path) -> str:
    """The RANK of a process, if it is a child of ``parent``."""
    try:
        fields = (process / "stat").read_text().rpartition(")")[2].split()
        environment = (process / "environ").read_bytes().decode(errors="replace")
    except OSError:  # gone meanwhile
        return ""
    if int(fields[1]) != parent:
        return ""
    return dict(item.partition("=")[::2] for item in environment.split("\0")).get("RANK", "")
