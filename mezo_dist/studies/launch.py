"""Runs of cases: started by torchrun here, on virtual hosts, or by srun inside a job of SLURM; a process tree each."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

import mezo_dist
from mezo_dist.errors import UserError
from mezo_dist.studies.cases import Case, Study
from mezo_dist.studies.prepare import prepare
from mezo_dist.studies.results import Measured, read_run

Launcher = Literal["torchrun", "srun"]
TAIL = 1500
"""Characters of a failed run's output that are kept."""


class RunFailedError(RuntimeError):
    """A run of a case failed; the end of its output says why."""


def command_line(case: Case, launcher: Launcher, folder: Path) -> list[str]:
    """The command that starts all ranks of a case.

    Args:
        case: what is run.
        launcher: ``torchrun``: here, or on virtual hosts if there are several or a limited link; ``srun``: on the nodes
            of the job of SLURM that this process is in.
        folder: of the run.

    Raises:
        UserError: the launcher is not to be had.
    """
    rank = ["-m", "mezo_dist.studies.rank", str(folder)]
    if launcher == "srun":
        if case.link is not None:
            raise UserError("link: only virtual hosts have links that can be limited; leave it out on SLURM")
        sizes = [f"--nodes={case.hosts}", f"--ntasks={case.all_ranks}", f"--ntasks-per-node={case.ranks}"]
        return ["srun", "--kill-on-bad-exit=1", *sizes, sys.executable, *rank]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(case.ranks)]
    if case.hosts == 1:
        return [*torchrun, "--standalone", *rank]
    meeting = ["--nnodes", str(case.hosts), "--rdzv-backend", "c10d", "--rdzv-endpoint", "host1:29500"]
    limit = [] if case.link is None else ["--rate", case.link]
    virtual = [sys.executable, str(_virtual_cluster()), "run", "--hosts", str(case.hosts), *limit, "--each", "--"]
    return [*virtual, *torchrun, *meeting, *rank]


def _virtual_cluster() -> Path:
    """The script, in the repository or in the installed package."""
    package = Path(mezo_dist.__file__).resolve().parent
    for folder in (package.parent / "launcher", package / "launcher"):
        if (folder / "virtual_cluster").is_file():
            return folder / "virtual_cluster"
    raise UserError(f"hosts: several need virtual hosts, whose launcher/virtual_cluster is not beside {package}")


def run_case(study: Study, case: Case, launcher: Launcher) -> Measured:
    """Run a case once.

    Args:
        study: of the case.
        case: what is run.
        launcher: see `command_line`.

    Raises:
        RunFailedError: it failed, or took too long.
    """
    shared = os.environ.get("SLURM_SUBMIT_DIR") if launcher == "srun" else None  # a folder that all nodes see
    with tempfile.TemporaryDirectory(prefix="mezo-study-", dir=shared) as name:
        folder = Path(name)
        prepare(study, case, folder)
        _call(command_line(case, launcher, folder), folder, case, study.timeout)
        return read_run(study, case, folder)


def _call(line: list[str], folder: Path, case: Case, timeout_s: int) -> None:
    """Run a command to its end, and take all its processes along if it does not come."""
    if shutil.which(line[0]) is None:
        raise UserError(f"{line[0]} is not here; --launcher srun works inside a job of SLURM alone")
    threads = max(1, (os.cpu_count() or 1) // case.all_ranks)
    root = str(Path(mezo_dist.__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONPATH": path}
    log = folder / "output.txt"
    with log.open("w") as file:
        process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                                   env=environment, cwd=folder, start_new_session=True)  # fmt: skip
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status != 0:
        why = f"exit status {status}" if status is not None else f"not done after {timeout_s} s"
        raise RunFailedError(f"{why}: {_last_words(log.read_text(errors='replace'))}")


def _last_words(output: str) -> str:
    """Messages of ranks if there are any, for launchers say much behind them; or else the end of the output."""
    lines = output.splitlines()
    first = next((number for number, line in enumerate(lines) if "error:" in line), None)
    return output[-TAIL:] if first is None else "\n".join(lines[first : first + 20])[:TAIL]
