"""What services call a run (``monitors.json`` in its folder), so that a run that goes on is the same one there."""

from __future__ import annotations

import json
import logging
import re
import threading
from pathlib import Path

from mezo_dist.storage.files import read_in_place, replace_file
from mezo_dist.storage.run_files import MONITORS

log = logging.getLogger(__name__)
ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
MOST_BYTES = 1 << 16
_lock = threading.Lock()


def known_id(folder: Path, service: str) -> str | None:
    """The run's id at a service; None if there is none that could be one."""
    value = _read(folder).get(service)
    return value if isinstance(value, str) and ID.fullmatch(value) else None


def keep_id(folder: Path, service: str, run_id: str) -> None:
    """Remember the run's id at a service.

    Raises:
        OSError: it cannot be written.
    """
    with _lock:  # each service has a thread
        replace_file(folder / MONITORS, json.dumps({**_read(folder), service: run_id}).encode())


def _read(folder: Path) -> dict[str, object]:
    try:
        content = json.loads(read_in_place(folder / MONITORS, MOST_BYTES))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s cannot be read (%s)", folder / MONITORS, error)
        return {}
    return content if isinstance(content, dict) else {}
