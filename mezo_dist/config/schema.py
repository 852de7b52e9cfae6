"""Every setting of a run, typed and documented (torch-free). `mezo_dist.config.reader` reads them from files.

Contradictory settings are errors that name the setting, before any model is loaded. The resolved config (every
setting, defaults included) is saved with the run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal, Union

from mezo_dist.config.task import Task

NO_RESULTS = ("layout", "output", "distributed")
"""Sections that do not change what is computed: a run may go on with others."""
ModelKind = Literal["causal", "masked", "classifier"]
"""What answers: the language-model head of a causal or a masked model, or a classification head."""
MAX_TIMEOUT_S = 1e6  # 11 days; far below what overflows in torch's timers


@dataclass(frozen=True)
class PeftConfig:
    """Train a few added weights in place of the model's own, with peft (``pip install 'mezo_dist[peft]'``)."""

    method: Union[Literal["lora", "prefix"], None] = None  # noqa: UP007
    """``lora``: low-rank matrices beside linear layers; ``prefix``: keys and values of virtual tokens before the text
    (causal models). The weights of the checkpoint are frozen then; ``model.trainable`` and ``model.freeze`` choose
    among the rest. What is exported is a folder that peft loads on top of the model. Null: neither."""
    r: int = 8
    """For ``lora``: rank."""
    alpha: float = 16.0
    """For ``lora``: what is added is scaled by ``alpha`` / ``r``."""
    target_modules: tuple[str, ...] = ()
    """For ``lora``: ends of the names of the linear layers, such as ``q_proj`` or ``layers.29.mlp.up_proj``; if empty,
    those that peft names for the architecture."""
    num_virtual_tokens: int = 16
    """For ``prefix``: how many; they count in the model's window."""

    def __post_init__(self) -> None:
        owners = {"r": "lora", "alpha": "lora", "target_modules": "lora", "num_virtual_tokens": "prefix"}
        for setting, owner in owners.items():
            if self.method != owner and getattr(self, setting) != getattr(PeftConfig, setting):
                raise ValueError(f"model.peft.{setting}: is a setting of model.peft.method: {owner}")
        for setting in ("r", "alpha", "num_virtual_tokens"):
            if not 0 < getattr(self, setting) < math.inf:
                raise ValueError(f"model.peft.{setting}: must be above 0, not {getattr(self, setting)}")


@dataclass(frozen=True)
class ModelConfig:
    """Which model, with which head, in which precision."""

    name: str
    """Hub name, local folder, ``demo:NAME`` (``python -m mezo_dist.assets`` lists those), or ``random:PATH`` for random
    weights of the shape that a Hugging Face config (a folder, or its config.json) describes, for benchmarks."""
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
    trainable: tuple[str, ...] = ("*",)
    """Weights to train: shell patterns over their names, such as ``*norm*`` or ``model.layers.2[0-9].*``."""
    freeze: tuple[str, ...] = ()
    """Weights to leave alone among those: shell patterns too, such as ``*embed*`` or ``model.layers.[0-9].*``."""
    peft: PeftConfig = field(default_factory=PeftConfig)
    """LoRA or prefix tuning."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint. Off, as it is anybody's code."""

    def __post_init__(self) -> None:
        if self.head == "classifier" and self.kind != "auto":
            raise ValueError(f"model.kind: {self.kind} is for model.head: label-words; leave it out")
        if self.peft.method == "prefix" and self.compute not in (None, self.weights):
            raise ValueError(f"model.compute: peft keeps prefixes in the dtype of model.weights ({self.weights})")


@dataclass(frozen=True)
class LayoutConfig:
    """Where the weights live."""

    name: Literal["replicated", "fsdp", "zero"] = "replicated"
    """``replicated``: a copy in every process; ``fsdp``: sharded by torch's FSDP2; ``zero``: by DeepSpeed's ZeRO-3."""
    replicate: int = 1
    """For ``fsdp``: copies of the weights, each sharded over (number of processes / ``replicate``) of them."""
    blocks: tuple[str, ...] = ()
    """Classes of the modules whose weights are gathered together, such as ``LlamaDecoderLayer``; if empty, the model
    says so itself (``_no_split_modules``), or its longest list of equal blocks is taken."""
    gather: Union[Literal["float32", "bfloat16", "float16"], None] = None  # noqa: UP007
    """For ``fsdp``: dtype in which weights are gathered; ``model.compute`` if null. float32 with compute: bfloat16
    gives the same bits as ``replicated``, at twice the traffic."""
    offload: bool = False
    """For ``fsdp``: keep shards in host memory. ``zero`` takes offloading from ``ds_config``."""
    prefetch: bool = False
    """Gather a block's weights while the one before it computes; one block more is held in memory."""
    ds_config: Union[str, None] = None  # noqa: UP007
    """For ``zero``: your DeepSpeed config, a JSON file. Of it the section ``zero_optimization`` counts."""

    def __post_init__(self) -> None:
        owners = {"replicate": "fsdp", "gather": "fsdp", "offload": "fsdp", "ds_config": "zero"}
        for setting, owner in owners.items():
            if self.name != owner and getattr(self, setting) not in (None, False, 1):
                raise ValueError(f"engine.{setting}: is a setting of layout.name: {owner}, not of {self.name}")
        if self.replicate < 1:
            raise ValueError(f"layout.replicate: must be at least 1, not {self.replicate}")


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
    width: Union[int, None] = None  # noqa: UP007
    """Micro-batches that go through the model in lock step, sharing one gather of the weights and one making of the
    variants; if null, as many as a quarter of the free memory holds. Changes no result."""
    frozen_cache_gib: float = 1.0
    """Memory for the frozen blocks, in GiB per process: where nothing in the first blocks is trainable
    (``model.trainable``), what they give for a sample is remembered, and they are skipped from then on. Not done on
    sharded engines; 0 where a run on one is to have the same bits."""
    max_tokens: Union[int, None] = None  # noqa: UP007
    """Longest sequence; the model's window if null."""
    evaluate_every: int = 0
    """Steps between evaluations on the validation split; 0: only at the end."""
    calibrate: bool = False
    """Take what the model says about a class in general out of the losses, which makes estimates far less noisy:
    every batch is scored with the offsets of the classes' logits that give it the least loss, and predictions with
    those that give (up to 1,024) training samples the least. Losses of minibatches are biased low by that, and must
    not be compared with validation losses. Whoever uses the exported model must add the offsets, too: they are in its
    ``calibration.json``, unless its head has a bias, which then holds them."""
    max_skipped: int = 10
    """Steps in a row that may be skipped for a loss that is not finite before the run gives up."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch", "width", "max_skipped"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"train.{name}: must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.frozen_cache_gib < math.inf:
            raise ValueError(f"train.frozen_cache_gib: must be at least 0, not {self.frozen_cache_gib}")
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
    if_exists: Literal["error", "new", "resume", "replace"] = "error"
    """What to do when the folder holds a run: stop, use the next free name (run-2, run-3 ...), go on with it, or rename
    that folder (to run.old, run.old-2 ...) and start anew (``--force-new``). Nothing is ever deleted."""
    sync_s: Union[float, None] = 0.0  # noqa: UP007
    """Seconds between waits until the trajectory is on the disk. 0: every step, so that nothing is lost; null: never,
    so what a dying machine had not written yet is lost (a dying process loses nothing)."""
    snapshot_every: int = 0
    """Steps between snapshots of the weights; 0: none. A run can go on without any, by adding up the trajectory again,
    which a snapshot shortens."""
    snapshots_kept: int = 2
    """How many snapshots are kept, the newest ones."""
    export: bool = True
    """Write the fine-tuned model as a Hugging Face folder at the end."""
    test: bool = True
    """Evaluate on the test split before and after training."""

    def __post_init__(self) -> None:
        if self.sync_s is not None and not self.sync_s >= 0:
            raise ValueError(f"output.sync_s: must be at least 0, or null, not {self.sync_s}")
        if self.snapshot_every < 0:
            raise ValueError(f"output.snapshot_every: must be at least 0, not {self.snapshot_every}")
        if self.snapshots_kept < 1:
            raise ValueError(f"output.snapshots_kept: must be at least 1, not {self.snapshots_kept}")


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes talk."""

    timeout_s: float = 600.0
    """Seconds after which a rank that does not answer ends the run."""
    patience_s: float = 30.0
    """Seconds after which a rank that waits for another one says so, and for which."""
    variant_groups: Union[int, None] = None  # noqa: UP007
    """Several directions in parallel, where processes hold several copies of the weights (engine ``replicated``, or
    ``fsdp`` with ``replicate``): so many groups of them take a part of a step's variants each, and share out the
    micro-batches within the group. 1: every process evaluates all variants. Null: whatever gives the busiest process
    least to do, which splits if there are fewer micro-batches than processes. More groups make fewer variants of the
    weights per process, which pays where that takes longer than the forward passes. Changes no result."""
    stop_exit_code: int = 143
    """Exit status after SIGTERM (which finishes the step and writes a snapshot): 143, as for any process that it ended,
    or 0, so that a scheduler does not take it for a failure."""

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s < MAX_TIMEOUT_S:
            raise ValueError(f"distributed.timeout_s: must lie between 0 and {MAX_TIMEOUT_S:g}, not {self.timeout_s}")
        if not self.patience_s > 0:
            raise ValueError(f"distributed.patience_s: must be larger than 0, not {self.patience_s}")
        if self.variant_groups is not None and self.variant_groups < 1:
            raise ValueError(f"distributed.variant_groups: must be at least 1, or null, not {self.variant_groups}")
        if not 0 <= self.stop_exit_code < 256:
            raise ValueError(f"distributed.stop_exit_code: must lie between 0 and 255, not {self.stop_exit_code}")


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
    direction_rank: int = 1
    """Rank of low-rank directions."""
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    """Where the weights live."""
    seed: int = 0
    """Seed of directions and batch order."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The loop."""
    output: OutputConfig = field(default_factory=OutputConfig)
    """The run folder."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """How the processes talk."""

    def __post_init__(self) -> None:
        if self.direction_rank < 1:
            raise ValueError(f"direction_rank: must be at least 1, not {self.direction_rank}")
        if getattr(self.algorithm, "per_sample", False) and self.law != "lowrank":
            raise ValueError(f"algorithm.per_sample: a direction per sample needs law: lowrank, not {self.law}")
        if getattr(self.algorithm, "per_sample", False) and self.train.calibrate:
            raise ValueError(
                "train.calibrate: needs directions that all samples of a batch share; set algorithm.per_sample to false"
            )
        if self.model.head == "classifier" and not self.task.plain:
            raise ValueError("task.plain: missing; model.head: classifier needs a text without prompt")

    def to_dict(self) -> dict[str, Any]:
        """Every setting as nested dicts of JSON types, in the shape of a config file."""
        data: dict[str, Any] = _plain(dataclasses.asdict(self))
        return data

    def digest(self) -> str:
        """SHA-256 of all settings except `NO_RESULTS`."""
        data = {name: value for name, value in self.to_dict().items() if name not in NO_RESULTS}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
