"""Arithmetic of a step: floating-point operations of the forward passes, and elements of directions and weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mezo_dist.planning.memory import expected_rows, frozen_layers
from mezo_dist.planning.rounds import Round
from mezo_dist.planning.setting import Setting
from mezo_dist.planning.shapes import ModelShape, ModuleShape
from mezo_dist.planning.weights import shard_size


@dataclass(frozen=True)
class Work:
    """Of one step of the busiest rank."""

    flops: float
    """Of its forward passes."""
    generated: float
    """Elements of directions that are generated."""
    written: float
    """Elements of variants, and of updated weights, that are written."""
    calls: float
    """Calls of modules, over all passes."""


def flops_of_pass(shape: ModelShape, setting: Setting) -> float:
    """Operations of one forward pass of a micro-batch: 2 for every active weight and token, and 4 h T for every token
    and layer of attention over T tokens (scores and values; the half that is masked is computed by most kernels).
    Kaplan et al. 2020 (arXiv 2001.08361), with the attention term of Chowdhery et al. 2022 (arXiv 2204.02311).

    Blocks in front of the first trainable weight are remembered by the frozen cache, where weights are whole. The
    output head is computed where it is read.

    Args:
        shape: the model.
        setting: how the run goes.
    """
    length = setting.tokens + (setting.targets - 1 if setting.reads == "texts" else 0)
    tokens = setting.micro_batch * length
    cached = frozen_layers(shape) if not setting.is_sharded and setting.frozen_cache else 0
    share = 1 - cached / shape.layers
    body = sum(size for size, is_head in shape.matrices() if not is_head)
    head = max((size for size, is_head in shape.matrices() if is_head), default=0)
    rows = 2 / shape.vocabulary if setting.reads == "labels" else 1.0
    attention = 4 * shape.heads * shape.head_dim * length * shape.layers * tokens
    return share * (2.0 * body * tokens + attention) + 2.0 * head * rows * setting.micro_batch * setting.targets


def work_of(
    shape: ModelShape, setting: Setting, ranks: int, step: Round, width: int, *, in_lock_step: bool = True
) -> Work:
    """The work of one step. Variants are made once for each group of micro-batches in lock step; the update makes its
    directions for this rank's shards.

    Args:
        shape: the model.
        setting: how the run goes.
        ranks: all ranks.
        step: the round.
        width: micro-batches in lock step.
        in_lock_step: texts are written in lock step, so that variants are made anew for every token.
    """
    groups = math.ceil(step.micro_batches / width)
    tokens = width * setting.micro_batch * setting.tokens
    modules = [module for unit in shape.units for module in unit.modules]
    elements = sum(_variant_elements(module, shape, setting, tokens) for module in modules)
    generated = groups * sum(base.directions for base in step.bases) * elements
    written = groups * sum(base.copies for base in step.bases) * elements
    updated = sum(min(w.size, shard_size(w, setting, ranks)) for w in shape.weights if w.trainable)
    updates = 1 if step.update_directions else 0
    again = setting.calls if in_lock_step else 1
    generated, written = again * generated, again * written
    return Work(
        flops=step.passes * flops_of_pass(shape, setting),
        generated=generated + updated * step.update_directions,
        written=written + updated * updates,
        calls=step.passes * setting.calls * len(modules),
    )


def _variant_elements(module: ModuleShape, shape: ModelShape, setting: Setting, tokens: int) -> int:
    """Elements of a module's trainable weights that one variant writes.

    Args:
        module: the module.
        shape: of the model.
        setting: how the run goes.
        tokens: in lock step, each counted once.
    """
    rows = None
    if module.kind == "embedding":
        rows = expected_rows(module.weights[0].shape[0], tokens)
    elif setting.reads == "labels" and module.weights[0].shape[:1] == (shape.vocabulary,):
        rows = 2
    return sum(w.size if rows is None else rows * math.prod(w.shape[1:]) for w in module.weights if w.trainable)
