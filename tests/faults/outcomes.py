"""What a run of the job came to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mezo_dist import cli
from tests.faults.jobs import arguments, steps_of


def weights(folder: Path) -> str:
    fingerprint: str = json.loads((folder / "results.json").read_text())["weights"]
    return fingerprint


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def finish(root: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Go on with a run in this process; it must end as the undisturbed one. Returns what it said."""
    assert cli.main(arguments(root, folder)) == 0
    assert weights(folder) == weights(root / "undisturbed")
    assert steps_of(folder) == steps_of(root / "undisturbed")
    return capsys.readouterr().err
