"""Every setting of a run, typed and documented (torch-free). `mezo_dist.config.reader` reads them from files.

The annotations are what pydantic checks values against, and the docstrings are what ``mezo-dist train --help`` shows.
Values out of range and contradictory settings raise a ValueError that begins with the setting's name, before any model
is loaded. The resolved config (every setting, defaults included) is saved with the run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Discriminator

from mezo_dist.algorithms import FirstOrder, Settings
from mezo_dist.algorithms.ranges import MANY, check_ranges
from mezo_dist.config.contradictions import check_contradictions
from mezo_dist.config.kinds import Task
from mezo_dist.config.lines import check_lines
from mezo_dist.config.paths import located
from mezo_dist.config.reward import RewardConfig
from mezo_dist.json_types import JsonObject

NO_RESULTS = ("layout", "output", "monitor", "distributed", "origin")
"""Sections that do not change what is computed: a run may go on with others."""
ModelKind = Literal["causal", "masked", "classifier"]
"""What answers: the language-model head of a causal or a masked model, or a classification head."""
MAX_TIMEOUT_S = 10**6  # 11 days; far below what overflows in torch's timers
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class PeftConfig:
    """Train a few added weights in place of the model's own, with peft (``pip install 'mezo_dist[peft]'``)."""

    method: Literal["lora", "prefix"] | None = None
    """What is trained. ``lora``: low-rank matrices beside linear layers; ``prefix``: keys and values of virtual tokens
    before the text (causal models only); null: the model's own weights. With ``lora`` and ``prefix``, the weights of
    the checkpoint are frozen, ``model.trainable`` and ``model.freeze`` choose among the rest, and the exported
    folder is one that peft loads on top of the model."""
    r: int = 8
    """Rank of the matrices, for ``lora``."""
    alpha: float = 16.0
    """Scale, for ``lora``: the product of the matrices is multiplied by ``alpha`` / ``r``."""
    target_modules: tuple[str, ...] = ()
    """Linear layers that get matrices, for ``lora``: the ends of their names, such as ``q_proj`` or
    ``layers.29.mlp.up_proj``. If empty, peft chooses by the architecture."""
    num_virtual_tokens: int = 16
    """Number of virtual tokens, for ``prefix``. They count in the model's window."""

    def __post_init__(self) -> None:
        owners = {"r": "lora", "alpha": "lora", "target_modules": "lora", "num_virtual_tokens": "prefix"}
        for setting, owner in owners.items():
            if self.method != owner and getattr(self, setting) != getattr(PeftConfig, setting):
                raise ValueError(f"model.peft.{setting}: is a setting of model.peft.method: {owner}")
        check_ranges(self, "model.peft.", r=(1, 10_000), alpha=(1e-6, 10**6), num_virtual_tokens=(1, 10**6))


@dataclass(frozen=True)
class ModelConfig:
    """Which model, with which head, in which precision."""

    name: str
    """Hub name, local folder, ``demo:NAME`` (``python -m mezo_dist.assets`` lists those), or ``random:PATH`` for random
    weights of the shape that a Hugging Face config (a folder, or its config.json) describes, for benchmarks. This and
    all paths but ``output.dir``, if relative, start at the folder of the file that they are written in; on the command
    line, at the current folder."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    head: Literal["label-words", "classifier"] = "label-words"
    """The head that answers. ``label-words``: the language-model head, read at the task's label words after a prompt;
    ``classifier``: a fresh classification head on text without prompt (the main setting of the MeZO-SVRG paper)."""
    kind: Literal["auto", "causal", "masked"] = "auto"
    """The language-model head that the model has, for ``label-words``. ``auto``: the one that its config names."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """dtype in which weights are kept and updated. Updates of bfloat16 weights are rounded stochastically; those of
    ``algorithm.name: sgd`` and ``adamw`` to nearest, or on ``layout.name: zero`` to a copy in float32, which is
    DeepSpeed's. float16 is not offered, as small updates are lost in it."""
    compute: Literal["float32", "bfloat16", "float16"] | None = None
    """dtype of the forward passes. Null: that of the weights, and so it must be for ``algorithm.name: sgd`` and
    ``adamw`` on ``layout.name: zero``."""
    trainable: tuple[str, ...] = ("*",)
    """Weights to train: shell patterns over their names, such as ``*norm*`` or ``model.layers.2[0-9].*``."""
    freeze: tuple[str, ...] = ()
    """Weights among those of ``trainable`` that are not trained: shell patterns too, such as ``*embed*`` or
    ``model.layers.[0-9].*``."""
    peft: PeftConfig = field(default_factory=PeftConfig)
    """LoRA or prefix tuning."""
    quantise: Literal["int8", "int4"] | None = None
    """Keep the linear layers of the base model, which is frozen, in 8 or in 4 bits, and train LoRA beside it in the
    dtype of ``weights`` (``pip install 'mezo_dist[quantised]'``). ``int8``: whole numbers with a scale per output, by
    torchao; ``int4``: NF4 with a scale per 64 weights, by bitsandbytes. Activations are not quantised, nor are
    embeddings and the output head. Needs ``peft.method: lora`` and ``layout.name: replicated``. A checkpoint that was
    saved quantised in one of these ways is loaded as it is: leave this null. The exported adapters were trained on the
    quantised base; peft loads them on top of the whole one, too."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint. Off by default, as that code may do anything."""

    def __post_init__(self) -> None:
        if self.head == "classifier" and self.kind != "auto":
            raise ValueError(f"model.kind: {self.kind} is for model.head: label-words; leave it out")
        if self.quantise is not None:
            self._check_quantised()
        if self.peft.method == "prefix" and self.compute not in (None, self.weights):
            raise ValueError(f"model.compute: peft keeps prefixes in the dtype of model.weights ({self.weights})")

    def _check_quantised(self) -> None:
        if self.peft.method != "lora":
            raise ValueError("model.quantise: quantised weights cannot be trained; set model.peft.method: lora")
        if self.head == "classifier":
            raise ValueError("model.quantise: is not for model.head: classifier, whose head is trained; leave it out")
        if self.compute not in (None, self.weights):
            raise ValueError(
                f"model.compute: the layers of model.quantise compute in the dtype of model.weights ({self.weights}); "
                "leave it out"
            )
        if self.name.startswith("random:"):
            raise ValueError("model.quantise: random weights are not quantised; name a checkpoint, or leave it out")


@dataclass(frozen=True)
class LayoutConfig:
    """Where the weights live."""

    name: Literal["replicated", "fsdp", "zero"] = "replicated"
    """The layout. ``replicated``: whole weights in every process; ``fsdp``: sharded by torch's FSDP2; ``zero``: sharded
    by DeepSpeed's ZeRO-3."""
    replicate: int = 1
    """Copies of the weights, for ``fsdp``, each sharded over (number of processes / ``replicate``) processes."""
    blocks: tuple[str, ...] = ()
    """Classes of the modules whose weights are gathered together, such as ``LlamaDecoderLayer``. If empty, the model
    names them (``_no_split_modules``), or else its longest list of equal blocks counts."""
    gather: Literal["float32", "bfloat16", "float16"] | None = None
    """dtype in which weights are gathered, for ``fsdp``. Null: ``model.compute``. float32 with compute: bfloat16 gives
    the same bits as ``replicated``, at twice the traffic."""
    offload: bool = False
    """Keep shards in host memory, for ``fsdp``. (``zero`` takes this from ``ds_config``.)"""
    prefetch: bool = False
    """Gather a block's weights while the block before it computes. One more block is held in memory."""
    linear: Literal["materialised", "registers"] = "materialised"
    """How linear layers get variants of their weights, for ``replicated``. ``materialised``: variants are written to
    memory before a matrix product reads them. ``registers``: a kernel of our own (Triton) makes them within the
    product, so that both signs of a direction take one read of the weights and no memory; for ``law: gaussian`` and
    ``rademacher`` on an NVIDIA GPU. It is off, for on an H200 it was faster only for ``rademacher`` and inputs of few
    rows, and slower else (``examples/gpu``). Variants have the same bits either way, but sums are in another order:
    losses are no longer equal bit for bit to those of ``materialised``, of other layouts and of the CPU, and so a run
    with the same seed takes slightly other steps. They are equal from one time to the next on the same machine. The
    trajectory records losses, so that replay, resuming and audits give the weights bit for bit, with either setting.
    Other modules and what the kernel does not know (output heads of which some rows are computed, variants of more than
    four directions) are materialised, and the log says so. ``mezo-dist plan`` counts memory as if all were."""
    ds_config: str | None = None
    """DeepSpeed config for ``zero``: a JSON file, of which the section ``zero_optimization`` counts: ``offload_param``,
    and for ``algorithm.name: sgd`` and ``adamw`` also ``offload_optimizer`` (``device: cpu``) and the sizes of buckets,
    sub-groups and what stays gathered. Settings of the run decide about steps, so an optimiser, a scheduler and
    clipping are refused there."""

    def __post_init__(self) -> None:
        owners = {"replicate": "fsdp", "gather": "fsdp", "offload": "fsdp", "ds_config": "zero"}
        for setting, owner in owners.items():
            if self.name != owner and getattr(self, setting) not in (None, False, 1):
                raise ValueError(f"layout.{setting}: is a setting of layout.name: {owner}, not of {self.name}")
        if self.linear == "registers" and self.name != "replicated":
            raise ValueError(
                f"layout.linear: registers needs whole weights, and layout.name: {self.name} shards them; set it to "
                "materialised"
            )
        check_ranges(self, "layout.", replicate=(1, 10**6))
        check_lines(self, "layout.", "ds_config")


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    steps: int = 1000
    """Number of steps, anchor steps included."""
    batch_size: int = 16
    """Samples of a minibatch, over all ranks together."""
    full_size: int | None = None
    """Samples of a full batch (of an anchor step), drawn afresh for every anchor. Null: all training samples."""
    micro_batch: int = 8
    """Samples per forward pass. Micro-batches are what is shared out among ranks; they are the same on any number."""
    width: int | None = None
    """Micro-batches that go through the model in lock step, so that weights are gathered and variants are computed once
    for all of them. Null: as many as a quarter of the free memory holds. Changes no result."""
    frozen_cache_gib: float = 1.0
    """Memory for the frozen cache, in GiB per process. Where nothing in the model's first blocks is trainable
    (``model.trainable``), their output for a sample is remembered, and later steps skip them. Sharded layouts have no
    frozen cache; choose 0 where a run on one of them must give the same bits."""
    max_tokens: int | None = None
    """Tokens of the longest sequence. Null: the model's window."""
    evaluate_every: int = 0
    """Steps between evaluations on the validation split, of which the first is before training. 0: as often as
    ``output.looks`` says."""
    objective: Literal["loss", "metric", "reward"] = "loss"
    """What is optimised: the ``loss`` of the task, or its ``metric`` itself, as it is on a batch (minus the metric is
    then the loss of the batch). A metric such as the accuracy of 16 samples takes few values, so that many differences
    are exactly zero: ``objective/zero_differences`` is their share. Larger batches and a larger ``algorithm.eps``
    help. ``reward``: what the section ``reward`` says of the texts that the model writes (``task.kind:
    generation``)."""
    calibrate: bool = False
    """Take the model's general preference for some classes out of the losses, which makes estimates far less noisy.
    Every batch is scored with the offsets of the classes' logits that minimise its loss, and predictions use the
    offsets that minimise the loss of (up to 1,024) training samples. Losses of minibatches are biased low by that, and
    must not be compared with validation losses. Users of the exported model must add the latter,
    too: they are in its ``calibration.json``, unless its head has a bias, which then holds them."""
    compile: Literal["off", "units", "graphs"] = "off"
    """Compile the model's blocks by torch.compile, for the forward passes of variants. ``units``: fewer and larger
    kernels; ``graphs``: these are recorded as CUDA graphs and replayed, on a GPU. Compiled blocks round differently,
    and other code may be compiled for other lengths or on another machine. So the promise of equal bits falls for
    losses, and for the estimates made of them: their last bits differ from those with ``off``, and may differ with the
    number of processes, and where a run was resumed. Updates are not compiled: a trajectory is replayed to the same
    bits in any case. All variants of a whole block are held at a time. On an H200 only ``graphs`` was faster than
    ``off`` (``examples/gpu``). Only for ``layout.name: replicated``; there is no frozen cache then. Commands that open
    a run folder do not compile."""
    gradient_checkpointing: bool = False
    """For ``algorithm.name: sgd`` and ``adamw``: keep only the inputs of the model's blocks for the backward pass, and
    compute the rest again there. It takes less memory and one forward pass more per step. Not for ``model.peft.method:
    prefix``."""
    max_skipped: int = 10
    """Steps in a row that may be skipped, because a loss is not finite, before the run gives up."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "train.",
            steps=(1, MANY),
            batch_size=(1, MANY),
            full_size=(1, MANY),
            micro_batch=(1, 10**6),
            width=(1, 10**6),
            frozen_cache_gib=(0, 10**6),
            max_tokens=(1, MANY),
            evaluate_every=(0, MANY),
            max_skipped=(1, MANY),
        )
        if self.full_size is not None and self.full_size < self.batch_size:
            raise ValueError(f"train.full_size: {self.full_size} is less than train.batch_size {self.batch_size}")


@dataclass(frozen=True)
class OutputConfig:
    """The run folder, and what is written into it."""

    dir: str = "runs/run"
    """The run folder: trajectory, logs, resolved config and results."""
    if_exists: Literal["error", "new", "resume", "replace"] = "error"
    """What to do when the folder holds a run. ``error``: stop; ``new``: use the next free name (run-2, run-3 ...);
    ``resume``: go on with that run; ``replace``: rename that folder (to run.old, run.old-2 ...) and start anew, as
    ``--force-new`` does. Nothing is ever deleted."""
    sync_s: float | None = 0.0
    """Seconds between waits until the trajectory is on the disk. 0: wait at every step, so that nothing is lost. Null:
    never wait, so that steps are lost if the machine dies (if only the process dies, none are)."""
    snapshot_every: int = 0
    """Steps between snapshots of the weights. 0: no snapshots. A run can be resumed without any, from the base model
    and the trajectory; a snapshot makes that faster. Runs of ``algorithm.name: sgd`` and ``adamw`` go on from their
    last snapshot, begin again without one, and save one at their end in any case."""
    snapshots_kept: int = 2
    """Number of snapshots to keep, the newest ones."""
    export: bool = True
    """Write the fine-tuned model as a Hugging Face folder at the end of the run."""
    test: bool = True
    """Evaluate on the test split before and after training."""
    looks: int = 8
    """Evaluations on the validation split before and during training, for the curves; there are fewer, or none, where
    so many would take more than a tenth of the run's forward passes. 0: at the end only. ``train.evaluate_every``, if
    given, counts in place of this. Changes no weight."""
    answers: int = 6
    """Validation samples whose texts and answers, before and after training, are kept in ``answers.json`` for
    `mezo-dist report`, beside which classes were taken for which. 0: keep none of these."""

    def __post_init__(self) -> None:
        check_lines(self, "output.", "dir")
        check_ranges(self, "output.", sync_s=(0, MAX_TIMEOUT_S), snapshot_every=(0, MANY), snapshots_kept=(1, MANY))
        check_ranges(self, "output.", answers=(0, 1000), looks=(0, MANY))


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run communicate."""

    timeout_s: float = 600.0
    """Seconds after which the run ends, if a rank does not answer."""
    patience_s: float = 30.0
    """Seconds after which a waiting rank says which ranks it waits for."""
    variant_groups: int | None = None
    """Groups of processes that evaluate different variants of a step, where there are several copies of the weights
    (layout ``replicated``, or ``fsdp`` with ``replicate``). The processes of a group share out the micro-batches. 1:
    every process evaluates all variants. Null: the number that gives the busiest process least to do, which is above 1
    if there are fewer micro-batches than processes. With more groups, a process computes fewer variants of the weights,
    which pays where that takes longer than the forward passes. Changes no result."""
    stop_exit_code: int = 143
    """Exit status after SIGTERM, which lets the step finish and writes a snapshot: 143, as of any process that SIGTERM
    ended, or 0, so that a scheduler does not count a failure."""

    def __post_init__(self) -> None:
        seconds = (1e-3, MAX_TIMEOUT_S)
        check_ranges(self, "distributed.", timeout_s=seconds, patience_s=seconds)
        check_ranges(self, "distributed.", variant_groups=(1, 10**6), stop_exit_code=(0, 255))


@dataclass(frozen=True)
class OriginConfig:
    """Folders at which relative paths start. They are filled in when a config is read, and need not be given."""

    model: str | None = None
    """Where ``model.name`` starts: the folder of the file that it is written in. Null: the current folder."""
    task: str | None = None
    """The same for ``task.data``."""
    layout: str | None = None
    """The same for ``layout.ds_config``."""

    def __post_init__(self) -> None:
        check_lines(self, "origin.", "model", "task", "layout")


@dataclass(frozen=True)
class RunConfig:
    """A run of mezo_dist."""

    model: ModelConfig
    """Which model."""
    task: Annotated[Task, Discriminator("kind")]
    """What to learn: a task file, or its contents."""
    algorithm: Annotated[Settings | FirstOrder, Discriminator("name")]
    """Settings of the algorithm ``algorithm.name``."""
    law: Literal["gaussian", "rademacher", "lowrank"] = "gaussian"
    """Law of the directions. Those of ``lowrank`` are products of thin gaussian factors for matrices, which allows
    ``algorithm.per_sample``."""
    direction_rank: int = 1
    """Rank of low-rank directions."""
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    """Where the weights live."""
    seed: int = 0
    """Seed of directions and of the order of batches."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training loop."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """What judges the texts that a model writes, for ``train.objective: reward``."""
    output: OutputConfig = field(default_factory=OutputConfig)
    """The run folder, and what is written into it."""
    monitor: tuple[Literal["tensorboard", "wandb", "mlflow", "csv"], ...] = ("tensorboard",)
    """Where the curves go beside ``metrics.jsonl``, each through its package (``pip install wandb``), from rank 0.
    ``tensorboard``: event files in the run folder; ``csv``: ``metrics.csv`` there, a table for spreadsheets; ``wandb``
    and ``mlflow``: a run there, set up by their variables (``WANDB_PROJECT``, ``WANDB_MODE=offline``,
    ``MLFLOW_TRACKING_URI``, ...), which goes on when this one does. One that fails is left out with a warning."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """How the processes of a run communicate."""
    origin: OriginConfig = field(default_factory=OriginConfig)
    """Folders at which relative paths start. They are filled in when a config is read, and need not be given."""

    def __post_init__(self) -> None:
        check_ranges(self, direction_rank=(1, 10_000), seed=(-MAX_SEED, MAX_SEED))
        check_contradictions(self)

    def located(self) -> RunConfig:
        """The same settings with paths that work from anywhere, for those who open the files.

        Raises:
            UserError: a path starts at the folder of its file, and only in the current folder is there such a thing.
        """
        model, task, layout, origin = self.model, self.task, self.layout, self.origin
        if layout.ds_config is not None:
            ds_config = located(layout.ds_config, origin.layout, "layout.ds_config")
            layout = dataclasses.replace(layout, ds_config=ds_config)
        return dataclasses.replace(
            self,
            model=dataclasses.replace(model, name=located(model.name, origin.model, "model.name")),
            task=dataclasses.replace(task, data=located(task.data, origin.task, "task.data")),
            layout=layout,
            origin=OriginConfig(),
        )

    def to_dict(self) -> JsonObject:
        """Every setting as nested dicts of JSON types, in the shape of a config file."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self).items()}

    def digest(self) -> str:
        """SHA-256 of all settings except `NO_RESULTS`."""
        return digest_of(self.to_dict())


def digest_of(settings: Mapping[str, object]) -> str:
    """The digest of a config as `RunConfig.to_dict` writes it, whether or not it can be read as one."""
    data = {name: value for name, value in settings.items() if name not in NO_RESULTS}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def differences(here: object, there: object, path: str = "") -> list[str]:
    """Dotted names of the settings in which two configs, as nested dicts, differ.

    Args:
        here: one of them.
        there: the other.
        path: dotted name of both.
    """
    if isinstance(here, dict) and isinstance(there, dict):
        names = sorted(here.keys() | there.keys())
        return [d for n in names for d in differences(here.get(n), there.get(n), f"{path}.{n}" if path else n)]
    return [path or "all"] if here != there else []


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
