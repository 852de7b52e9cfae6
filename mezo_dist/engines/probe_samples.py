"""The second half of the probe: every sample of a pass is evaluated along its own direction, and along no other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn

from mezo_dist.algorithms.base import Variant
from mezo_dist.directions.combination import ZERO, Combination
from mezo_dist.directions.seeds import derive_seed
from mezo_dist.distributed.communicator import OutOfStepError
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.outputs import Outputs, distance, rounding_error, size_of, tensors_of
from mezo_dist.engines.probe_messages import SettingNames, first_line, narrowed, some_of
from mezo_dist.errors import UserError

log = logging.getLogger(__name__)

COEFFICIENT = 1e-2
"""Coefficient of every sample's direction."""
TOLERANCE = {4: 1e-2, 2: 0.2}
"""Largest error of outputs, as a part of the largest change by the directions, by the bytes of a number: directions per
sample are computed in another way than variants, which does not round the changed weights."""


ItemT = TypeVar("ItemT")


def check_directions_per_sample(
    engine: Engine,
    item: ItemT,
    forward: Callable[[nn.Module, ItemT], object],
    *,
    slots: Sequence[int],
    seed: int,
    settings: SettingNames,
) -> None:
    """Every sample of a pass with a direction per sample against a pass in which all have that sample's.

    Args:
        engine: owns the weights.
        item: a micro-batch of a few samples.
        forward: as for `Engine.evaluate`; gives tensors, the first dimension of which are the samples.
        slots: places of the samples in the batch, as ``item.slots`` has them.
        seed: of the directions.
        settings: the caller's names of settings.

    Raises:
        UserError: a sample's direction does not reach it, or reaches another one; the message names the weights.
    """
    engine = _in_fp32(engine, item, forward)
    shifts = tuple(Combination.single(derive_seed(seed, "sample", k), COEFFICIENT) for k in range(max(slots) + 1))
    failures: list[Exception] = []

    def is_wrong(names: Sequence[str]) -> bool:
        try:
            error, effect, size = _errors(engine, item, forward, names, slots, shifts)
        except (UserError, OutOfStepError):
            raise
        except (RuntimeError, ValueError, IndexError, TypeError) as failure:
            failures.append(failure)
            return True
        tolerance = TOLERANCE[4 if engine.pass_dtype.itemsize >= 4 else 2]
        return error > tolerance * effect + max(rounding_error(engine), 1e-5) * size

    if not is_wrong(engine.trainable):
        return
    culprits = narrowed(engine.trainable, is_wrong)
    failed = f": it fails ({first_line(failures[-1])})" if failures else ""
    raise settings.error(
        "algorithm.per_sample",
        f"a direction per sample of {some_of(culprits)} does not reach the sample that it is for, as the module does "
        f"not work sample by sample{failed}; set it to false, or {settings.leave_out(culprits)}",
    ) from (failures[-1] if failures else None)


def _in_fp32(engine: Engine, item: ItemT, forward: Callable[[nn.Module, ItemT], object]) -> Engine:
    """An engine of the same weights with a forward pass in fp32, if the model's code can do that; else the same one.

    Args:
        engine: owns the weights.
        item: the micro-batch to try it on.
        forward: calls the model.
    """
    if engine.pass_dtype.itemsize >= 4:
        return engine
    exact = Engine(engine.model, engine.law, engine.layout, compute_dtype=torch.float32)
    exact.one_by_one = engine.one_by_one
    try:
        exact.evaluate([Variant()], [item], forward)
    except (OutOfStepError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        log.info("directions per sample are checked in %s: %s", engine.pass_dtype, first_line(error))
        return engine
    return exact


def _errors(
    engine: Engine,
    item: ItemT,
    forward: Callable[[nn.Module, ItemT], object],
    names: Sequence[str],
    slots: Sequence[int],
    shifts: tuple[Combination, ...],
) -> tuple[float, float, float]:
    """How wrong directions per sample of some weights are.

    Args:
        engine: owns the weights.
        item: the micro-batch.
        forward: calls the model.
        names: the weights that move.
        slots: places of the samples in the batch.
        shifts: the direction of every place in the batch.

    Returns:
        The largest error of an output, the largest change by the directions, and the largest output.
    """
    variants = [Variant(), Variant(ZERO, shifts), *(Variant(shifts[slot]) for slot in slots)]
    with engine.moving_only(names):
        (row,) = engine.evaluate(variants, [item], forward)
    base, each, *alone = [_rows_by_sample(tensors_of(result), len(slots)) for result in row]
    wanted = [torch.stack([alone[i][t][i] for i in range(len(slots))]) for t in range(len(base))]
    return distance(each, wanted), distance(wanted, base), size_of(wanted)


def _rows_by_sample(outputs: Outputs, num_samples: int) -> Outputs:
    """The outputs with one row per sample."""
    rows = [tensor for tensor in outputs if tensor.dim() and len(tensor) == num_samples]
    if not rows:
        raise UserError("algorithm.per_sample: a forward pass must give one loss for each sample")
    return rows
