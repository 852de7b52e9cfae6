"""``mezo-dist study``: runs of all cases in turns, and their tables and plots."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from mezo_dist.errors import UserError
from mezo_dist.storage.files import replace_file
from mezo_dist.studies import results
from mezo_dist.studies.cases import Case, Study, read_study
from mezo_dist.studies.launch import RunFailedError, run_case
from mezo_dist.studies.slurm import script

BUSY = 0.5
"""Load for each core from which on the machine is said to be busy."""


def run(arguments: argparse.Namespace) -> None:
    """Do what is missing, and write down all that there is.

    Raises:
        UserError: the file is wrong, or runs failed.
    """
    study = read_study(arguments.file)
    if study.x not in results.COLUMNS:
        raise UserError(f"{arguments.file}: x: a column ({', '.join(results.COLUMNS)}), not {study.x!r}")
    to = arguments.to or Path("results") / study.name
    runs = [(case, repeat) for repeat in range(study.repeats) for case in study.cases]
    if arguments.slurm:
        print(script(study, arguments.file, to), end="")
        return
    if arguments.only is not None and not 0 <= arguments.only < len(runs):
        raise UserError(f"--only: from 0 to {len(runs) - 1}, not {arguments.only}")
    if arguments.limit is not None and arguments.limit < 0:
        raise UserError(f"--limit: at least 0, not {arguments.limit}")
    path = to / "results.jsonl"
    done = {(line["key"], line["repeat"]) for line in results.read_lines(path)}
    wanted = runs if arguments.only is None else [runs[arguments.only]]
    missing = [(case, repeat) for case, repeat in wanted if (case.key, repeat) not in done]
    if arguments.list:
        for number, (case, repeat) in enumerate(runs):
            print(f"{number:4} {'done' if (case.key, repeat) in done else 'to do'}  {case.name} (run {repeat + 1})")
        return
    if missing and arguments.limit != 0:
        results.check_writable(path)
    failed = _run_all(study, missing[: arguments.limit], path, arguments.launcher)
    _write_all(study, path, to, f"mezo-dist study {shlex.quote(str(arguments.file))}")
    if failed:
        raise UserError("study: runs failed, and are tried again next time:\n" + "\n".join(failed))


def _run_all(study: Study, runs: list[tuple[Case, int]], path: Path, launcher: str) -> list[str]:
    """Do all runs. A case that failed is not tried again; its messages are returned.

    Args:
        study: of the runs.
        runs: cases, and the number of the repeat.
        path: of results.jsonl.
        launcher: see `mezo_dist.studies.launch.command_line`.
    """
    load = os.getloadavg()[0]
    if runs and load > BUSY * (os.cpu_count() or 1):
        print(f"the machine is busy (load {load:.1f}): seconds will say little", file=sys.stderr)
    failed: dict[Case, str] = {}
    for number, (case, repeat) in enumerate(runs, start=1):
        if case in failed:
            continue
        print(f"{number}/{len(runs)}  {case.name} (run {repeat + 1})", file=sys.stderr, flush=True)
        try:
            measured = run_case(study, case, launcher)  # type: ignore[arg-type]
        except RunFailedError as error:
            failed[case] = f"{case.name}: {error}"
        else:
            results.append(path, results.line_of(case, repeat, measured))
    return list(failed.values())


def _write_all(study: Study, path: Path, to: Path, command: str) -> None:
    """Tables and plot of all runs that there are."""
    rows = results.rows_of(study, results.read_lines(path))
    if not rows:
        return
    try:
        replace_file(to / "results.csv", results.csv_text(rows).encode())
        text = results.markdown(study, rows, command)
        replace_file(to / "results.md", text.encode())
    except OSError as error:
        raise UserError(f"{to} cannot be written ({error})") from error
    from mezo_dist.studies.plot import draw

    draw(rows, study.x, to / "results.png")
    print(text, end="")
