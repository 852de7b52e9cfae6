"""How often the scripts of launchers start a job again: the programs that they call are played."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

LAUNCHER = Path(__file__).resolve().parents[2] / "launcher"


def run(folder: Path, script: str, *arguments: str, programs: dict[str, str], **variables: str) -> tuple[int, str]:
    """The exit status of a script, and what it wrote, where the named programs do as they are told."""
    for name, code in programs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{code}\n")
        (folder / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **variables}
    line = ["bash", str(LAUNCHER / script), *arguments]
    done = subprocess.run(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=30
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize(("variables", "wanted"), [({}, 5), ({"RESTARTS": "1000"}, 1000)])
def test_torchrun_is_told_how_often(variables: dict[str, str], wanted: int, tmp_path: Path) -> None:
    status, said = run(tmp_path, "torchrun.sh", "2", "host1", "c.yaml", programs={"torchrun": 'echo "$@"'}, **variables)
    assert status == 0
    assert f"--max-restarts {wanted} " in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("outcome", "variables", "is_queued_again"),
    [
        ("exit 75", {}, True),
        ("exit 75", {"SLURM_RESTART_COUNT": "19"}, True),
        ("exit 75", {"SLURM_RESTART_COUNT": "20"}, False),  # a rank is lost every time
        ("exit 75", {"SLURM_RESTART_COUNT": "20", "SECONDS": "601"}, True),  # it got on
        ("exit 75", {"SLURM_RESTART_COUNT": "20", "RESTARTS": "21"}, True),
        ("exit 75", {"SLURM_RESTART_COUNT": "1", "RESTARTS": "1"}, False),
        ("exit 2", {}, False),
        ("kill -USR1 $PPID; sleep 0.3", {"SLURM_RESTART_COUNT": "300"}, True),  # the time limit is near
    ],
)
def test_slurm_takes_a_job_up_again(
    outcome: str, variables: dict[str, str], is_queued_again: bool, tmp_path: Path
) -> None:
    programs = {"srun": outcome, "scontrol": 'echo "scontrol $*"'}
    status, said = run(tmp_path, "slurm.sbatch", "c.yaml", programs=programs, SLURM_JOB_ID="7", **variables)
    assert ("scontrol requeue 7" in said) == is_queued_again, said
    assert (status == 0) == is_queued_again, said
    if outcome == "exit 75" and not is_queued_again:
        assert f"was started again {variables['SLURM_RESTART_COUNT']} times already; giving up" in said
