"""One start of `growth.py` in a process of its own, as the command line starts: what it took, imports too, in JSON."""

from __future__ import annotations

import json
import logging
import resource
import sys
from pathlib import Path

from mezo_dist.imports import imports_at_once


def main(config: str, *overrides: str) -> None:
    """Build the run of a config, with further settings."""
    with imports_at_once(for_good=True):
        from mezo_dist.config import reader
        from mezo_dist.distributed.communicator import Communicator
        from mezo_dist.models.load import import_models
        from mezo_dist.runs.build import build_run

        import_models()
    logging.getLogger("mezo_dist").setLevel(logging.WARNING)
    began = resident()
    build_run(reader.load(Path(config), list(overrides)), Communicator())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": processor_seconds(), "mib": (peak - began) / 2**20}))


def processor_seconds() -> float:
    """Seconds of processors of this process and the processes that it ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main(*sys.argv[1:])
