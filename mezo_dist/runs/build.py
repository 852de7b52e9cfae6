"""A run: everything that a config describes, built and checked, ready to train, evaluate or export."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mezo_dist import algorithms
from mezo_dist.algorithms.base import Algorithm, Batch, Problem, Variant
from mezo_dist.algorithms.decay import check_something_decays
from mezo_dist.config.schema import RunConfig
from mezo_dist.directions.seeds import derive_seed
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.distributed.in_turn import rank_zero_first
from mezo_dist.engines.capacity import tokens_at_once
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.probe import check_model
from mezo_dist.engines.probe_messages import failures_explained
from mezo_dist.engines.survival import settle_eps
from mezo_dist.errors import UserError
from mezo_dist.models.adapters import prefix_failures_explained
from mezo_dist.models.frozen_cache import RunModel, attach_frozen_cache, run_whole
from mezo_dist.models.load import Pretrained
from mezo_dist.objectives.calibration import MOST_SAMPLES, Calibration
from mezo_dist.objectives.classification import LabelWords, Objective, classifier
from mezo_dist.runs.evaluation import Evaluator
from mezo_dist.runs.model import LoadedModel, check_agreement, dtype_of, load_base
from mezo_dist.runs.work_split import WorkSplit
from mezo_dist.storage.trajectory import Header
from mezo_dist.tasks.batches import BatchOrder, MicroBatch, cut
from mezo_dist.tasks.prompts import Encoder, Sample
from mezo_dist.tasks.rows import Rows, load_rows, uses_cache

log = logging.getLogger(__name__)
PROBE_SAMPLES = 4
"""Samples of the micro-batch with which a model is probed, at most."""


@dataclass(frozen=True)
class Run:
    """All parts of a run, on this rank."""

    config: RunConfig
    comm: Communicator
    loaded: LoadedModel
    splits: dict[str, list[Sample]]
    order: BatchOrder
    """Order of the samples in minibatches."""
    full_order: BatchOrder
    """Order in full batches: all training samples, or a fresh draw of ``train.full_size`` of them."""
    evaluator: Evaluator
    problem: Problem
    """What the algorithm knows about the run."""
    algorithm: Algorithm[object]
    data: dict[str, str]
    """Split -> digest of its encoded samples."""
    step: int = 0
    """Steps that the weights have seen, for a run that was loaded (`mezo_dist.load_run`)."""

    @property
    def engine(self) -> Engine:
        """Owns the weights."""
        return self.loaded.engine

    @property
    def pretrained(self) -> Pretrained:
        """Model and tokenizer."""
        return self.loaded.pretrained

    def batch(self, kind: Batch, step: int) -> list[MicroBatch]:
        """The micro-batches of ``step``'s minibatch, or of the full batch."""
        order = self.order if kind == "minibatch" else self.full_order
        return self._cut([self.splits["train"][i] for i in order.batch(step)])

    def split(self, name: str) -> list[MicroBatch]:
        """All micro-batches of a split."""
        return self._cut(self.splits[name])

    def _cut(self, samples: Sequence[Sample]) -> list[MicroBatch]:
        return cut(samples, self.config.train.micro_batch, self.pretrained.pad_id)

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

    def header(self) -> Header:
        """The trajectory's header."""
        return self.loaded.header(self.problem, self.data)


def build_run(config: RunConfig, comm: Communicator, recorded: Header | None = None) -> Run:
    """Load data and model, build engine and algorithm, check that all ranks agree, and probe the model. Collective.

    Args:
        config: the settings.
        comm: the ranks.
        recorded: header of the trajectory that the run is in, if it has begun: what was chosen then holds.

    Raises:
        UserError: something that the user can mend; raised before the model is loaded where that is possible.
    """
    task = config.located().task
    rows = rank_zero_first(comm, lambda: load_rows(task)) if uses_cache(task) else load_rows(task)
    order = BatchOrder(len(rows.train), config.train.batch_size, config.seed)
    full_size = config.train.full_size or len(rows.train)
    if full_size > len(rows.train):
        raise UserError(f"train.full_size {full_size} is larger than the training split ({len(rows.train)} samples)")
    loaded = load_base(config, comm)
    check_something_decays(config.algorithm, ((s.name, len(s.shape)) for s in loaded.engine.trainable_shards()))
    encoder = _encoder(config, loaded.pretrained)
    splits = {name: encoder.encode(getattr(rows, name), name) for name in ("train", "validation", "test")}
    data = {name: _digest(samples) for name, samples in splits.items()}
    check_agreement(loaded, comm, **{f"data of the {name} split": digest for name, digest in data.items()})
    model = loaded.pretrained.model
    # The objective calls the model, to see what shortcuts it allows.
    with failures_explained(loaded.engine), prefix_failures_explained(model):
        objective = _objective(loaded, encoder, rows, splits)
    evaluator = Evaluator(
        loaded.engine,
        objective,
        comm,
        config.train.width,
        _capacity(loaded, comm),
        _work_split(config, comm),
        len(config.task.labels) if config.train.calibrate else 0,
    )
    with prefix_failures_explained(model):
        _probe(loaded, objective, splits["train"], comm)
    full_order = BatchOrder(len(rows.train), full_size, derive_seed(config.seed, "full"))
    eps = settle_eps(loaded.engine, comm, config.algorithm, config.seed) if recorded is None else recorded.eps
    problem = problem_of(config, full_size, len(rows.train), eps)
    algorithm = algorithms.build(config.algorithm.name, config.algorithm, problem)
    return Run(config, comm, loaded, splits, order, full_order, evaluator, problem, algorithm, data)


def _digest(samples: Sequence[Sample]) -> str:
    """32 hexadecimal digits over encoded samples, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for sample in samples:
        digest.update(repr(tuple(vars(sample).values())).encode())
    return digest.hexdigest()


def problem_of(config: RunConfig, full_size: int, num_train: int | None, eps: float | None) -> Problem:
    """What the algorithm of a run knows about it.

    Args:
        config: the run's.
        full_size: samples of a full batch.
        num_train: training samples.
        eps: the size of the perturbation that was chosen for ``algorithm.eps: auto``.
    """
    train, is_16bit = config.train, config.model.weights != "float32"
    return Problem(config.seed, train.steps, train.batch_size, full_size, is_16bit, num_train, eps)


def _probe(loaded: LoadedModel, objective: Objective, samples: Sequence[Sample], comm: Communicator) -> None:
    """See `mezo_dist.engines.probe`: right, or refused before training."""
    config = loaded.config
    size = min(PROBE_SAMPLES, config.train.micro_batch)
    parts = [part for part in (samples[:size], samples[size : 2 * size]) if part]
    item, *others = (cut(part, size, loaded.pretrained.pad_id)[0] for part in parts)

    def logits(model: nn.Module, batch: MicroBatch) -> Tensor:
        return objective(model, batch).logits

    check_model(
        loaded.engine,
        item,
        logits,
        other=others[0] if others else None,
        per_sample=getattr(config.algorithm, "per_sample", False),
        processes=comm.ranks_here,
    )


def _capacity(loaded: LoadedModel, comm: Communicator) -> int:
    model = loaded.config.model
    dtype = dtype_of(model.compute or model.weights)
    return min(comm.collect(lambda: tokens_at_once(loaded.engine.layout.units, dtype, comm.ranks_here)))


def _work_split(config: RunConfig, comm: Communicator) -> WorkSplit:
    copies = {"replicated": comm.world_size, "fsdp": config.layout.replicate, "zero": 1}[config.layout.name]
    groups = config.distributed.variant_groups
    return WorkSplit(comm.world_size, copies, groups, by_base=config.layout.name != "replicated")


def _encoder(config: RunConfig, pretrained: Pretrained) -> Encoder:
    max_tokens = min(config.train.max_tokens or pretrained.window, pretrained.window)
    return Encoder(config.task, pretrained.tokenizer, pretrained.kind, max_tokens, pretrained.num_tokens)


def _objective(loaded: LoadedModel, encoder: Encoder, rows: Rows, splits: dict[str, list[Sample]]) -> Objective:
    """The objective of the model's kind.

    Args:
        loaded: the model.
        encoder: turns rows into samples.
        rows: the data.
        splits: its samples.
    """
    pretrained = loaded.pretrained
    run_model = _run_model(loaded, splits)
    if pretrained.kind == "classifier":
        return functools.partial(classifier, run=run_model)
    size = min(2, loaded.config.train.micro_batch)  # samples of the micro-batch that the model is probed with later
    probe = cut(splits["train"][:size], size, pretrained.pad_id)[0]

    def once(forward: Callable[[nn.Module, MicroBatch], Tensor]) -> Tensor:
        logits: Tensor = loaded.engine.evaluate([Variant()], [probe], forward)[0][0]
        return logits

    return LabelWords(pretrained.model, encoder.label_ids(rows.train[0]), probe, run_model, once)


def _run_model(loaded: LoadedModel, splits: dict[str, list[Sample]]) -> RunModel:
    settings, pretrained = loaded.config.train, loaded.pretrained
    if not settings.frozen_cache_gib or all(parameter.requires_grad for parameter in pretrained.model.parameters()):
        return run_whole
    if loaded.engine.layout.is_sharded:
        log.info("frozen blocks are computed every time: ranks must gather alike, whatever samples they remember")
        return run_whole
    items = [item for split in splits.values() for item in cut(split, settings.micro_batch, pretrained.pad_id)]
    groups = [(item.inputs, None if pretrained.kind == "classifier" else item.positions) for item in items]
    return attach_frozen_cache(pretrained.model, groups, int(settings.frozen_cache_gib * 2**30))
