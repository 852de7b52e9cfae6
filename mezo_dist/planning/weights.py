"""Bytes of weights: those that a rank keeps, a kept anchor, and units while they are whole."""

from __future__ import annotations

import math

from mezo_dist.planning.setting import Setting
from mezo_dist.planning.shapes import ModelShape, UnitShape, WeightShape


def resident_weights(shape: ModelShape, setting: Setting, ranks: int) -> int:
    """Weights that a rank keeps: all of them, or its shard of each. FSDP2 cuts the first dimension into equal numbers
    of rows, ZeRO-3 the flattened weight, both rounded up.

    Args:
        shape: the model.
        setting: how the run goes.
        ranks: all ranks.
    """
    return 0 if setting.offload else sum(shard_size(w, setting, ranks) for w in shape.weights) * setting.weight_bytes


def shard_size(weight: WeightShape, setting: Setting, ranks: int) -> int:
    """Elements of a weight that one rank keeps, padding included.

    Args:
        weight: the weight.
        setting: how the run goes.
        ranks: all ranks.
    """
    over = setting.shard_ranks(ranks)
    if setting.layout == "fsdp":
        return math.ceil(weight.shape[0] / over) * math.prod(weight.shape[1:])
    return math.ceil(weight.size / over) if setting.layout == "zero" else weight.size


def anchor_copy(shape: ModelShape, setting: Setting, ranks: int) -> int:
    """MeZO-SVRG's kept copy: this rank's shards of the trainable weights. On sharded layouts the largest shard is there
    once more while copy and weights change places.

    Args:
        shape: the model.
        setting: how the run goes.
        ranks: all ranks.
    """
    sizes = [_unpadded(weight, setting, ranks) for weight in shape.weights if weight.trainable]
    return sum(sizes) * setting.weight_bytes


def _unpadded(weight: WeightShape, setting: Setting, ranks: int) -> int:
    return min(weight.size, shard_size(weight, setting, ranks))


def unit_bytes(unit: UnitShape, setting: Setting, ranks: int) -> int:
    """Bytes of a gathered unit, padding included: every weight once.

    Args:
        unit: the unit.
        setting: how the run goes.
        ranks: all ranks.
    """
    over = setting.shard_ranks(ranks)
    return sum(over * shard_size(weight, setting, ranks) for weight in unit.weights) * setting.gather_bytes
