"""The small files of a run folder: its settings, what happened to it, and what came out."""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from mezo_dist.config import yaml_file
from mezo_dist.config.schema import RunConfig
from mezo_dist.json_types import Json, JsonObject
from mezo_dist.storage.files import open_log, read_in_place, replace_file

log = logging.getLogger(__name__)
CONFIG, EVENTS, RESULTS, SNAPSHOTS, LOCK = "config.yaml", "events.jsonl", "results.json", "snapshots", ".lock"
MONITORS, ANSWERS = "monitors.json", "answers.json"
MOST_RESULTS_BYTES = 1 << 20
"""Size up to which results.json is read."""


def note(folder: Path, event: str, step: int, **facts: Json) -> None:
    """Add a line to the log of events of the run: starts, stops, faults. Only rank 0 may call it.

    Wall-clock time is for people alone: nothing in the run depends on it, so a clock may jump.

    Args:
        folder: the run folder.
        event: what happened.
        step: steps done.
    """
    time = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    with open_log(folder / EVENTS) as file:
        file.write(json.dumps({"time": time, "event": event, "step": step, **facts}) + "\n")


def save_config(config: RunConfig, folder: Path) -> None:
    """Write the resolved config, which `mezo-dist train` reads, with its SHA-256 in the first line."""
    body = yaml_file.dump(config.to_dict())
    digest = hashlib.sha256(body.encode()).hexdigest()
    replace_file(folder / CONFIG, f"# sha256 of the lines below: {digest}\n{body}".encode())


def write_results(folder: Path, results: Mapping[str, Json]) -> None:
    """Write ``results.json``; what is not finite becomes null, as JSON has no NaN."""
    text = json.dumps(_finite(dict(results)), indent=2, allow_nan=False)
    replace_file(folder / RESULTS, f"{text}\n".encode())


def read_results(folder: Path) -> JsonObject:
    """What `write_results` wrote; empty if nothing readable is there."""
    try:
        results = json.loads(read_in_place(folder / RESULTS, MOST_RESULTS_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s cannot be read (%s)", folder / RESULTS, error)
        return {}
    return results if isinstance(results, dict) else {}


def read_scores(folder: Path, name: str, needed: Iterable[str]) -> dict[str, float | None]:
    """The scores that ``results.json`` has under ``name``; empty unless they are numbers and all ``needed`` are there.

    A score of null was not finite.

    Args:
        folder: the run folder.
        name: which scores, such as ``before``.
        needed: names of scores that must be there.
    """
    scores = read_results(folder).get(name, {})
    if not isinstance(scores, dict) or not all(_is_score(value) for value in scores.values()):
        return {}
    return scores if set(needed) <= scores.keys() else {}


def _is_score(value: object) -> bool:
    return value is None or type(value) is float or (type(value) is int and abs(value) < 2**53)


def _finite(value: Json) -> Json:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
