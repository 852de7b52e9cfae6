"""Variants in forwards that call the model again and again, as generation does: once for every token.

Lock step makes the weights of every variant anew whenever the model is called. For one call on a batch that is cheap;
for a call on one token of each sequence it is most of the work. So there are three ways:

* ``activations``: under law lowrank a variant need not exist as weights. Its low-rank part is added to what a layer
  computes on the weights themselves (`mezo_dist.engines.lockstep.persample`), and no memory is needed.
* ``copies``: one variant after another is written out, as a copy of the trainable weights, and the model runs on that.
  It takes the memory of a copy.
* ``lock step``: as in any other forward pass.

All three leave the weights' bits alone. Logits of the first differ from those of the others by rounding.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import nn

from mezo_dist.algorithms.base import Variant
from mezo_dist.directions.combination import ZERO
from mezo_dist.engines.capacity import free_bytes
from mezo_dist.engines.changed import shards_changed, whole_weights_changed
from mezo_dist.engines.engine import Engine

log = logging.getLogger(__name__)
Way = Literal["activations", "copies", "lock step"]


class HasSlots(Protocol):
    """A micro-batch that knows the places of its samples in their batch."""

    @property
    def slots(self) -> tuple[int, ...]:
        """One for each sample."""


ItemT = TypeVar("ItemT", bound=HasSlots)
PART = 0.5
"""Share of the free memory that a copy of the trainable weights may take."""


def choose_way(engine: Engine, processes: int) -> Way:
    """The cheapest way for ``engine``, with its reason in the log. Collective on sharded layouts.

    Args:
        engine: owns the weights.
        processes: number of processes on this machine, which share its memory.
    """
    need = _copy_bytes(engine)
    total = engine.layout.total
    fits = total(int(need <= PART * free_bytes() / processes)) == total(1)
    way: Way = "activations" if engine.law.is_lowrank else "copies" if fits else "lock step"
    reason = {
        "activations": "law lowrank needs no weights of its own",
        "copies": f"{need / 2**30:.2f} GiB for a copy of the weights are free",
        "lock step": f"{need / 2**30:.2f} GiB for a copy of the weights are not free, so they are made for each token, "
        "which is slow; law: lowrank needs no copy",
    }[way]
    log.info("generation under perturbed weights: by %s (%s)", way, reason)
    return way


def evaluate_decoding(
    engine: Engine,
    way: Way,
    variants: Sequence[Variant],
    items: Sequence[ItemT],
    forward: Callable[[nn.Module, ItemT], Any],
    *,
    most: int = 0,
    filler: ItemT | None = None,
    width: int | None = None,
) -> Iterator[list[list[Any]]]:
    """`Engine.evaluate_groups` in one of the three ways. On sharded layouts ``forward`` must ask
    `mezo_dist.engines.lockstep.passes.any_goes_on` before each call of the model but the first.

    Args:
        engine: owns the weights.
        way: how variants are made; see `Way`.
        variants: what to evaluate.
        items: this rank's micro-batches.
        forward: calls the model.
        most: the largest number of items that a rank has.
        filler: the micro-batch of a rank that has none left.
        width: items that go through the model together.
    """
    if way == "activations":
        most_slots = 1 + max(
            (slot for item in [*items, *([filler] if filler else [])] for slot in item.slots), default=0
        )
        variants = [_in_activations(variant, most_slots) for variant in variants]
    if way != "copies":
        with engine.keeping_factors():
            yield from engine.evaluate_groups(variants, items, forward, most=most, filler=filler, width=width)
        return
    yield _on_copies(engine, variants, items, forward, most, filler, width)


def _in_activations(variant: Variant, num_slots: int) -> Variant:
    if not variant.shift or variant.per_sample:
        return variant
    return replace(variant, shift=ZERO, per_sample=(variant.shift,) * num_slots)


@torch.no_grad()
def _on_copies(
    engine: Engine,
    variants: Sequence[Variant],
    items: Sequence[ItemT],
    forward: Callable[[nn.Module, ItemT], Any],
    most: int,
    filler: ItemT | None,
    width: int | None,
) -> list[list[Any]]:
    """Evaluate one variant after another on weights that are really changed.

    Args:
        engine: owns the weights.
        variants: what to evaluate.
        items: this rank's micro-batches.
        forward: calls the model.
        most: the largest number of items that a rank has.
        filler: the micro-batch of a rank that has none left.
        width: items that go through the model together.
    """
    results: list[list[Any]] = [[] for _ in items]
    changed = shards_changed if engine.layout.is_sharded else whole_weights_changed
    for variant in variants:
        place = engine.anchor_in_place if variant.base == "anchor" else contextlib.nullcontext
        with place(), changed(engine, variant.shift, engine.trainable):
            if engine.layout.is_sharded:
                groups = engine.evaluate_groups([Variant()], items, forward, most=most, filler=filler, width=width)
                rows = [row[0] for group in groups for row in group]
            else:
                rows = [forward(engine.model, item) for item in items]
        for result, row in zip(results, rows, strict=True):
            result.append(row)
    return results


def _copy_bytes(engine: Engine) -> int:
    """Bytes of a copy of this rank's trainable weights, in the dtype of the forward pass."""
    cast = engine.compute_dtype if not engine.layout.is_sharded else None
    if cast is not None:  # then all weights are copied
        return sum(parameter.numel() for parameter in engine.model.parameters()) * cast.itemsize
    return sum(shard.tensor.nbytes for shard in engine.trainable_shards())
