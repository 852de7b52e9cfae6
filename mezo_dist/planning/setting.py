"""What a run does, as far as its costs go: layout, precision, algorithm, batches, and what is read off the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mezo_dist.algorithms import Settings
from mezo_dist.algorithms.mezo import MeZO

LayoutName = Literal["replicated", "fsdp", "zero"]
Dtype = Literal["float32", "bfloat16", "float16"]
Reads = Literal["labels", "tokens", "texts"]
ITEMSIZE: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Setting:
    """One way to run. The names are those of the settings of a config, where there are such."""

    layout: LayoutName = "replicated"
    replicate: int = 1
    """Copies of the weights, for ``fsdp``; otherwise 1."""
    weights: Dtype = "bfloat16"
    compute: Dtype | None = None
    gather: Dtype | None = None
    prefetch: bool = False
    offload: bool = False
    """Shards live in host memory."""
    algorithm: Settings = field(default_factory=MeZO)
    law: Literal["gaussian", "rademacher", "lowrank"] = "gaussian"
    direction_rank: int = 1
    batch_size: int = 16
    full_size: int = 512
    micro_batch: int = 8
    width: int | None = None
    """Micro-batches in lock step. None: what the engine chooses."""
    tokens: int = 512
    """Length of every sample, padding included."""
    is_padded: bool = True
    """Samples of a micro-batch differ in length, so that attention takes a mask."""
    reads: Reads = "labels"
    """``labels``: logits of a few words at one place per sample; ``tokens``: of the whole vocabulary, at ``targets``
    places; ``texts``: the model writes ``targets`` tokens."""
    targets: int = 1
    joint: Literal["batch", "samples"] | None = None
    """What rank 0 computes of what the model says of all samples together: a loss of the batch (``train.calibrate``, a
    metric), or one of each sample (a metric that is a mean, a reward). None: losses of samples are added up."""
    columns: int = 1
    """Numbers that the model says of each sample, where losses are joint."""
    frozen_cache: int = 2**30
    """Bytes for the frozen cache, at most."""
    compiled: bool = False
    """Blocks are compiled (``train.compile``), so that the variants of a whole block are made together."""
    num_train: int | None = None
    """Training samples, for what the frozen cache holds."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of a number of the weights."""
        return ITEMSIZE[self.weights]

    @property
    def pass_bytes(self) -> int:
        """Bytes of a number in the forward passes."""
        return ITEMSIZE[self.compute or self.weights]

    @property
    def gather_bytes(self) -> int:
        """Bytes of a number when it is gathered."""
        return ITEMSIZE[(self.gather or self.compute or self.weights) if self.layout == "fsdp" else self.weights]

    @property
    def is_sharded(self) -> bool:
        """Weights are whole only unit by unit."""
        return self.layout != "replicated"

    @property
    def calls(self) -> int:
        """Calls of the model in one forward pass: a text takes one for each of its tokens."""
        return self.targets if self.reads == "texts" else 1

    def shard_ranks(self, ranks: int) -> int:
        """Ranks over which one copy of the weights is cut, of so many."""
        return ranks // self.replicate if self.is_sharded else 1

    def copies(self, ranks: int) -> int:
        """Copies of the weights that so many ranks hold."""
        return ranks // self.shard_ranks(ranks)
