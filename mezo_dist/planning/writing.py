"""Memory of writing texts: keys and values of all tokens, and copies of weights (see `mezo_dist.engines.decoding`)."""

from __future__ import annotations

from mezo_dist.planning.machine import Machine
from mezo_dist.planning.rounds import BasePasses
from mezo_dist.planning.setting import Setting
from mezo_dist.planning.shapes import ModelShape
from mezo_dist.planning.weights import anchor_copy, unit_bytes


def writing(
    shape: ModelShape, setting: Setting, base: BasePasses, width: int, machine: Machine, free: int
) -> tuple[str, dict[str, int]]:
    """The moment when texts have their full length: keys and values of all their tokens, in every layer. Under law
    lowrank, and from copies of the trainable weights (where these fit into half of the free memory), one pass after
    another writes; otherwise all variants write in lock step (`mezo_dist.engines.decoding`).

    Args:
        shape: the model.
        setting: how the run goes.
        base: its variants.
        width: micro-batches in lock step.
        machine: its ranks.
        free: bytes of a rank that are not in use when the run begins.
    """
    way = writing_way(shape, setting, machine.ranks, free)
    copy = copy_bytes(shape, setting, machine.ranks) if way == "copies" else 0
    passes = 1 if way != "lock step" and not setting.is_sharded else width * (1 if way == "copies" else base.variants)
    keys = 2 * shape.kv_heads * shape.head_dim * shape.layers * setting.pass_bytes
    sizes = [unit_bytes(unit, setting, machine.ranks) if setting.is_sharded else 0 for unit in shape.units]
    parts = {
        "kv cache": passes * setting.micro_batch * (setting.tokens + setting.targets) * keys,
        "copy": copy,
        "gathered": sum(s for s, u in zip(sizes, shape.units, strict=True) if u.stays) + 2 * max(sizes),
    }
    return f"texts are written ({way})", parts


def writing_way(shape: ModelShape, setting: Setting, ranks: int, free: int) -> str:
    """How variants write; see `mezo_dist.engines.decoding.choose_way`.

    Args:
        shape: the model.
        setting: how the run goes.
        ranks: all ranks.
        free: bytes of a rank that are not in use when the run begins.
    """
    if setting.law == "lowrank":
        return "activations"
    return "copies" if copy_bytes(shape, setting, ranks) <= free / 2 else "lock step"


def copy_bytes(shape: ModelShape, setting: Setting, ranks: int) -> int:
    """A copy of this rank's trainable weights; of all weights, where they are cast.

    Args:
        shape: the model.
        setting: how the run goes.
        ranks: all ranks.
    """
    if setting.compute is not None and not setting.is_sharded:
        return shape.size * setting.pass_bytes
    return anchor_copy(shape, setting, ranks)
