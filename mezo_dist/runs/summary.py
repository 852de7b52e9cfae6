"""A run in plain words: what is about to happen, and what did."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

from mezo_dist.algorithms import FirstOrder
from mezo_dist.config.schema import RunConfig
from mezo_dist.json_types import JsonObject
from mezo_dist.monitoring.scalars import figure
from mezo_dist.runs.build import Run
from mezo_dist.runs.looks import evaluation_interval
from mezo_dist.storage import trajectory
from mezo_dist.storage.run_files import SNAPSHOTS
from mezo_dist.storage.snapshots import folder_name


def facts(run: Run, folder: Path) -> list[tuple[str, str]]:
    """What is about to happen, as rows of (name, value): shown before step 1."""
    config, loaded = run.config, run.pretrained
    trainable = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
    sizes = ", ".join(f"{len(samples)} {name}" for name, samples in run.splits.items())
    algorithm = ", ".join(
        f"{k} {v}" for k, v in vars(config.algorithm).items() if v == "auto" or (v and isinstance(v, (int, float)))
    )
    return [
        ("model", f"{config.model.name} ({trainable / 1e6:.1f}M trainable weights, {config.model.weights})"),
        ("task", f"{config.task.name} ({config.task.kind}): {sizes} samples"),
        ("algorithm", f"{config.algorithm.name}: {algorithm}"),
        ("directions", _directions(config)),
        ("losses", _losses(config)),
        ("layout", f"{config.layout.name}, {run.comm.world_size} process(es)"),
        ("steps", f"{config.train.steps} of {config.train.batch_size} samples"),
        ("looks", _looks(run)),
        ("run folder", str(folder)),
    ]


def _looks(run: Run) -> str:
    interval = evaluation_interval(run)
    return f"validation before training and every {interval} steps" if interval else "validation at the end"


def _directions(config: RunConfig) -> str:
    if not isinstance(config.algorithm, FirstOrder):
        return f"{config.law}, run seed {config.seed}"
    again = ", with blocks computed again" if config.train.gradient_checkpointing else ""
    return f"exact gradients, by back-propagation{again}; run seed {config.seed}"


def _losses(config: RunConfig) -> str:
    if config.train.objective == "metric":
        return f"minus {config.task.metric} of each batch"
    if config.train.objective == "reward":
        return f"minus the reward of each text ({', '.join(config.reward.sources)})"
    return "calibrated (biased low: not to be compared with validation losses)" if config.train.calibrate else "plain"


def summary(run: Run, folder: Path, results: JsonObject) -> list[str]:
    """What happened, and what to try next.

    Args:
        run: the run.
        folder: its folder.
        results: what results.json gets. ``before`` may come from an older results.json, which anybody can edit.

    Returns:
        Lines.
    """
    metric, log = run.config.task.metric, folder / trajectory.FILE
    before, after = (_figures(results.get(key), (metric, "loss")) for key in ("before", "after"))
    is_first_order = isinstance(run.config.algorithm, FirstOrder)
    how = "by back-propagation" if is_first_order else "with forward passes only"
    lines = [""]
    if before and after:
        merits, losses = (f"from {figure(was, 3)} to {figure(now, 3)}" for was, now in zip(before, after, strict=True))
        lines.append(
            f"On {len(run.splits['test'])} held-out test samples {metric} went {merits} and the loss {losses}, {how}, "
            f"in {results['steps']} steps ({results['training_s']:.0f} s)."
        )
    lines += [
        _whereabouts(run, folder, results["steps"])
        if is_first_order
        else f"The whole fine-tuning is in {log} ({log.stat().st_size / 1024:.0f} KiB): base model + this file = the "
        "fine-tuned model.",
        "What to try next:",
        f"  mezo-dist report {shlex.quote(str(folder))}",
    ]
    if "tensorboard" in run.config.monitor:
        lines.append(f"  tensorboard --logdir {shlex.quote(str(folder))}")
    if run.config.output.export:
        package, loader = run.pretrained.loader
        code = f"import {package} as t; t.{loader}.from_pretrained({json.dumps(str(folder / 'model'))})"
        lines.append(f"  python -c {shlex.quote(code)}")
    return [*lines, f"  mezo-dist evaluate {shlex.quote(str(folder))}"]


def _whereabouts(run: Run, folder: Path, steps: int) -> str:
    """Where the weights of a first-order run are; a full disk may have left no snapshot after the last step.

    Args:
        run: the run.
        folder: its folder.
        steps: number of its steps.
    """
    if (folder / SNAPSHOTS / folder_name(steps)).is_dir():
        return (
            f"The weights are in the last snapshot in {folder / SNAPSHOTS}; {folder / trajectory.FILE} has the losses."
        )
    return f"The weights are in {folder / 'model'} alone." if run.config.output.export else "The weights are not saved."


def _figures(metrics: object, names: tuple[str, ...]) -> list[float] | None:
    """The named metrics, NaN for one that was not finite; None unless all are there as numbers."""
    if not isinstance(metrics, dict) or any(name not in metrics for name in names):
        return None
    values = [math.nan if metrics[name] is None else metrics[name] for name in names]
    return values if all(isinstance(value, float) for value in values) else None
