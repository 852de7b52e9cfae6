"""A model that can be back-propagated through: its blocks recomputed, its weights cast, its shards gathered.

The engine runs passes without gradients, on variants of the weights. Here the model is called as it is, on its own
weights; whatever is put around it for that is taken off again, so that the engine evaluates as ever between steps.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from mezo_dist.engines.engine import Engine
from mezo_dist.engines.hooked import Weight
from mezo_dist.engines.lockstep.forwards import Forward, Layer, add_layer, remove_layer
from mezo_dist.engines.units import Unit
from mezo_dist.errors import UserError


@contextlib.contextmanager
def back_propagating(engine: Engine, *, recompute: bool) -> Iterator[None]:
    """Within, ``engine.model`` may be called and back-propagated through; see `Layout.back_propagating`.

    Args:
        engine: owns the weights.
        recompute: keep the inputs of blocks only, and compute the rest again in the backward pass.

    Raises:
        UserError: there are no blocks to recompute.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(engine.layout.back_propagating())
        stack.enter_context(torch.enable_grad())
        if engine.compute_dtype is not None:
            stack.enter_context(_cast(engine.layout.units, engine.compute_dtype))
        for block in _blocks(engine.layout.units) if recompute else ():
            add_layer(block, Layer.RECOMPUTED, _recomputed)
            stack.callback(remove_layer, block, Layer.RECOMPUTED)
        yield


def _blocks(units: Sequence[Unit]) -> list[nn.Module]:
    """The modules of units that have modules inside: the model's blocks."""
    blocks = [module for unit in units for module in unit.modules if any(True for _ in module.children())]
    if not blocks:
        raise UserError("train.gradient_checkpointing: the model has no blocks; name their classes in layout.blocks")
    return blocks


def _recomputed(block: nn.Module, inner: Forward, *args: object, **kwargs: object) -> object:
    """The layer around a block that keeps its inputs alone. What the context of the pass says (what the frozen cache
    remembers, where the head looks) holds in the second computation, too."""
    again = functools.partial(contextvars.copy_context().run, inner, *args, **kwargs)
    return checkpoint(again, use_reentrant=False, preserve_rng_state=False)


@contextlib.contextmanager
def _cast(units: Sequence[Unit], dtype: torch.dtype) -> Iterator[None]:
    """Within, modules use whole floating-point weights cast to ``dtype``, through which gradients flow to the weights.
    FSDP2 casts shards itself, as it gathers them."""
    casts: dict[int, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for weight in (w for unit in units for hooked in unit.hooked_modules for w in hooked.weights):
            tensor = weight.tensor
            if isinstance(tensor, DTensor) or not tensor.is_floating_point() or tensor.dtype == dtype:
                continue
            cast = casts.setdefault(id(tensor), tensor.to(dtype))
            _put(weight, cast)
            stack.callback(_put, weight, tensor)
        yield


def _put(weight: Weight, tensor: Tensor) -> None:
    """Let the module use ``tensor``, which need not be a parameter."""
    parameters: dict[str, Any] = weight.owner._parameters
    dict.__setitem__(parameters, weight.attribute, tensor)
