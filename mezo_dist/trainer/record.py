"""The trajectory of a `MeZOTrainer`: in memory on every rank, on disk as it grows, and beside every checkpoint.

A checkpoint's optimizer state holds the whole of it (a few bytes a step), so that a run can be gone on with from the
checkpoint's folder alone.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import final

from mezo_dist.errors import UserError
from mezo_dist.storage.files import replace_file
from mezo_dist.storage.trajectory import FILE, FORMAT, Header, Log, Mark, Step, parse, to_line
from mezo_dist.storage.trajectory_writer import TrajectoryWriter

log = logging.getLogger(__name__)


@final
class Record:
    """A trajectory: its header and the steps so far.

    Args:
        header: of a run that begins.

    Attributes:
        num_steps: steps in it.
        marks: steps done -> fingerprint of the weights, where one is known.
    """

    def __init__(self, header: Header) -> None:
        line, _ = to_line({"format": FORMAT, **vars(header)}, "")
        self._lines: list[tuple[int, bytes]] = [(0, line)]
        self._check = header.identity
        self._writer: TrajectoryWriter | None = None
        self.num_steps = 0
        self.marks: dict[int, str] = {}

    @staticmethod
    def of(recorded: Log) -> Record:
        """A record that goes on where ``recorded`` ends."""
        record = Record(recorded.header)
        for number, step in enumerate(recorded.steps):
            if number in recorded.marks:
                record.append(recorded.marks[number])
            record.append(step)
        if len(recorded.steps) in recorded.marks:
            record.append(recorded.marks[len(recorded.steps)])
        return record

    def append(self, entry: Step | Mark) -> None:
        """Add a step, or the fingerprint of the weights; it is on disk when this returns, if the file is open.

        Raises:
            UserError: it could not be written.
        """
        line, check = to_line(entry.to_json(), self._check)
        if self._writer is not None:
            self._writer.append(entry)
        if isinstance(entry, Step):
            self._check = check
            self.num_steps += 1
        else:
            self.marks[entry.done] = entry.weights
        self._lines.append((self.num_steps, line))

    def text(self, num_steps: int | None = None) -> str:
        """The file's contents, up to ``num_steps`` steps (all if None)."""
        last = self.num_steps if num_steps is None else num_steps
        return b"".join(line for done, line in self._lines if done <= last).decode()

    def open(self, path: Path) -> None:
        """Write the file, and every further line to it. A file of another run that is in the way is moved aside.

        Raises:
            UserError: it cannot be written.
        """
        if self._writer is not None:
            return
        text = self.text().encode()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.read_bytes().startswith(text):
                aside = next(p for n in range(1, 10**6) if not (p := path.with_name(f"{path.stem}-{n}.jsonl")).exists())
                path.rename(aside)
                log.warning("%s is of an earlier run; it is now called %s", path, aside.name)
            replace_file(path, text)
        except OSError as error:
            raise UserError(f"output_dir: {path} cannot be written ({error.strerror})") from error
        recorded = parse(text, path)
        assert recorded is not None  # its header was written above
        self._writer = TrajectoryWriter.go_on(path, recorded)

    def write(self, folder: Path, num_steps: int) -> None:
        """Write its first ``num_steps`` steps as the trajectory of the weights in ``folder``.

        Raises:
            UserError: it cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(folder / FILE, self.text(num_steps).encode())
        except OSError as error:
            raise UserError(f"output_dir: {folder / FILE} cannot be written ({error.strerror})") from error

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
