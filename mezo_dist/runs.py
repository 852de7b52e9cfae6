"""A run: everything that a config describes, built and checked, ready to train, evaluate or export."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

import mezo_dist
from mezo_dist import algorithms
from mezo_dist.algorithms.base import Algorithm, Batch, Problem
from mezo_dist.config import RunConfig
from mezo_dist.data import BatchOrder, MicroBatch, cut
from mezo_dist.directions.field import Field
from mezo_dist.directions.seeds import derive_seed
from mezo_dist.engines.replicated import Replicated
from mezo_dist.errors import UserError
from mezo_dist.evaluation import Evaluator
from mezo_dist.models import Loaded, load_model
from mezo_dist.objectives import LabelWords, Objective, classifier
from mezo_dist.tasks.load import Rows, load_rows
from mezo_dist.tasks.prompts import Encoder, Sample
from mezo_dist.trajectory import Header, Step
from mezo_dist.wire import Wire

log = logging.getLogger(__name__)
TRAJECTORY = "trajectory.jsonl"
CONFIG = "config.yaml"


@dataclass(frozen=True)
class Run:
    """All parts of a run, on this rank."""

    config: RunConfig
    wire: Wire
    loaded: Loaded
    splits: dict[str, list[Sample]]
    order: BatchOrder
    """Of minibatches."""
    full_order: BatchOrder
    """Of full batches: all training samples, or a fresh draw of ``train.full_size`` of them."""
    engine: Replicated
    evaluator: Evaluator
    algorithm: Algorithm
    base_fingerprint: str

    def batch(self, kind: Batch, step: int) -> list[MicroBatch]:
        """The micro-batches of ``step``'s minibatch, or of the full batch."""
        order = self.order if kind == "minibatch" else self.full_order
        return self._cut([self.splits["train"][i] for i in order.batch(step)])

    def split(self, name: str) -> list[MicroBatch]:
        """All micro-batches of a split."""
        return self._cut(self.splits[name])

    def _cut(self, samples: Sequence[Sample]) -> list[MicroBatch]:
        return cut(samples, self.config.train.micro_batch, self.loaded.pad_id)

    def apply(self, step: Step) -> None:
        """Add a step's combination to the weights."""
        if step.combination:
            self.engine.apply(step.combination, derive_seed(self.config.seed, "rounding", step.step))

    def header(self) -> Header:
        """The trajectory's header."""
        law = self.engine.field.version
        return Header(self.config.to_dict(), self.config.digest(), self.base_fingerprint, law, self.config.seed)


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
    loaded = load_model(config.model, num_labels=len(config.task.labels), seed=config.seed)
    encoder = _encoder(config, loaded)
    splits = {name: encoder.encode(getattr(rows, name), name) for name in ("train", "validation", "test")}
    # Built before the read-out is attached, so that the sites see the model as it is.
    engine = Replicated(
        loaded.model,
        Field(config.law, config.rank),
        compute_dtype=getattr(torch, config.model.compute) if config.model.compute else None,
        stochastic_rounding=config.model.weights == "bfloat16",
        width=config.train.width,
    )
    base_fingerprint = engine.fingerprint()
    wire.agree(
        {
            "version of mezo_dist": mezo_dist.__version__,
            "version of torch": torch.__version__,
            "config": config.digest(),
            "data": hashlib.sha256(repr(splits).encode()).hexdigest(),
            "base model": base_fingerprint,
        }
    )
    objective = _objective(loaded, encoder, rows, splits["train"])
    problem = Problem(config.seed, config.train.steps, config.train.batch_size, full_size)
    algorithm = algorithms.build(config.algorithm.name, config.algorithm, problem)
    evaluator = Evaluator(engine, objective, wire)
    full_order = BatchOrder(len(rows.train), full_size, derive_seed(config.seed, "full"))
    return Run(config, wire, loaded, splits, order, full_order, engine, evaluator, algorithm, base_fingerprint)


def _encoder(config: RunConfig, loaded: Loaded) -> Encoder:
    max_tokens = min(config.train.max_tokens or loaded.window, loaded.window)
    return Encoder(config.task, loaded.tokenizer, loaded.kind, max_tokens)


def _objective(loaded: Loaded, encoder: Encoder, rows: Rows, train: list[Sample]) -> Objective:
    if loaded.kind == "classifier":
        return classifier
    probe = cut(train[:2], 2, loaded.pad_id)[0]
    return LabelWords(loaded.model, encoder.label_ids(rows.train[0]), probe)


def claim_folder(config: RunConfig, wire: Wire) -> Path:
    """The run folder, made by rank 0 and known to all; see ``output.if_exists``.

    Raises:
        UserError: the folder already holds a run, or cannot be written to.
    """
    problem, folder = "", Path(config.output.dir)
    if wire.rank == 0:
        try:
            folder = _claim(folder, config.output.if_exists)
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{folder} cannot be made ({error.strerror}); name another folder (--output.dir)"
    problem, folder_name = wire.broadcast_text(f"{problem}\n{folder}").rsplit("\n", 1)
    if problem:
        raise UserError(f"output.dir: {problem}")
    return Path(folder_name)


def _claim(folder: Path, if_exists: str) -> Path:
    number = 1
    wanted = folder
    while (folder / TRAJECTORY).exists() and if_exists == "new":
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    if (folder / TRAJECTORY).exists() and if_exists == "error":
        raise UserError(
            f"{folder} already holds a run; go on with it (--output.if_exists=resume), keep it and use a new folder "
            f"(--output.if_exists=new), or name another one (--output.dir)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} cannot be written to; name another folder (--output.dir)")
    return folder


def save_config(config: RunConfig, folder: Path) -> None:
    """Write the resolved config, which `mezo-dist train` reads, with its SHA-256 in the first line."""
    body = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
    digest = hashlib.sha256(body.encode()).hexdigest()
    (folder / CONFIG).write_text(f"# sha256 of the lines below: {digest}\n{body}", encoding="utf-8")
