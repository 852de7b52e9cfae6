"""Every setting of a run, typed and documented (torch-free). `mezo_dist.config_reader` reads them from files.

Contradictory settings are errors that name the setting, before any model is loaded. The resolved config (every
setting, defaults included) is saved with the run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal, Union

from mezo_dist.tasks.task import Task

MAX_TIMEOUT_S = 1e6  # 11 days; far below what overflows in torch's timers


@dataclass(frozen=True)
class ModelConfig:
    """Which model, with which head, in which precision."""

    name: str
    """Hub name, local folder, or ``demo:NAME`` (``python -m mezo_dist.assets`` lists those)."""
    revision: Union[str, None] = None  # noqa: UP007 (jsonargparse reads it on Python 3.10 too)
    """Branch, tag or commit of a hub model."""
    head: Literal["label-words", "classifier"] = "label-words"
    """``label-words``: the language-model head read at the task's label words (prompted, causal or masked);
    ``classifier``: a fresh classification head on unprompted text (the paper's main setting)."""
    kind: Literal["auto", "causal", "masked"] = "auto"
    """For ``label-words``: which head the model has; ``auto`` asks its config."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """dtype in which weights are kept and updated. bfloat16 weights are updated with stochastic rounding; float16
    is not offered, as it loses small updates."""
    compute: Union[Literal["float32", "bfloat16", "float16"], None] = None  # noqa: UP007
    """dtype of the forward passes; that of the weights if null."""
    freeze: tuple[str, ...] = ()
    """Weights to leave alone: shell patterns over their names, such as ``*embed*`` or ``model.layers.[0-9].*``."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint. Off, as it is anybody's code."""

    def __post_init__(self) -> None:
        if self.head == "classifier" and self.kind != "auto":
            raise ValueError(f"model.kind: {self.kind} is for model.head: label-words; leave it out")


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = 1000
    """Steps, anchor steps included."""
    batch_size: int = 16
    """Samples of a minibatch, over all ranks."""
    full_size: Union[int, None] = None  # noqa: UP007
    """Samples of a full batch (anchors): a fresh draw of so many for every anchor; all training samples if null."""
    micro_batch: int = 8
    """Samples per forward pass. Micro-batches are the unit of work dealt to ranks, the same on any number of them."""
    width: int = 8
    """Micro-batches that go through the model in lock step, sharing one making of the variants' weights."""
    max_tokens: Union[int, None] = None  # noqa: UP007
    """Longest sequence; the model's window if null."""
    evaluate_every: int = 0
    """Steps between evaluations on the validation split; 0: only at the end."""
    max_skipped: int = 10
    """Steps in a row that may be skipped for a loss that is not finite before the run gives up."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch", "width", "max_skipped"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}: must be at least 1, not {getattr(self, name)}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"train.max_tokens: must be at least 1 or null, not {self.max_tokens}")
        if self.evaluate_every < 0:
            raise ValueError(f"train.evaluate_every: must be at least 0, not {self.evaluate_every}")
        if self.full_size is not None and self.full_size < self.batch_size:
            raise ValueError(f"train.full_size: {self.full_size} is less than train.batch_size {self.batch_size}")


@dataclass(frozen=True)
class OutputConfig:
    """The run folder."""

    dir: str = "runs/run"
    """Folder for the trajectory, logs, resolved config and results."""
    if_exists: Literal["error", "new", "resume"] = "error"
    """What to do when the folder holds a run: stop, use the next free name (run-2, run-3 ...), or go on with it."""
    export: bool = True
    """Write the fine-tuned model as a Hugging Face folder at the end."""
    test: bool = True
    """Evaluate on the test split before and after training."""


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes talk."""

    timeout_s: float = 600.0
    """Seconds after which a rank that does not answer ends the run."""

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s < MAX_TIMEOUT_S:
            raise ValueError(f"distributed.timeout_s: must lie between 0 and {MAX_TIMEOUT_S:g}, not {self.timeout_s}")


@dataclass(frozen=True)
class RunConfig:
    """A run of mezo_dist."""

    model: ModelConfig
    """Which model."""
    task: Task
    """What to learn: a task file, or its contents."""
    algorithm: Any
    """Settings of the algorithm ``algorithm.name``, an instance of its class in `mezo_dist.algorithms.ALGORITHMS`."""
    law: Literal["gaussian", "rademacher", "lowrank"] = "gaussian"
    """Law of the directions. ``lowrank`` makes those of matrices products of thin gaussian factors, which allows
    ``algorithm.per_sample``."""
    rank: int = 1
    """Rank of low-rank directions."""
    engine: Literal["replicated"] = "replicated"
    """What owns the weights: ``replicated`` keeps a copy in every process."""
    seed: int = 0
    """Seed of directions and batch order."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The loop."""
    output: OutputConfig = field(default_factory=OutputConfig)
    """The run folder."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """How the processes talk."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank: must be at least 1, not {self.rank}")
        if self.algorithm.per_sample and self.law != "lowrank":
            raise ValueError(f"algorithm.per_sample: a direction per sample needs law: lowrank, not {self.law}")
        if self.model.head == "classifier" and not self.task.plain:
            raise ValueError("task.plain: missing; model.head: classifier needs a text without prompt")

    def to_dict(self) -> dict[str, Any]:
        """Every setting as nested dicts of JSON types, in the shape of a config file."""
        data: dict[str, Any] = _plain(dataclasses.asdict(self))
        return data

    def digest(self) -> str:
        """SHA-256 of all settings except ``output`` and ``distributed``, which do not change what is computed."""
        data = self.to_dict()
        del data["output"], data["distributed"]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
