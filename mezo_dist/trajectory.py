"""The trajectory: an append-only log of the combinations applied so far, one JSON line per step.

A fine-tuned model is its base model plus this file. The first line is the header (what the steps mean), every other
line a step: its number, the losses of its rounds (enough to run the planner again) and the combination that was added
to the weights. Values are exact: JSON keeps every bit of a Python float.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from mezo_dist.algorithms.base import Losses
from mezo_dist.directions.combination import Combination
from mezo_dist.errors import UserError

log = logging.getLogger(__name__)
FORMAT = "mezo_dist/trajectory/1"


@dataclass(frozen=True)
class Header:
    """What makes the steps reproducible."""

    config: dict[str, Any]
    """The resolved config."""
    config_digest: str
    """SHA-256 of the part of it that changes results."""
    base_fingerprint: str
    """Fingerprint of the weights before step 0."""
    law_version: str
    """Version of generator and law."""
    seed: int
    """Run seed; the seed of stochastic rounding at a step is derived from it."""


@dataclass(frozen=True)
class Step:
    """One step: ``combination`` was added to the weights; empty if the step was skipped."""

    step: int
    rounds: tuple[Losses, ...]
    combination: Combination
    skipped: str = ""
    """Why the step was skipped; empty if it was not."""

    def to_json(self) -> dict[str, Any]:
        """One line of the file, as a dict."""
        line: dict[str, Any] = {
            "step": self.step,
            "rounds": [losses.to_json() for losses in self.rounds],
            "combination": self.combination.to_json(),
        }
        return line | ({"skipped": self.skipped} if self.skipped else {})

    @staticmethod
    def from_json(line: dict[str, Any]) -> Step:
        """Read `to_json` back. Raises KeyError, TypeError or ValueError on anything else."""
        rounds = tuple(Losses.from_json(item) for item in line["rounds"])
        combination = Combination.from_json(line["combination"])
        return Step(int(line["step"]), rounds, combination, str(line.get("skipped", "")))


@final
class TrajectoryWriter:
    """Appends steps to a file; a step is on disk when `append` returns. Only rank 0 has one."""

    def __init__(self, path: Path, header: Header | None) -> None:
        """Start a new file with ``header``, or go on with an existing one if it is None."""
        self._file = path.open("x" if header is not None else "a", encoding="utf-8")
        if header is not None:
            self._write({"format": FORMAT, **vars(header)})

    def append(self, step: Step) -> None:
        """Write one step and wait until it is on disk."""
        self._write(step.to_json())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        # Python would write NaN, which is not JSON: the losses of skipped steps are left out by the caller.
        self._file.write(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def read(path: Path) -> tuple[Header, list[Step]]:
    """Header and steps of a trajectory file. A last line without its end (a crash while writing) is left out.

    Raises:
        UserError: the file is missing, is no trajectory, or is damaged; the message names the line.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: not a run folder, or a run that did not get to its first step")
    lines = list(_whole_lines(path))
    if not lines:
        raise UserError(f"{path} is empty: the run did not get to its first step")
    head = _parse(path, 1, lines[0])
    if head.pop("format", None) != FORMAT:
        raise UserError(f"{path}, line 1: not a trajectory of format {FORMAT}")
    steps: list[Step] = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            step = Step.from_json(_parse(path, number, line))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}, line {number}: damaged step ({error})") from error
        if step.step != len(steps):
            raise UserError(f"{path}, line {number}: step {step.step} where step {len(steps)} was expected")
        steps.append(step)
    try:
        return Header(**head), steps
    except TypeError as error:
        raise UserError(f"{path}, line 1: damaged header ({error})") from error


def cut_torn_line(path: Path) -> None:
    """Remove a last line without its end, so that the file can be appended to."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        log.warning("%s: cut a torn last line of %d bytes", path, len(data) - whole)
        with path.open("r+b") as file:
            file.truncate(whole)


def _whole_lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.endswith("\n"):
                yield line


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        data = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}, line {number}: damaged ({error})") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}, line {number}: not a JSON object")
    return data
