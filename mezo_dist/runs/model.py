"""The model of a run and the engine that owns its weights: all that a trajectory needs to become a model again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

import mezo_dist
from mezo_dist.algorithms import FirstOrder
from mezo_dist.algorithms.base import Problem
from mezo_dist.config.schema import RunConfig
from mezo_dist.directions.law import Law
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.distributed.environment import code_digest
from mezo_dist.distributed.in_turn import rank_zero_first
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.layouts.base import Layout
from mezo_dist.engines.layouts.replicated import Replicated
from mezo_dist.errors import UserError
from mezo_dist.models.identity import model_digest
from mezo_dist.models.load import Pretrained, fetch, is_on_hub, load_model
from mezo_dist.models.sliced_checkpoint import WeightSource, WholeModel, fill
from mezo_dist.patience import patience
from mezo_dist.storage.trajectory import Header


@dataclass(frozen=True)
class LoadedModel:
    """The base model of a run in an engine, on this rank."""

    config: RunConfig
    pretrained: Pretrained
    engine: Engine
    base_fingerprint: str
    """Fingerprint of the weights before step 0."""

    def header(self, problem: Problem, data: dict[str, str]) -> Header:
        """The header of a trajectory that begins here.

        Args:
            problem: what its algorithm knows about the run.
            data: split -> digest of its encoded samples.
        """
        config, model = self.config, self.config.model
        return Header(
            config=config.to_dict(),
            config_digest=config.digest(),
            base_model=f"{model.name}@{model.revision}" if model.revision else model.name,
            base_fingerprint=self.base_fingerprint,
            model_config=model_digest(self.pretrained.model, self.pretrained.config_digest),
            tokenizer=self.pretrained.tokenizer_digest,
            data=data,
            law_version=self.engine.law.version,
            weights=_kind_of_weights(config),
            seed=config.seed,
            full_size=problem.full_size,
            version=mezo_dist.__version__,
            num_train=problem.num_train,
            eps=problem.eps,
        )


def _kind_of_weights(config: RunConfig) -> str:
    """See `Header.weights`."""
    if isinstance(config.algorithm, FirstOrder):
        has_masters = config.layout.name == "zero" and config.model.weights != "float32"
        weights = f"{config.model.weights}{' of float32 (DeepSpeed)' if has_masters else ''}"
        return f"{weights}, by {config.algorithm.name} of torch, from snapshots alone"
    return f"{config.model.weights}, {'stochastic rounding' if config.model.weights == 'bfloat16' else 'to nearest'}"


def load_base(config: RunConfig, comm: Communicator) -> LoadedModel:
    """Load the base model into an engine of the configured layout. Collective.

    Raises:
        UserError: ranks disagree about the settings, or the model cannot be loaded or laid out so.
    """
    is_sharded = config.layout.name != "replicated"
    comm.agree({"config": config.digest(), "layout": repr(config.layout)})  # before anybody shards
    model = config.located().model
    if is_on_hub(model):
        rank_zero_first(comm, lambda: fetch(model))
    with patience(f"loading {model.name}"):
        pretrained = _load(config, whole=not is_sharded)
    if not is_sharded and torch.cuda.is_available():  # sharded layouts bring their weights there themselves
        pretrained.model.to(torch.device("cuda", torch.cuda.current_device()))
    engine = Engine(  # built before a head slice is attached: it is to see the model's modules as they are
        pretrained.model,
        Law(config.law, config.direction_rank),
        _layout(config, pretrained.model, comm),
        compute_dtype=dtype_of(config.model.compute) if config.model.compute else None,
        stochastic_rounding=config.model.weights == "bfloat16",
        prefetch=config.layout.prefetch,
        compile=config.train.compile,
        linear=config.layout.linear,
    )
    if pretrained.source is not None:
        with patience(f"reading the shards of {model.name}"):
            fill(pretrained.source, engine.shards())
    with patience(f"taking the fingerprint of {model.name}"):
        fingerprint = engine.fingerprint()
    return LoadedModel(config, pretrained, engine, fingerprint)


def reload_base(loaded: LoadedModel) -> None:
    """Load the weights of the base model into the engine again. Collective.

    Raises:
        UserError: the checkpoint is no longer what it was.
    """
    source: WeightSource | None = loaded.pretrained.source
    if source is None:
        source = WholeModel(_load(loaded.config, whole=True).model)
    fill(source, loaded.engine.shards())
    if loaded.engine.fingerprint() != loaded.base_fingerprint:
        raise UserError(f"model.name: the weights of {loaded.config.model.name} changed while the run was loading")


def _load(config: RunConfig, *, whole: bool) -> Pretrained:
    model, outputs = config.located().model, config.task.num_outputs
    return load_model(model, num_labels=outputs, seed=config.seed, whole=whole)


def check_agreement(loaded: LoadedModel, comm: Communicator, **more: str) -> None:
    """Check that all ranks run the same code, settings and base model, and agree about the facts in ``more``.

    Raises:
        UserError: they do not; the message names the fact and the ranks.
    """
    comm.agree(
        {
            "version of mezo_dist": mezo_dist.__version__,
            "code of mezo_dist": code_digest(),
            "version of torch": torch.__version__,
            "config": loaded.config.digest(),
            "base model": loaded.base_fingerprint,
            **more,
        }
    )


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a setting such as ``bfloat16``."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _layout(config: RunConfig, model: nn.Module, comm: Communicator) -> Layout:
    """The layout that the config asks for.

    Args:
        config: the run's.
        model: the model.
        comm: the ranks.
    """
    layout = config.layout
    if layout.name == "fsdp":
        from mezo_dist.engines.layouts.fsdp import Fsdp

        gather = layout.gather or config.model.compute
        return Fsdp(
            model,
            comm,
            replicate=layout.replicate,
            block_classes=layout.blocks,
            gather_dtype=dtype_of(gather) if gather else None,
            offload=layout.offload,
        )
    if layout.name == "zero":
        from mezo_dist.engines.layouts.zero import Zero
        from mezo_dist.engines.layouts.zero_config import read_config

        gradients = isinstance(config.algorithm, FirstOrder)
        ds_config = read_config(config.located().layout.ds_config, config.model.weights, gradients=gradients)
        return Zero(model, comm, ds_config, block_classes=layout.blocks, prefetch=layout.prefetch)
    return Replicated(model, whole_blocks=config.train.compile != "off")
