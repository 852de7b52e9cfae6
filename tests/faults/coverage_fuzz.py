"""Coverage-guided fuzzing of everything that reads files from others; not part of the test suite, as it knows no end.

    pip install atheris
    python tests/faults/coverage_fuzz.py -max_total_time=60

Every input must be read, or refused with a `UserError`; anything else, a hang or a blow-up of memory ends the program
and leaves the input in a file crash-..., which belongs into a test then. Options are libFuzzer's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
with atheris.instrument_imports(include=["mezo_dist"]):
    from mezo_dist.config import reader
    from mezo_dist.distributed.communicator import Communicator
    from mezo_dist.errors import UserError
    from mezo_dist.runs import training
    from mezo_dist.storage import safetensors_io, trajectory
    from mezo_dist.tasks.templates import render
    from mezo_dist.testing import write_tiny_config

FOLDER = Path(tempfile.mkdtemp(prefix="mezo-fuzz-"))


def from_file(read: Callable[[Path], object], name: str) -> Callable[[bytes], object]:
    """``read`` of a file with the given content."""

    def run(data: bytes) -> object:
        (FOLDER / name).write_bytes(data)
        return read(FOLDER / name)

    return run


FIELDS = {"text": "a dull film"}
READERS: list[Callable[[bytes], object]] = [
    from_file(trajectory.read, "trajectory.jsonl"),
    from_file(safetensors_io.read_header, "model.safetensors"),
    lambda data: render(data.decode("utf-8", "replace"), FIELDS, FIELDS),
    from_file(reader.load, "config.yaml"),
]
"""The first byte of an input says which."""


def one(data: bytes) -> None:
    """What libFuzzer calls."""
    if data:
        with contextlib.suppress(UserError):
            READERS[data[0] % len(READERS)](data[1:])


def seeds() -> list[bytes]:
    """One sound file for each reader."""
    config = write_tiny_config(FOLDER / "job", steps=2)
    run = training.train(reader.load(config), Communicator())
    header = json.dumps({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
    return [
        (run / "trajectory.jsonl").read_bytes(),
        struct.pack("<Q", len(header)) + header + bytes(16),
        b"{{ text }} It was {% if text %}{{ text | upper }}{% endif %}",
        config.read_bytes(),
    ]


if __name__ == "__main__":
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    for number, content in enumerate(seeds()):
        (corpus / str(number)).write_bytes(bytes([number]) + content)
    logging.disable(logging.CRITICAL)
    atheris.Setup([sys.argv[0], str(corpus), "-rss_limit_mb=4096", "-timeout=20", *sys.argv[1:]], one)
    atheris.Fuzz()
