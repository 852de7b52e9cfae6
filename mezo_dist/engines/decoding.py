"""Variants in forwards that call the model again and again, as generation does: once for every token.

Lock step makes the weights of every variant anew whenever the model is called. For one call on a batch that is cheap;
for a call on one token of each sequence it is most of the work. So there are three ways:

* ``activations``: under law lowrank a shifted matrix need not exist. Its low-rank part is added to what a layer
  computes on the matrix itself (`mezo_dist.engines.lockstep.lowrank_shift`); only vectors are copied.
* ``copies``: one variant after another is written out, as a copy of the trainable weights, and the model runs on that.
  It takes the memory of a copy.
* ``lock step``: as in any other forward pass.

Where weights are whole, the first two run one pass after another, with the model's own code and no hook but those that
add low-rank parts. All three leave the weights' bits alone. Logits of the first differ from the others' by rounding.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from mezo_dist.algorithms.base import Variant
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.seeds import derive_seed
from mezo_dist.engines.capacity import free_bytes
from mezo_dist.engines.changed import shards_changed, whole_weights_changed
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.hooked import HookedModule, Weight
from mezo_dist.engines.lockstep.factors import Factors
from mezo_dist.engines.lockstep.forwards import Forward, Layer, add_layer, remove_layer
from mezo_dist.engines.lockstep.head_slice import head_rows
from mezo_dist.engines.lockstep.lowrank_shift import MovedOutput, shifts_in_activations
from mezo_dist.engines.outputs import distance, rounding_error, size_of, tensors_of

log = logging.getLogger(__name__)
Way = Literal["activations", "copies", "lock step"]
ItemT = TypeVar("ItemT")
PART = 0.5
"""Share of the free memory that a copy of the trainable weights may take."""
PROBE = Combination.single(derive_seed(0, "decoding"), 1e-2)
"""The shift under which a way is held against really changed weights."""
TOLERANCE = {4: 1e-2, 2: 0.2}
"""Largest error of outputs, as a part of what the shift changes, by the bytes of a number (see `probe_samples`)."""


def choose_way(
    engine: Engine, processes: int, item: ItemT | None = None, forward: Callable[[nn.Module, ItemT], Any] | None = None
) -> Way:
    """The cheapest way for ``engine``, with its reason in the log. Collective on sharded layouts.

    Args:
        engine: owns the weights.
        processes: number of processes on this machine, which share its memory.
        item: a micro-batch of a few samples, the same one on all ranks, to try the way on.
        forward: as for `Engine.evaluate`, with outputs that a small change of weights changes a little.
    """
    need = _copy_bytes(engine)
    total = engine.layout.total
    fits = total(int(need <= PART * free_bytes() / processes)) == total(1)
    can = engine.law.is_lowrank and (item is None or forward is None or _agrees(engine, item, forward))
    way: Way = "activations" if can else "copies" if fits else "lock step"
    reason = {
        "activations": "law lowrank needs no matrices of its own",
        "copies": f"{need / 2**30:.2f} GiB for a copy of the weights are free",
        "lock step": f"{need / 2**30:.2f} GiB for a copy of the weights are not free, so they are made for each token, "
        "which is slow; law: lowrank needs no copy",
    }[way]
    log.info("texts are written under perturbed weights by way of %s (%s)", way, reason)
    return way


def _agrees(engine: Engine, item: ItemT, forward: Callable[[nn.Module, ItemT], Any]) -> bool:
    """Shifts in activation space give what shifted weights give: not so if the model reads a matrix in another way."""
    variants = [Variant(PROBE)]
    with torch.no_grad():
        base, wanted = (tensors_of(row) for row in engine.evaluate([Variant(), *variants], [item], forward)[0])
        ((outcome,),) = evaluate_decoding(engine, "activations", variants, [item], forward, most=1, filler=item)
    tolerance = TOLERANCE[4 if engine.pass_dtype.itemsize >= 4 else 2]
    error, effect = distance(tensors_of(outcome[0]), wanted), distance(wanted, base)
    agrees = error <= tolerance * effect + max(rounding_error(engine), 1e-5) * size_of(wanted)
    if not agrees:
        log.info("shifts in activation space are wrong for this model (%.2g of %.2g): not used", error, effect)
    return agrees


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
    `mezo_dist.engines.lockstep.passes.any_goes_on` before each call of the model but the first."""
    per_sample = any(variant.per_sample for variant in variants)
    if not per_sample and (way == "copies" or (way == "activations" and _is_plain(engine))):
        yield _one_after_another(engine, way, variants, items, forward, most, filler, width)
        return
    with engine.called_often() if way == "activations" or per_sample else contextlib.nullcontext():
        yield from engine.evaluate_groups(variants, items, forward, most=most, filler=filler, width=width)


@torch.no_grad()
def _one_after_another(
    engine: Engine,
    way: Way,
    variants: Sequence[Variant],
    items: Sequence[ItemT],
    forward: Callable[[nn.Module, ItemT], Any],
    most: int,
    filler: ItemT | None,
    width: int | None,
) -> list[list[Any]]:
    """Pass after pass on copies, or with shifts in activation space; arguments are those of `evaluate_decoding`."""
    results: list[list[Any]] = [[] for _ in items]
    changed = shards_changed if engine.layout.is_sharded else whole_weights_changed
    factors = Factors(engine.law)
    factors.start_keeping()
    for variant in variants:
        place = engine.anchor_in_place if variant.base == "anchor" else contextlib.nullcontext
        matrices = _matrices(engine) if way == "activations" and variant.shift else []
        moved = {matrix.name for _, matrix in matrices}
        names = [name for name in engine.trainable if name not in moved]
        with place(), changed(engine, variant.shift, names), _layers(factors, matrices, variant.shift):
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


def _matrices(engine: Engine) -> list[tuple[HookedModule, Weight]]:
    """The matrices that can move in activation space, with all modules that use them."""
    hooked_modules = [hooked for unit in engine.layout.units for hooked in unit.hooked_modules]
    pairs = [(hooked, matrix) for hooked in hooked_modules if (matrix := shifts_in_activations(hooked))]
    uses = Counter(weight.name for hooked in hooked_modules for weight in hooked.weights)
    can_move = Counter(matrix.name for _, matrix in pairs)
    return [(hooked, matrix) for hooked, matrix in pairs if uses[matrix.name] == can_move[matrix.name]]


@contextlib.contextmanager
def _layers(factors: Factors, matrices: Sequence[tuple[HookedModule, Weight]], shift: Combination) -> Iterator[None]:
    """Within, modules give what they would give if their matrices were shifted.

    Args:
        factors: of the run's directions.
        matrices: with the modules that use them.
        shift: of all of them.
    """
    with contextlib.ExitStack() as layers:
        for hooked, matrix in matrices:
            moved = MovedOutput(factors, hooked, matrix, shift, head_rows(hooked.module))
            layer = functools.partial(_moved, moved)
            add_layer(hooked.module, Layer.FAN_OUT, layer)
            layers.callback(remove_layer, hooked.module, Layer.FAN_OUT)
        yield


def _moved(moved: MovedOutput, module: nn.Module, inner: Forward, *args: Any, **kwargs: Any) -> Tensor:
    return moved(args[0] if args else kwargs["input"], inner(*args, **kwargs))


def _is_plain(engine: Engine) -> bool:
    """The model can run on its weights as they are."""
    return not engine.layout.is_sharded and engine.compute_dtype is None
