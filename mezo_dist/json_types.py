"""Types of JSON: what is written into the files of a run, and what comes back from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
"""A value that `json.dumps` takes and `json.loads` gives."""
JsonObject: TypeAlias = dict[str, Any]
"""A JSON object with known names, whose values the code that reads it checks (or that never leaves a run)."""
