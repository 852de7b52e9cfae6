"""A short trajectory with everything in it."""

from __future__ import annotations

from pathlib import Path

from mezo_dist.algorithms.base import Losses
from mezo_dist.config.schema import digest_of
from mezo_dist.storage.trajectory import Header, Mark, Step
from mezo_dist.storage.trajectory_writer import TrajectoryWriter

CONFIG = {"seed": 3, "train": {"steps": 2}}
HEADER = Header(
    config=CONFIG,
    config_digest=digest_of(CONFIG),
    base_model="a/model@main",
    base_fingerprint="0123456789abcdef",
    model_config="c" * 32,
    tokenizer="t" * 32,
    data={"train": "a" * 32},
    law_version="law/v1",
    weights="float32, to nearest",
    seed=3,
    full_size=30,
    version="0.1",
)
STEPS = [
    Step(0, (Losses((0.1, 1 / 3)),), "00000000"),
    Step(1, (), skipped="a loss is not finite"),
    Step(2, (Losses((0.5, 0.25), ((0.1, 0.9), (1e-300, 2.0**29))), Losses((5e-324, 7.0))), "12345678"),
]
FINGERPRINT = "fedcba9876543210"


def write(path: Path, entries: list[Step | Mark]) -> Path:
    writer = TrajectoryWriter.begin(path, HEADER)
    for entry in entries:
        writer.append(entry)
    writer.close()
    return path
