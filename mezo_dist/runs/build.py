"""A run: everything that a config describes, built and checked, ready to train, evaluate or export."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mezo_dist import algorithms
from mezo_dist.algorithms import FirstOrder
from mezo_dist.algorithms.base import Algorithm, Batch, Problem, Variant
from mezo_dist.algorithms.decay import check_something_decays
from mezo_dist.baselines.base import GradientOptimizer
from mezo_dist.baselines.optimizer import WeightOptimizer
from mezo_dist.config.schema import RunConfig
from mezo_dist.directions.seeds import derive_seed
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.capacity import tokens_at_once
from mezo_dist.engines.decoding import choose_way
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.probe import check_model
from mezo_dist.engines.probe_messages import failures_explained
from mezo_dist.engines.survival import settle_eps
from mezo_dist.errors import UserError
from mezo_dist.models.adapters import prefix_failures_explained
from mezo_dist.models.ends import check_ends
from mezo_dist.models.frozen_cache import RunModel, attach_frozen_cache, run_whole
from mezo_dist.models.frozen_groups import Group
from mezo_dist.models.load import Pretrained
from mezo_dist.objectives.calibration import MOST_SAMPLES, Calibration, best_offsets
from mezo_dist.objectives.joint import exact_logits, joint_objective
from mezo_dist.objectives.rewards.judge import Judge
from mezo_dist.patience import patience
from mezo_dist.runs.data import encode_data, open_data
from mezo_dist.runs.evaluation import Evaluator, Writer
from mezo_dist.runs.gradients import Gradients
from mezo_dist.runs.model import LoadedModel, check_agreement, dtype_of, load_base
from mezo_dist.runs.split_groups import SplitGroups
from mezo_dist.runs.work_split import WorkSplit
from mezo_dist.storage.trajectory import Header
from mezo_dist.tasks.batches import BatchOrder, MicroBatch, by_slot, cut
from mezo_dist.tasks.fields import Row
from mezo_dist.tasks.kind import Bench, Forward, Sample, TaskKind, TextModel
from mezo_dist.tasks.kinds import kind_of

log = logging.getLogger(__name__)
PROBE_SAMPLES = 4
"""Samples of the micro-batch with which a model is probed, at most."""


@dataclass(frozen=True)
class Run:
    """All parts of a run, on this rank."""

    config: RunConfig
    comm: Communicator
    loaded: LoadedModel
    kind: TaskKind
    """What kind of task it is."""
    splits: dict[str, Sequence[Sample]]
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
    class_tokens: list[int]
    """See `TaskKind.class_tokens`."""
    gradients: Gradients | None = None
    """For a first-order baseline that trains: computes gradients."""
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
        samples = [self.splits["train"][i] for i in order.batch(step)]
        return self.cut(samples, derive_seed(self.config.seed, "drawn", step))

    def split(self, name: str) -> list[MicroBatch]:
        """All micro-batches of a split."""
        return self.cut(self.splits[name], derive_seed(self.config.seed, "drawn", name))

    def cut(self, samples: Sequence[Sample], seed: int = 0) -> list[MicroBatch]:
        """Micro-batches of some samples; for ``seed`` see `MicroBatch`."""
        return cut(samples, self.config.train.micro_batch, self.pretrained.pad_id, self.kind.collate, seed)

    def calibration(self, advance: Callable[[int], None] = lambda _: None) -> Calibration | None:
        """With ``train.calibrate``, what predictions by the current weights need; otherwise None. Collective.

        ``advance`` is called with the numbers of samples that were looked at, up to `MOST_SAMPLES` in all.
        """
        if not self.config.train.calibrate:
            return None
        return self.fitted_offsets(self.cut(self.splits["train"][:MOST_SAMPLES]), advance)

    def fitted_offsets(
        self, batch: Sequence[MicroBatch], advance: Callable[[int], None] = lambda _: None
    ) -> Calibration:
        """The best offset of every class for ``batch`` under the current weights; zero if a logit is not finite."""
        words, mark = self.config.task.words, ("offsets", len(batch))

        def fitted(payload: Tensor) -> Tensor:
            return best_offsets(exact_logits(payload[0]), by_slot(batch, "label"))

        offsets = self.evaluator.compute([Variant()], batch, fitted, (len(words),), mark, advance)
        fp32 = torch.zeros(len(words)) if offsets is None else offsets.float()
        return Calibration(words, self.class_tokens, fp32, self.pretrained.kind == "classifier")

    def header(self) -> Header:
        """The trajectory's header."""
        return self.loaded.header(self.problem, self.data)


def build_run(config: RunConfig, comm: Communicator, recorded: Header | None = None, judge: Judge | None = None) -> Run:
    """Load data and model, build engine and algorithm, check that all ranks agree, and probe the model. Collective.

    Args:
        config: the settings.
        comm: the ranks.
        recorded: header of the trajectory that the run is in, if it has begun: what was chosen then holds.
        judge: what judges written texts, where ``train.objective: reward`` is to be computed.

    Raises:
        UserError: something that the user can mend; raised before the model is loaded where that is possible.
    """
    task = config.located().task
    with patience(f"reading the data, {task.data}"):
        rows = open_data(task, comm)
    if task.rows_are_samples:
        _orders(config, rows.sizes["train"])  # sizes that do not fit are refused before the model is loaded
    loaded = load_base(config, comm)
    check_something_decays(config.algorithm, ((s.name, len(s.shape)) for s in loaded.engine.trainable_shards()))
    text_model = text_model_of(config, loaded.pretrained)
    kind = kind_of(config.task, text_model, rows.first_row)
    encoded = encode_data(rows, kind, loaded.pretrained, text_model, comm)
    splits = {name: some.samples for name, some in encoded.items()}
    if loaded.pretrained.kind == "classifier":
        check_ends(loaded.pretrained.model, loaded.pretrained.pad_id, splits)
    order, full_order = _orders(config, num_train := len(splits["train"]))
    data = {name: some.digest for name, some in encoded.items()}
    check_agreement(loaded, comm, **{f"data of the {name} split": digest for name, digest in data.items()})
    model = loaded.pretrained.model
    # The kind of task calls the model, to see what shortcuts it allows.
    with failures_explained(loaded.engine), prefix_failures_explained(model):
        bench = _bench(loaded, kind, rows.first_row, splits)
        with patience("trying out the model: how it reads answers, which blocks are frozen"):
            forward = kind.forward(bench)
    with (
        prefix_failures_explained(model),
        patience("holding the model's losses against those of really changed weights"),
    ):
        _probe(loaded, kind, forward, splits["train"], comm)
    evaluator = Evaluator(
        loaded.engine,
        forward,
        comm,
        config.train.width,
        _capacity(loaded, comm),
        _work_split(config, comm),
        joint_objective(config, kind, judge),
        _writer(loaded, kind, bench, forward, comm),
        is_squared_error=config.task.kind == "regression",
    )
    with patience("measuring what rounding leaves of a perturbation"):
        eps = recorded.eps if recorded is not None else _settled_eps(loaded, comm)
    problem = problem_of(config, full_order.batch_size, num_train, eps)
    algorithm = algorithms.build(config.algorithm.name, config.algorithm, problem)
    tokens = kind.class_tokens(rows.first_row)
    return Run(config, comm, loaded, kind, splits, order, full_order, evaluator, problem, algorithm, data, tokens)


def with_gradients(run: Run) -> Run:
    """The run of a first-order baseline, with an optimiser on its weights and what computes gradients; any other run as
    it is."""
    config = run.config
    if not isinstance(config.algorithm, FirstOrder):
        return run
    if config.model.weights != "float32" and config.layout.name != "zero":
        log.warning(
            "model.weights: %s: torch's optimisers round to nearest, so that steps below half of a weight's last bit "
            "are lost; float32 with model.compute: bfloat16 loses none",
            config.model.weights,
        )
    optimizer = _gradient_optimizer(run, config.algorithm)
    run.engine.optimizer = optimizer
    train = config.train
    gradients = Gradients(run.evaluator, optimizer, train.calibrate, train.gradient_checkpointing)
    return dataclasses.replace(run, gradients=gradients)


def _gradient_optimizer(run: Run, settings: FirstOrder) -> GradientOptimizer:
    if run.config.layout.name != "zero":
        return WeightOptimizer(run.engine, settings)
    from mezo_dist.baselines.zero_optimizer import ZeroOptimizer
    from mezo_dist.engines.layouts.zero import Zero

    assert isinstance(run.engine.layout, Zero)
    return ZeroOptimizer(run.engine, run.engine.layout, run.comm, settings)


def _settled_eps(loaded: LoadedModel, comm: Communicator) -> float | None:
    """See `settle_eps`; None where nothing is perturbed."""
    settings = loaded.config.algorithm
    if isinstance(settings, FirstOrder):
        return None
    return settle_eps(loaded.engine, comm, settings, loaded.config.seed)


def _orders(config: RunConfig, num_train: int) -> tuple[BatchOrder, BatchOrder]:
    """The order of the samples in minibatches, and in full batches."""
    order = BatchOrder(num_train, config.train.batch_size, config.seed)
    full_size = config.train.full_size or num_train
    if full_size > num_train:
        raise UserError(f"train.full_size {full_size} is larger than the training split ({num_train} samples)")
    return order, BatchOrder(num_train, full_size, derive_seed(config.seed, "full"))


def problem_of(config: RunConfig, full_size: int, num_train: int | None, eps: float | None) -> Problem:
    """What the algorithm of a run knows about it.

    Args:
        config: the run's.
        full_size: samples of a full batch.
        num_train: training samples.
        eps: the size of the perturbation that was chosen for ``algorithm.eps: auto``.
    """
    train, is_16bit = config.train, config.model.weights != "float32"
    is_discrete = train.objective != "loss"
    return Problem(config.seed, train.steps, train.batch_size, full_size, is_16bit, num_train, eps, is_discrete)


def _probe(
    loaded: LoadedModel, kind: TaskKind, forward: Forward, samples: Sequence[Sample], comm: Communicator
) -> None:
    """See `mezo_dist.engines.probe`: right, or refused before training."""
    config = loaded.config
    size = min(PROBE_SAMPLES, config.train.micro_batch)
    parts = [part for part in (samples[:size], samples[size : 2 * size]) if part]
    item, *others = (cut(part, size, loaded.pretrained.pad_id, kind.collate)[0] for part in parts)

    def outputs(model: nn.Module, batch: MicroBatch) -> Tensor:
        scores = forward(model, batch)
        return scores.payload if kind.payload_is_smooth else scores.loss

    check_model(
        loaded.engine,
        item,
        outputs,
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


def text_model_of(config: RunConfig, pretrained: Pretrained) -> TextModel:
    """What encoding needs to know about a model, with the limit that the config sets."""
    max_tokens = min(config.train.max_tokens or pretrained.window, pretrained.window)
    return TextModel(pretrained.tokenizer, pretrained.kind, max_tokens, pretrained.num_tokens)


def _writer(loaded: LoadedModel, kind: TaskKind, bench: Bench, forward: Forward, comm: Communicator) -> Writer | None:
    """How texts are written, if the kind of task has any.

    Args:
        loaded: the model.
        kind: of the task.
        bench: what it may try out.
        forward: how micro-batches are scored.
        comm: the ranks.
    """
    write = kind.writer(bench)
    if write is None:
        return None
    if loaded.config.train.objective == "loss":  # no variant writes
        return Writer(write, "copies")
    way = choose_way(loaded.engine, comm.ranks_here, bench.probe, lambda model, item: forward(model, item).loss)
    return Writer(write, way)


def _bench(loaded: LoadedModel, kind: TaskKind, first_row: Row, splits: dict[str, Sequence[Sample]]) -> Bench:
    """What a kind of task may try out on the model.

    Args:
        loaded: the model.
        kind: of the task.
        first_row: of the training split.
        splits: all samples.
    """
    pretrained = loaded.pretrained
    size = min(2, loaded.config.train.micro_batch)  # samples of the micro-batch that the model is probed with later
    probe = cut(splits["train"][:size], size, pretrained.pad_id, kind.collate)[0]

    def shorten(group: Callable[[MicroBatch], Group]) -> RunModel:
        return _run_model(loaded, kind, splits, group)

    def once(forward: Callable[[nn.Module, MicroBatch], Tensor]) -> Tensor:
        output: Tensor = loaded.engine.evaluate([Variant()], [probe], forward)[0][0]
        return output

    return Bench(pretrained.model, first_row, probe, shorten, once)


def _run_model(
    loaded: LoadedModel, kind: TaskKind, splits: dict[str, Sequence[Sample]], group: Callable[[MicroBatch], Group]
) -> RunModel:
    settings, pretrained = loaded.config.train, loaded.pretrained
    if not settings.frozen_cache_gib or all(parameter.requires_grad for parameter in pretrained.model.parameters()):
        return run_whole
    if settings.compile != "off":
        log.info("frozen blocks are computed every time: train.compile compiles whole blocks")
        return run_whole
    if loaded.engine.layout.is_sharded:
        log.info("frozen blocks are computed every time: ranks must gather alike, whatever samples they remember")
        return run_whole
    size, pad_id = settings.micro_batch, pretrained.pad_id

    def make(samples: Sequence[Sample]) -> Group:
        return group(kind.collate(samples, tuple(range(len(samples))), pad_id))

    groups = SplitGroups([*splits.values()], size, make)
    return attach_frozen_cache(pretrained.model, groups, int(settings.frozen_cache_gib * 2**30))
