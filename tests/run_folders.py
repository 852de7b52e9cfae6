"""What tests of several folders read in a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def results(folder: Path) -> dict[str, Any]:
    """The outcome of a run, without how long it took."""
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    del found["training_s"]
    return found
