"""Weights that are really changed for a while, and put back bit for bit; what a probe compares with."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from mezo_dist.directions.combination import ZERO, Combination
from mezo_dist.directions.seeds import param_id
from mezo_dist.engines.engine import Engine


@contextlib.contextmanager
def whole_weights_changed(engine: Engine, shift: Combination, names: Collection[str]) -> Iterator[None]:
    """Within, the weights called ``names`` of a replicated model are those of a variant, and all have the dtype of the
    forward pass. The weights themselves are not written to.

    Args:
        engine: owns the weights.
        shift: what is added to them.
        names: canonical names of the weights that change.
    """
    before: dict[nn.Parameter, Tensor] = {}
    try:
        for name, parameter in engine.model.named_parameters():
            weight = parameter.data
            dtype = engine.compute_dtype if engine.compute_dtype and weight.is_floating_point() else weight.dtype
            if name not in names and dtype == weight.dtype:
                continue
            changed = torch.empty_like(weight, dtype=dtype)
            term = shift if name in names else ZERO
            engine.law.add(weight, [term], [changed], param_id=param_id(name), shape=weight.shape)
            before[parameter], parameter.data = weight, changed
        yield
    finally:
        for parameter, weight in before.items():
            parameter.data = weight


@contextlib.contextmanager
def shards_changed(engine: Engine, shift: Combination, names: Collection[str]) -> Iterator[None]:
    """Within, this rank's shards of the weights called ``names`` have the values that a variant has once it is
    gathered and cast, so that rounding them on that way once more changes nothing.

    Args:
        engine: owns the shards.
        shift: what is added to them.
        names: canonical names of the weights that change.
    """
    weights = {w.name: w for unit in engine.layout.units for h in unit.hooked_modules for w in h.weights}
    before: dict[str, Tensor] = {}
    try:
        for shard in engine.shards():
            if shard.name not in names or not shift:
                continue
            before[shard.name] = shard.tensor.clone()
            gathered = shard.tensor.to(engine.layout.describe(weights[shard.name])[0])
            cast = torch.empty_like(gathered, dtype=engine.compute_dtype or gathered.dtype)
            engine.law.add(
                gathered, [shift], [cast], param_id=shard.param_id, shape=shard.shape, offset=shard.offset
            )  # fmt: skip
            shard.tensor.copy_(cast)
        yield
    finally:
        for shard in engine.shards():
            if shard.name in before:
                shard.tensor.copy_(before[shard.name])
