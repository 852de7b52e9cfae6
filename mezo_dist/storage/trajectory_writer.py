"""Writing the trajectory: a step counts as done when it is on disk, and not before."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import final

from mezo_dist.errors import UserError
from mezo_dist.storage.files import replace_file
from mezo_dist.storage.trajectory import FORMAT, Header, Log, Mark, Step, parse, read_bytes, to_line

log = logging.getLogger(__name__)


@final
class TrajectoryWriter:
    """Appends lines to a trajectory file. Only rank 0 has one. `begin` and `go_on` make one.

    Args:
        path: of a file that ends with a whole line.
        check: what the next line is chained to.
        sync_s: seconds between waits for the disk; 0: after every line; None: never. Without waiting, what the
            process wrote survives its death, but not the machine's.
        clock: seconds from any origin, never going back.
    """

    def __init__(
        self, path: Path, check: str, sync_s: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path, self._check, self._sync_s, self._clock = path, check, sync_s, clock
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
        self.size = os.fstat(self._file).st_size
        self._synced_s = clock()

    @staticmethod
    def begin(path: Path, header: Header, sync_s: float | None = 0.0) -> TrajectoryWriter:
        """Start a new file. It appears with its header or not at all.

        Args:
            path: of the new file.
            header: its first line.
            sync_s: see `TrajectoryWriter`.

        Raises:
            FileExistsError: there is one.
            UserError: it cannot be written.
        """
        if path.exists() and parse(read_bytes(path), path) is not None:
            raise FileExistsError(path)
        line, _ = to_line({"format": FORMAT, **vars(header)}, "")
        try:
            replace_file(path, line)
        except OSError as error:
            raise UserError(f"output.dir: {path} cannot be written ({error.strerror}); {_REMEDY}") from error
        return TrajectoryWriter(path, header.identity, sync_s)

    @staticmethod
    def go_on(path: Path, recorded: Log, sync_s: float | None = 0.0) -> TrajectoryWriter:
        """Go on with a file that was read as ``recorded``; a torn last line is cut.

        Args:
            path: of the file.
            recorded: what was read from it.
            sync_s: see `TrajectoryWriter`.

        Raises:
            UserError: it cannot be written, or grew since it was read.
        """
        try:
            writer = TrajectoryWriter(path, recorded.check, sync_s)
            if writer.size != recorded.size + recorded.torn:
                raise UserError(f"{path} changed since it was read: another job is writing to it")
            if recorded.torn:
                log.warning("%s: cut a torn last line of %d bytes", path, recorded.torn)
                os.ftruncate(writer._file, recorded.size)
                writer.size = recorded.size
            return writer
        except OSError as error:
            raise UserError(f"output.dir: {path} cannot be written ({error.strerror}); {_REMEDY}") from error

    def append(self, entry: Step | Mark) -> None:
        """Write one line; it is on disk when this returns (see ``sync_s``).

        Raises:
            UserError: that failed (full disk, broken disk), or the file is no longer there. It is as it was before, so
                the run can go on later.
            ValueError: a number in it is not finite.
        """
        line, check = to_line(entry.to_json(), self._check)
        self._check_place()
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
            self._sync()
        except OSError as error:
            with contextlib.suppress(OSError):  # a torn line is cut when the run goes on
                os.ftruncate(self._file, self.size)
            what = f"step {entry.step}" if isinstance(entry, Step) else "a fingerprint"
            raise UserError(
                f"output.dir: {self._path}: {what} could not be logged ({error.strerror}), and so was not done; "
                f"nothing before it is lost: {_REMEDY}"
            ) from error
        self._check, self.size = check if isinstance(entry, Step) else self._check, self.size + len(line)

    def close(self) -> None:
        """Close the file."""
        if self._sync_s is not None:
            os.fsync(self._file)
        os.close(self._file)

    def _check_place(self) -> None:
        """Raises UserError if the file was removed or renamed: nobody would see what is written to it."""
        mine, there = os.fstat(self._file), None
        with contextlib.suppress(OSError):
            there = os.stat(self._path, follow_symlinks=False)
        if there is None or (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino):
            raise UserError(
                f"output.dir: {self._path} was removed or renamed while the run went on; if it was renamed, nothing is "
                "lost: name it as it was, then go on with --output.if_exists=resume"
            )

    def _sync(self) -> None:
        now = self._clock()
        if self._sync_s is not None and now - self._synced_s >= self._sync_s:
            os.fsync(self._file)
            self._synced_s = now


_REMEDY = "make room, then go on with --output.if_exists=resume"
