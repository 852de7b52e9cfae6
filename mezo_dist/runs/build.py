"""A run: everything that a config describes, built and checked, ready to train, evaluate or export."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import mezo_dist
from mezo_dist import algorithms
from mezo_dist.algorithms.base import Algorithm, Batch, Problem, Variant
from mezo_dist.objectives.calibration import MOST_SAMPLES, Calibration
from mezo_dist.models.sliced_checkpoint import fill
from mezo_dist.config.schema import RunConfig
from mezo_dist.tasks.batches import BatchOrder, MicroBatch, cut
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.law import Field
from mezo_dist.directions.seeds import derive_seed
from mezo_dist.engines.layouts.base import Layout
from mezo_dist.engines.capacity import tokens_at_once
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.layouts.replicated import Replicated
from mezo_dist.errors import UserError
from mezo_dist.runs.evaluation import Evaluator
from mezo_dist.models.load import Loaded, load_model
from mezo_dist.objectives.classification import LabelWords, Objective, classifier
from mezo_dist.models.frozen_cache import RunModel, attach_prefix, run_whole
from mezo_dist.runs.work_split import Sharing
from mezo_dist.tasks.rows import Rows, load_rows
from mezo_dist.tasks.prompts import Encoder, Sample
from mezo_dist.storage.trajectory import Header
from mezo_dist.distributed.communicator import Wire

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """A model and the engine that owns its weights: all that a trajectory needs to become a model again."""

    config: RunConfig
    loaded: Loaded
    engine: Engine
    base_fingerprint: str

    def rounding_seed(self, step: int) -> int:
        """Seed of stochastic rounding in the update of ``step``."""
        return derive_seed(self.config.seed, "rounding", step)

    def decay_seed(self, step: int) -> int:
        """Seed of stochastic rounding where ``step`` scales the weights."""
        return derive_seed(self.config.seed, "decay rounding", step)

    def header(self, full_size: int) -> Header:
        """The header of a trajectory that begins here."""
        config, model = self.config, self.config.model
        return Header(
            config.to_dict(),
            config.digest(),
            f"{model.name}@{model.revision}" if model.revision else model.name,
            self.base_fingerprint,
            self.engine.field.version,
            f"{model.weights}, {'stochastic rounding' if model.weights == 'bfloat16' else 'to nearest'}",
            config.seed,
            full_size,
            mezo_dist.__version__,
        )


@dataclass(frozen=True)
class Run:
    """All parts of a run, on this rank."""

    config: RunConfig
    wire: Wire
    weights: Weights
    splits: dict[str, list[Sample]]
    order: BatchOrder
    """Of minibatches."""
    full_order: BatchOrder
    """Of full batches: all training samples, or a fresh draw of ``train.full_size`` of them."""
    evaluator: Evaluator
    algorithm: Algorithm

    @property
    def engine(self) -> Engine:
        """What owns the weights."""
        return self.weights.engine

    @property
    def loaded(self) -> Loaded:
        """Model and tokeniser."""
        return self.weights.loaded

    def batch(self, kind: Batch, step: int) -> list[MicroBatch]:
        """The micro-batches of ``step``'s minibatch, or of the full batch."""
        order = self.order if kind == "minibatch" else self.full_order
        return self._cut([self.splits["train"][i] for i in order.batch(step)])

    def split(self, name: str) -> list[MicroBatch]:
        """All micro-batches of a split."""
        return self._cut(self.splits[name])

    def _cut(self, samples: Sequence[Sample]) -> list[MicroBatch]:
        return cut(samples, self.config.train.micro_batch, self.loaded.pad_id)

    def calibration(self, advance: Callable[[int], None] = lambda _: None) -> Calibration | None:
        """With ``train.calibrate``, what predictions by the current weights need; otherwise None. Collective.

        ``advance`` is called with the numbers of samples that were looked at, up to `MOST_SAMPLES` in all.
        """
        if not self.config.train.calibrate:
            return None
        offsets = self.evaluator.offsets(self._cut(self.splits["train"][:MOST_SAMPLES]), advance)
        objective = self.evaluator.objective
        tokens = objective.label_ids if isinstance(objective, LabelWords) else []
        return Calibration(self.config.task.words, tokens, offsets)

    def apply(self, step: int, combination: Combination, *, keep: bool = False, scale: float = 1.0) -> None:
        """Do to the weights what ``step`` found; see `Update`."""
        if keep:
            self.engine.keep_anchor()
        if scale != 1:
            self.engine.scale(scale, self.weights.decay_seed(step))
        if combination:
            self.engine.apply(combination, self.weights.rounding_seed(step))

    def header(self) -> Header:
        """The trajectory's header."""
        return self.weights.header(self.full_order.batch_size)


def prepare(config: RunConfig, wire: Wire) -> Run:
    """Load data and model, build engine and algorithm, and check that all ranks agree.

    Raises:
        UserError: something that the user can mend; raised before the model is loaded where that is possible.
    """
    rows = load_rows(config.task)
    order = BatchOrder(len(rows.train), config.train.batch_size, config.seed)
    full_size = config.train.full_size or len(rows.train)
    if full_size > len(rows.train):
        raise UserError(f"train.full_size {full_size} is larger than the training split ({len(rows.train)} samples)")
    weights = load_weights(config, wire)
    encoder = _encoder(config, weights.loaded)
    splits = {name: encoder.encode(getattr(rows, name), name) for name in ("train", "validation", "test")}
    agree(weights, wire, data=hashlib.sha256(repr(splits).encode()).hexdigest())
    objective = _objective(weights, encoder, rows, splits)
    capacity, sharing = _capacity(weights, wire), _sharing(config, wire)
    classes = len(config.task.labels) if config.train.calibrate else 0
    evaluator = Evaluator(weights.engine, objective, wire, config.train.width, capacity, sharing, classes)
    full_order = BatchOrder(len(rows.train), full_size, derive_seed(config.seed, "full"))
    return Run(config, wire, weights, splits, order, full_order, evaluator, build_algorithm(config, full_size))


def load_weights(config: RunConfig, wire: Wire) -> Weights:
    """The base model and its engine. Collective."""
    is_sharded = config.engine.name != "replicated"
    wire.agree({"config": config.digest(), "engine": repr(config.engine)})  # before anybody shards
    loaded = load_model(config.model, num_labels=len(config.task.labels), seed=config.seed, whole=not is_sharded)
    engine = Engine(  # built before a read-out is attached, so that the sites see the model as it is
        loaded.model,
        Field(config.law, config.rank),
        _layout(config, loaded.model, wire),
        compute_dtype=_dtype(config.model.compute) if config.model.compute else None,
        stochastic_rounding=config.model.weights == "bfloat16",
        prefetch=config.engine.prefetch,
    )
    if loaded.source is not None:
        fill(loaded.source, engine.shards())
    return Weights(config, loaded, engine, engine.fingerprint())


def _capacity(weights: Weights, wire: Wire) -> int:
    model = weights.config.model
    dtype = _dtype(model.compute or model.weights)
    return min(wire.collect(lambda: tokens_at_once(weights.engine.layout.units, dtype, wire.ranks_here)))


def _sharing(config: RunConfig, wire: Wire) -> Sharing:
    copies = {"replicated": wire.world_size, "fsdp": config.engine.replicate, "zero": 1}[config.engine.name]
    groups = config.distributed.variant_groups
    return Sharing(wire.world_size, copies, groups, by_base=config.engine.name != "replicated")


def _layout(config: RunConfig, model: nn.Module, wire: Wire) -> Layout:
    engine = config.engine
    if engine.name == "fsdp":
        from mezo_dist.engines.layouts.fsdp import Fsdp

        gather = engine.gather or config.model.compute
        return Fsdp(
            model,
            wire,
            replicate=engine.replicate,
            block_classes=engine.blocks,
            gather_dtype=_dtype(gather) if gather else None,
            offload=engine.offload,
        )
    if engine.name == "zero":
        from mezo_dist.engines.layouts.zero import Zero, read_config

        return Zero(model, wire, read_config(engine.ds_config, config.model.weights), block_classes=engine.blocks)
    return Replicated(model)


def _dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


def build_algorithm(config: RunConfig, full_size: int) -> Algorithm:
    """The planner of a run whose full batches have ``full_size`` samples."""
    rounds = config.model.weights != "float32"
    problem = Problem(config.seed, config.train.steps, config.train.batch_size, full_size, rounds)
    return algorithms.build(config.algorithm.name, config.algorithm, problem)


def agree(weights: Weights, wire: Wire, **more: str) -> None:
    """Check that all ranks run the same code, settings and base model, and ``more``. See `Wire.agree`."""
    wire.agree(
        {
            "version of mezo_dist": mezo_dist.__version__,
            "code of mezo_dist": _code_digest(),
            "version of torch": torch.__version__,
            "config": weights.config.digest(),
            "base model": weights.base_fingerprint,
            **more,
        }
    )


def _code_digest() -> str:
    """SHA-256 of the package's sources: a node with an older checkout has the same version number."""
    folder = Path(mezo_dist.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


def _encoder(config: RunConfig, loaded: Loaded) -> Encoder:
    max_tokens = min(config.train.max_tokens or loaded.window, loaded.window)
    return Encoder(config.task, loaded.tokenizer, loaded.kind, max_tokens)


def _objective(weights: Weights, encoder: Encoder, rows: Rows, splits: dict[str, list[Sample]]) -> Objective:
    loaded = weights.loaded
    run = _run_model(weights, splits)
    if loaded.kind == "classifier":
        return functools.partial(classifier, run=run)
    probe = cut(splits["train"][:2], 2, loaded.pad_id)[0]

    def once(forward: Callable[[nn.Module, MicroBatch], Tensor]) -> Tensor:
        logits: Tensor = weights.engine.evaluate([Variant()], [probe], forward)[0][0]
        return logits

    return LabelWords(loaded.model, encoder.label_ids(rows.train[0]), probe, run, once)


def _run_model(weights: Weights, splits: dict[str, list[Sample]]) -> RunModel:
    settings, loaded = weights.config.train, weights.loaded
    if not settings.prefix_gib or all(parameter.requires_grad for parameter in loaded.model.parameters()):
        return run_whole
    if weights.engine.layout.is_sharded:
        log.info("frozen blocks are computed every time: ranks must gather alike, whatever samples they remember")
        return run_whole
    items = [item for split in splits.values() for item in cut(split, settings.micro_batch, loaded.pad_id)]
    groups = [(item.inputs, None if loaded.kind == "classifier" else item.positions) for item in items]
    return attach_prefix(loaded.model, groups, int(settings.prefix_gib * 2**30))
