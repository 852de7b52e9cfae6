"""Ranks that do not share a folder: the run is rank 0's, and goes on from there."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from mezo_dist.errors import LostRankError
from tests.faults.jobs import Fault, arguments, run, steps_of
from tests.faults.outcomes import events
from tests.faults.test_kills import check_equal

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@dataclass(frozen=True)
class Elsewhere:
    """A rank for which the job's relative output.dir is in another folder, and what befalls it there."""

    rank: int
    home: Path
    fault: Fault | None = None

    def install(self) -> None:
        os.chdir(self.home)
        if self.fault is not None:
            self.fault.install()


def test_a_run_goes_on_without_a_shared_folder(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("host0", "host1"):
        (tmp_path / host).mkdir()
    monkeypatch.chdir(tmp_path / "host0")
    folder, line = tmp_path / "host0" / "run", arguments(root, Path("run"))
    killed = Elsewhere(1, tmp_path / "host1", Fault("mezo_dist.runs.evaluation:Evaluator.losses", 9, 1))
    codes, output = run(tmp_path, 2, line, killed)
    assert codes == [LostRankError.exit_status, -signal.SIGKILL], output
    assert "snapshot run/snapshots/step-00000004 could not be written" in output
    assert "the run goes on, as the trajectory still holds it" in output
    assert len(steps_of(folder)) >= 6
    codes, output = run(tmp_path, 2, line, Elsewhere(1, tmp_path / "host1"))
    assert codes == [0, 0], output
    check_equal(root, folder)
    assert [event["event"] for event in events(folder)].count("resumed") == 1
    assert not (tmp_path / "host1" / "run" / "trajectory.jsonl").exists()
