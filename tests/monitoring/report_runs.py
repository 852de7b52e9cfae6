"""Run folders to report on, without training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from mezo_dist.algorithms.base import Losses
from mezo_dist.config.schema import digest_of
from mezo_dist.storage.trajectory import Step
from mezo_dist.storage.trajectory_writer import TrajectoryWriter
from tests.storage import trajectories


def lines(path: Path, *items: Any) -> None:
    """Write a JSON line for each item."""
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def write_run(folder: Path, steps: int = 4, *, planned: int | None = None, counted: bool = True, **config: Any) -> Path:
    """A run of so many steps, its curves, events and results.

    Args:
        folder: where to.
        steps: taken.
        planned: to be taken; ``steps`` if None, and then there are results.
        counted: forward passes were counted.
        config: sections beside ``task`` and ``train``.
    """
    folder.mkdir(parents=True)
    settings = {
        "task": {"name": "films", "metric": "accuracy"},
        "train": {"steps": planned or steps, "calibrate": False},
        "algorithm": {"name": "mezo", "lr": 0.1},
        "output": {"dir": str(folder)},
        **config,
    }
    header = dataclasses.replace(
        trajectories.HEADER, config=settings, config_digest=digest_of(settings), base_model="a/model", seed=0
    )
    writer = TrajectoryWriter.begin(folder / "trajectory.jsonl", header)
    for step in range(steps):
        writer.append(Step(step, (Losses((0.75, 0.25)),), "0" * 8))
    writer.close()
    curves: list[Any] = [{"step": 0, "scalars": {"eval/validation/accuracy": 0.25, "eval/validation/loss": 0.75}}]
    for step in range(1, steps + 1):
        scalars = {"loss/train": 1 / step, "time/evaluate_s": 40.0, "time/update_s": 10.25}
        curves.append({"step": step, "scalars": scalars | ({"forward_passes_per_step": 1000} if counted else {})})
    curves.append({"step": steps, "scalars": {"eval/validation/accuracy": 0.5, "eval/validation/loss": 0.5}})
    lines(folder / "metrics.jsonl", *curves)
    lines(folder / "events.jsonl", {"event": "started", "step": 0, "ranks": 3}, {"event": "resumed", "ranks": 2})
    if planned is None:
        results = {
            "before": {"loss": 0.7, "accuracy": 0.53},
            "validation": {"loss": 0.5, "accuracy": 0.5},
            "after": {"loss": 0.4, "accuracy": 0.817},
            "samples": {"train": 96, "validation": 256, "test": 872},
        }
        (folder / "results.json").write_text(json.dumps(results))
    return folder
