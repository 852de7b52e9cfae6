"""A run in plain words: what is about to happen, and what did."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mezo_dist.runs.build import Run
from mezo_dist.storage import trajectory


def facts(run: Run, folder: Path) -> list[tuple[str, str]]:
    """What is about to happen, for people: shown before step 1."""
    config, loaded = run.config, run.pretrained
    trainable = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
    sizes = ", ".join(f"{len(samples)} {name}" for name, samples in run.splits.items())
    algorithm = ", ".join(f"{k} {v}" for k, v in vars(config.algorithm).items() if v and isinstance(v, (int, float)))
    return [
        ("model", f"{config.model.name} ({trainable / 1e6:.1f}M trainable weights, {config.model.weights})"),
        ("task", f"{config.task.name}: {sizes} samples"),
        ("algorithm", f"{config.algorithm.name}: {algorithm}"),
        ("directions", f"{config.law}, run seed {config.seed}"),
        ("losses", "calibrated" if config.train.calibrate else "plain"),
        ("engine", f"{config.layout.name}, {run.comm.world_size} process(es)"),
        ("steps", f"{config.train.steps} of {config.train.batch_size} samples"),
        ("run folder", str(folder)),
    ]


def summary(run: Run, folder: Path, results: dict[str, Any]) -> str:
    """What happened, in plain words, and what to try next."""
    metric, log = run.config.task.metric, folder / trajectory.FILE
    lines = [""]
    if results.get("before") and results.get("after"):
        before = {key: math.nan if value is None else value for key, value in results["before"].items()}
        after = results["after"]
        lines.append(
            f"On {len(run.splits['test'])} held-out test samples {metric} went from {before[metric]:.3f} to "
            f"{after[metric]:.3f} and the loss from {before['loss']:.3f} to {after['loss']:.3f}, with forward passes "
            f"only, in {results['steps']} steps ({results['training_s']:.0f} s)."
        )
    lines += [
        f"The whole fine-tuning is in {log} ({log.stat().st_size / 1024:.0f} KiB): base model + this file = the "
        "fine-tuned model.",
        "What to try next:",
        f"  tensorboard --logdir {folder}",
    ]
    if run.config.output.export:
        package, loader = run.pretrained.loader
        lines.append(f"  python -c \"import {package} as t; t.{loader}.from_pretrained('{folder / 'model'}')\"")
    return "\n".join([*lines, f"  mezo-dist evaluate {folder}"])
