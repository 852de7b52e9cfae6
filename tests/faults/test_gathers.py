"""Ranks lost inside a gather of weights: the others name them, and end with the status that asks for a restart."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from mezo_dist.errors import LostRankError
from tests.faults.jobs import STEPS, Fault, arguments, run, start, steps_of
from tests.faults.test_kills import check_equal

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]
LAYOUTS = {"fsdp": "mezo_dist.engines.layouts.fsdp:Fsdp", "zero": "mezo_dist.engines.layouts.zero:Zero"}
# One of three ranks is lost: (layout, rank, in what, before or after the call). Rank 0 holds the store.
MOMENTS = {
    "before it begins": ("fsdp", 1, "start", "before"),
    "while it goes on": ("zero", 1, "start", "after"),
    "at its end": ("zero", 2, "finish", "before"),
    "with the store": ("fsdp", 0, "finish", "before"),
    "in the export": ("fsdp", 1, "named_weights", "before"),
}
CALLS = 40
"""Gathers of some steps."""


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_others_end_with_75_and_name_it(root: Path, tmp_path: Path, moment: str) -> None:
    layout, rank, method, when = MOMENTS[moment]
    count = 1 if method == "named_weights" else CALLS
    fault = Fault(f"{LAYOUTS[layout]}.{method}", count, rank, when=when)
    line = arguments(root, tmp_path / "run", f"--layout.name={layout}", "--output.export=true")
    codes, output = run(tmp_path, 3, line, fault)
    wanted = [LostRankError.exit_status] * 3
    wanted[rank] = -signal.SIGKILL
    assert codes == wanted, output
    assert output.count(f"rank(s) [{rank}] stopped, or did not answer") == 2, output
    assert "Traceback" not in output
    done = len(steps_of(tmp_path / "run"))
    assert done == STEPS if method == "named_weights" else 0 < done < STEPS


@pytest.mark.parametrize(("layout", "rank"), [("fsdp", 0), ("zero", 1)])
def test_a_rank_that_hangs_in_a_gather_is_named(root: Path, tmp_path: Path, layout: str, rank: int) -> None:
    """SIGSTOP: alive, its connections open, but silent. Rank 0 holds the store, which then is silent, too."""
    options = ["--distributed.timeout_s=6", "--distributed.patience_s=1", f"--layout.name={layout}"]
    stopped = Fault(f"{LAYOUTS[layout]}.finish", CALLS, rank, strike="SIGSTOP")
    with start(tmp_path, 3, arguments(root, tmp_path / "run", *options), stopped) as job:
        others = [other for other in range(3) if other != rank]
        for other in others:
            job.processes[other].join(60)
        assert [job.processes[other].exitcode for other in others] == [75, 75], job.output()
        output = job.output()
    assert f"waiting for rank(s) [{rank}] for 1 s" in output
    assert output.count(f"rank(s) [{rank}] stopped, or did not answer within distributed.timeout_s") == 2, output


def test_a_run_that_lost_a_rank_in_a_gather_goes_on(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fault = Fault(f"{LAYOUTS['zero']}.finish", CALLS, 1)
    codes, output = run(tmp_path, 2, arguments(root, folder, "--layout.name=zero"), fault)
    assert codes == [LostRankError.exit_status, -signal.SIGKILL], output
    codes, output = run(tmp_path, 2, arguments(root, folder, "--layout.name=fsdp"))
    assert codes == [0, 0], output
    check_equal(root, folder)
