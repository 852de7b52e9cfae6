"""`advance`: many updates of a weight in one pass over it, with the same bits as one after another.

Stepping reads and writes all weights for every step, and on most machines waits for memory. Here a chunk of the weight
goes through all its updates, each rounded as it was at its time, while it is in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mezo_dist.directions.add import add
from mezo_dist.directions.bits import BitLayout
from mezo_dist.directions.combination import Combination

Updates = Sequence[tuple[Combination, int | None]]
"""(combination, seed of stochastic rounding or None), one after another."""


def advance(weight: Tensor, updates: Updates, *, param_id: int, bits: BitLayout, offset: int = 0) -> None:
    """``weight <- cast(weight + combination)`` for one update after another, in place.

    Args:
        weight: fp32, bf16 or fp16, contiguous: a piece of one flattened parameter.
        updates: see `Updates`; rounding seeds only for bf16 weights, and then for all updates or for none.
        param_id: see `seeds.param_id`.
        bits: law of the directions, as a layout of bits.
        offset: index of the first element in the flattened full parameter.
    """
    if weight.device.type == "cpu" and weight.numel() and weight.is_contiguous() and _kernel_is_there():
        from mezo_dist.directions.kernels import cpu_advance

        cpu_advance.advance(weight.detach().view(-1), updates, param_id=param_id, bits=bits, offset=offset)
        return
    for combination, seed in updates:
        add(weight, [combination], [weight], param_id=param_id, bits=bits, offsets=[offset], rounding_seed=seed)


def _kernel_is_there() -> bool:
    """`add` says in the log why it is not, if so."""
    from mezo_dist.directions.add import implementation

    return implementation("cpu").__module__.endswith(".cpu")
