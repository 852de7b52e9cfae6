"""From the config of a run to what the cost model knows of it."""

from __future__ import annotations

from typing import Literal

from mezo_dist.algorithms import FirstOrder
from mezo_dist.algorithms.mezo import MeZO
from mezo_dist.config.schema import RunConfig
from mezo_dist.planning.setting import Setting


def setting_of(config: RunConfig, notes: list[str]) -> Setting:
    """What a run's config says, and assumptions about what only its data tell. In place of a first-order baseline
    it has MeZO, and a note says so.

    Args:
        config: the run's.
        notes: gets what people must know about them.
    """
    train, model, layout = config.train, config.model, config.layout
    reads, targets = "labels", 1
    if config.task.kind in ("choice", "completion"):
        reads, targets = "tokens", 128
    elif config.task.kind == "generation":
        targets = int(getattr(config.task, "max_new_tokens", 128))
        reads = "tokens" if train.objective == "loss" else "texts"
    if model.peft.method is not None:
        what = "model.peft is" if model.quantise is None else "model.peft and model.quantise are"
        notes.append(f"{what} not planned: figures are those of training the model's own weights")
    algorithm = config.algorithm
    if isinstance(algorithm, FirstOrder):
        notes.append(f"{algorithm.name} itself stands in the table of back-propagation; planned are mezo and mezo-svrg "
                     "with the other settings of the config")  # fmt: skip
        algorithm = MeZO()
    num_train = config.task.splits.train.size
    joint, columns = _joint(config)
    return Setting(
        layout.name,
        layout.replicate,
        model.weights,
        model.compute,
        layout.gather,
        layout.prefetch,
        layout.offload,
        algorithm,
        config.law,
        config.direction_rank,
        train.batch_size,
        train.full_size or num_train or 512,
        train.micro_batch,
        train.width,
        train.max_tokens or 512,
        reads=reads,  # type: ignore[arg-type]
        targets=targets,
        joint=joint,
        columns=columns,
        frozen_cache=round(train.frozen_cache_gib * 2**30),
        compiled=train.compile != "off",
        num_train=num_train,
    )


def _joint(config: RunConfig) -> tuple[Literal["batch", "samples"] | None, int]:
    """`Setting.joint` and `Setting.columns` of a run; where only the data tell the options of a choice, four."""
    train, task = config.train, config.task
    if not (train.calibrate or train.objective != "loss"):
        return None, 1
    columns = {
        "classification": len(getattr(task, "labels", ())),
        "choice": len(getattr(task, "options", ())) or 4,
        "generation": int(getattr(task, "max_new_tokens", 1)) + ("loss" in config.reward.sources),
    }.get(task.kind, 1)
    is_batch = train.calibrate or (train.objective == "metric" and not task.metric_is_mean)
    return "batch" if is_batch else "samples", columns
