"""What all benchmarks share: the options, what is said of the machine first, and the line for machines last.

Every benchmark has

* ``--json``: the last line of the output is one JSON object with the figures, and under "about" the command, commit,
  versions, machine, date and load of the machine;
* ``--fast``: small sizes, within two minutes on two cores, to see that it runs; its figures say little. An option that
  is given beside it counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from mezo_dist.studies import results
from mezo_dist.studies.command import BUSY

ROOT = Path(__file__).resolve().parents[2]


def parser(doc: str | None, *, whole_doc: bool = False) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks share.

    Args:
        doc: of the benchmark's module.
        whole_doc: the help shows all of it, not only its first line.
    """
    text = doc or ""
    result = argparse.ArgumentParser(
        description=text if whole_doc else text.partition("\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter if whole_doc else argparse.HelpFormatter,
    )
    result.add_argument("--json", action="store_true", help="end with one line of JSON")
    result.add_argument("--fast", action="store_true", help="small sizes, within two minutes; figures say little")
    return result


def parse(
    options: argparse.ArgumentParser, fast: Mapping[str, object], given: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse the command line; with --fast, ``fast`` takes the place of the defaults, not of what is given.

    Args:
        options: see `parser`.
        fast: name of an option's attribute -> its value.
        given: arguments; those of the process where they are left out.
    """
    arguments = options.parse_args(given)
    if arguments.fast:
        options.set_defaults(**fast)
        arguments = options.parse_args(given)
    return arguments


def about() -> dict[str, object]:
    """Where and when figures come from, as in studies, and the command."""
    command = " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])
    return {"command": command, **results.about(""), "machine": machine()}


def machine() -> str:
    """The GPU, or the processor and its cores, and the memory."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB"
    info = Path("/proc/cpuinfo")
    names = [line.partition(": ")[2] for line in info.read_text().splitlines() if line.startswith("model name")]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {pages / 2**30:.0f} GiB"


def begin() -> dict[str, object]:
    """Say where this runs, and warn where the machine is busy. Returns `about`, for `end`."""
    facts = about()
    print(f"{facts['machine']}; {facts['versions']}; {facts['commit']}, {facts['date']}", file=sys.stderr)
    if (load := os.getloadavg()[0]) > BUSY * (os.cpu_count() or 1):
        print(f"warning: the machine is busy (load {load:.1f}): seconds will say little", file=sys.stderr, flush=True)
    return facts


def end(arguments: argparse.Namespace, facts: Mapping[str, object], figures: Mapping[str, object]) -> None:
    """With --json, print the line for machines."""
    if arguments.json:
        print(json.dumps({**figures, "about": facts}))
