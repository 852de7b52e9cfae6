"""Many things tried in one world of processes, each reported by itself.

Starting processes takes longer than what is asked of them, so a world does everything, and tests look at the parts. A
part that fails does so in the tests that look at it: they show its traceback. What comes after it on that rank is not
run, since the ranks may have parted; the tests of those parts say so.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Failure:
    """Why there is no result of a part."""

    reason: str


class Parts(dict[str, Any]):
    """Results by part; looking at one that failed fails the test that looks."""

    def __getitem__(self, name: str) -> Any:
        result = super().__getitem__(name)
        if isinstance(result, Failure):
            pytest.fail(f"{name}: {result.reason}", pytrace=False)
        return result


def run_parts(parts: Mapping[str, Callable[[], Any]]) -> Parts:
    """Run one part after another, up to the first that fails."""
    results = Parts()
    failed = ""
    for name, part in parts.items():
        if failed:
            results[name] = Failure(f"not run, as {failed!r} failed before")
            continue
        try:
            results[name] = part()
        except Exception:  # noqa: BLE001 (shown by the tests that look at this part)
            results[name] = Failure(traceback.format_exc())
            failed = name
    return results
