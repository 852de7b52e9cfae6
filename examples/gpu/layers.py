"""The part `linear` of the first half hour: what a linear layer costs that perturbs in registers (`layout.linear`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from shapes import config_of
from torch import Tensor
from torch.nn import functional as F

from mezo_dist.directions import registers
from mezo_dist.directions.bits import GAUSSIAN, RADEMACHER, BitLayout
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.kernels import reference
from mezo_dist.directions.law import Law

SAMPLES, TOKENS = 16, 40


class Machine(Protocol):
    """See `parts.Machine`."""

    rehearse: bool
    device: torch.device
    dtype: torch.dtype

    def seconds(self, run: Any) -> float:
        """Median time of a call."""


def linear(machine: Machine, shapes: list[str]) -> Iterator[dict[str, Any]]:
    """Both signs of a layer: variants made in memory and multiplied, against those that exist in registers."""
    for shape in shapes:
        hidden, wide = config_of(shape).hidden_size, config_of(shape).ffn_dim
        for rows, columns in ((hidden, hidden), (wide, hidden), (hidden, wide)):
            for bits in (RADEMACHER, GAUSSIAN):
                for inputs in (1, 4, TOKENS):  # tokens of each sample: 1 where texts are written
                    row = {"shape": shape, "matrix": f"{rows} x {columns}", "law": bits.name, "tokens": inputs}
                    yield row | both_ways(machine, rows, columns, bits, inputs)


def both_ways(machine: Machine, rows: int, columns: int, bits: BitLayout, tokens: int) -> dict[str, Any]:
    """Milliseconds of both signs of one layer, and how far the outputs lie apart.

    Args:
        machine: where.
        rows: output features.
        columns: input features.
        bits: bit layout of the direction.
        tokens: of each sample.
    """
    samples = 2 if machine.rehearse else SAMPLES
    weight = torch.randn(rows, columns, device=machine.device).to(machine.dtype) / columns**0.5
    x = torch.randn(samples * tokens, columns, device=machine.device).to(machine.dtype)
    both = [Combination.single(1, 1e-3), Combination.single(1, -1e-3)]
    made, law = [torch.empty_like(weight) for _ in both], Law(bits.name)

    def materialised() -> list[Tensor]:
        law.add(weight, both, made, param_id=1, shape=weight.shape)
        return [F.linear(x, variant) for variant in made]

    def in_registers() -> list[Tensor]:
        if machine.rehearse:  # what defines the kernel, which is for GPUs
            return reference.linear(weight, both, [x, x], param_id=1, bits=bits)
        return registers.linear(law, weight, both, [x, x], None, param_id=1)

    pairs = zip(materialised(), in_registers(), strict=True)
    worst = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
    times = {
        "products ms": machine.seconds(lambda: [F.linear(x, weight) for _ in both]),
        "materialised ms": machine.seconds(materialised),
        "registers ms": machine.seconds(in_registers),
    }
    return {name: 1000 * seconds for name, seconds in times.items()} | {"error": worst}
