"""What tests of several folders read in a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mezo_dist.distributed.communicator import Communicator
from mezo_dist.runs.build import Run
from mezo_dist.runs.load import load_run, open_run


def results(folder: Path) -> dict[str, Any]:
    """The outcome of a run, without how long it took."""
    contents: dict[str, Any] = json.loads((folder / "results.json").read_text())
    del contents["training_s"]
    return contents


def loaded_run(folder: Path, num_steps: int | None = None) -> Run:
    """The run in ``folder``, rebuilt on one process."""
    return load_run(open_run(folder, num_steps, Communicator()), Communicator())
