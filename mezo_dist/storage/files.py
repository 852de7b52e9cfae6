"""Files that survive a crash: written whole or not at all, and logs whose last line may be torn."""

from __future__ import annotations

import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)


def replace_file(path: Path, content: bytes) -> None:
    """Write ``path`` so that at any moment it has its old content or the new one. On disk when this returns.

    Raises:
        OSError: as writing does; the old file is still there then.
    """
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in ``folder`` are on disk: a new file is lost with its name."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cut_torn_line(path: Path) -> None:
    """Remove a last line without its end, so that the file can be appended to."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        log.warning("%s: cut a torn last line of %d bytes", path, len(data) - whole)
        os.truncate(path, whole)
