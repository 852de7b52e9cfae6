"""One process of a run of a study: it trains, and leaves the peak of its memory in the folder of the run.

    python -m mezo_dist.studies.rank FOLDER

A launcher starts it, as it would start ``python -m mezo_dist train``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mezo_dist.config import reader
from mezo_dist.config.schema import RunConfig
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.distributed.connect import connect
from mezo_dist.engines.malloc import ask_for_huge_pages, tune_malloc
from mezo_dist.errors import LostRankError, UserError


def main(folder: Path) -> int:
    """Train as ``folder/config.yaml`` says. Returns the exit status."""
    try:
        ask_for_huge_pages()
        config = reader.load(str(folder / "config.yaml"))
        tune_malloc(is_sharded=config.layout.name != "replicated")
        comm = connect(config.distributed.timeout_s)
        _train(folder, config, comm)
    except (UserError, LostRankError) as error:
        print(f"mezo-dist study: error: {error}", file=sys.stderr)
        return error.exit_status
    comm.close()
    return 0


def _train(folder: Path, config: RunConfig, comm: Communicator) -> None:
    import torch

    from mezo_dist.runs import training

    training.train(config, comm)
    peak = training.peak_rss_gib()
    on_device = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    facts = {"peak_rss_gib": peak, "peak_device_gib": on_device, "device": device}
    (folder / f"rank-{comm.rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
