"""Where the weights of variants will be, and what is to be computed into them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from mezo_dist.directions import devices
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.law import Law
from mezo_dist.directions.parts import KeptParts, Part
from mezo_dist.engines.hooked import HookedModule, Weight, as_parameter
from mezo_dist.engines.lockstep.plans import UNMOVED, shifts_of
from mezo_dist.engines.lockstep.scratch_buffer import Allocate
from mezo_dist.engines.lockstep.sparse_rows import Rows
from mezo_dist.engines.scratch import ALIGNMENT


@final
class VariantTensors:
    """Tensors for the weights of variants, laid out one after another and computed together.

    Variants with the same shift share one tensor, and those that do not move a weight share the weight itself.

    Args:
        same: see `mezo_dist.engines.lockstep.plans.same_shifts`.
        compute_dtype: dtype of what is made; the weights' own if None.
        allocate: makes the tensors.
    """

    def __init__(
        self, same: Sequence[int], compute_dtype: torch.dtype | None, allocate: Allocate = torch.empty_like
    ) -> None:
        self._same, self._compute_dtype, self._allocate = same, compute_dtype, allocate
        self._todo: dict[tuple[int, ...], list[Part]] = {}

    def of_module(
        self,
        hooked: HookedModule,
        sources: Sequence[Tensor],
        variants: Sequence[int],
        *,
        rows: Rows | None = None,
        must_copy: bool,
    ) -> dict[int, list[Tensor]]:
        """All weights of a module, for each variant.

        Args:
            hooked: the module.
            sources: its weights, or their needed rows.
            variants: numbers of the variants, ascending.
            rows: the needed rows, if not all.
            must_copy: whether a variant without a shift needs a copy, too.
        """
        tensors: dict[int, list[Tensor]] = {v: [] for v in variants}
        for weight, source in zip(hooked.weights, sources, strict=True):
            under = self.of_weight(weight, source, variants, rows=rows, must_copy=must_copy)
            for v, tensor in under.items():
                tensors[v].append(as_parameter(weight, tensor))
        return tensors

    def of_weight(
        self, weight: Weight, source: Tensor, variants: Sequence[int], *, rows: Rows | None = None, must_copy: bool
    ) -> dict[int, Tensor]:
        """One weight for each variant. Arguments are those of `of_module`, for a single weight."""
        dtype = self._compute_dtype if self._compute_dtype and source.is_floating_point() else source.dtype
        numbers = {v: self._same[v] if weight.trainable else UNMOVED for v in variants}
        must_copy = must_copy or dtype != source.dtype
        moved = [number for number in dict.fromkeys(numbers.values()) if number != UNMOVED or must_copy]
        outputs = {number: self._allocate(source, dtype=dtype) for number in moved}
        if moved:
            indices = None if rows is None else rows.indices
            part = Part(source, tuple(outputs.values()), weight.param_id, weight.shape, rows=indices)
            self._todo.setdefault(tuple(moved), []).append(part)
        return {v: outputs.get(number, source) for v, number in numbers.items()}

    def fills(self) -> list[tuple[tuple[int, ...], KeptParts]]:
        """What is to be computed, for more than one time: numbers of variants (or `UNMOVED`) whose shifts are added
        together, and the weights that they are added to, each with one output for each of them."""
        return [(numbers, KeptParts(parts)) for numbers, parts in self._todo.items()]

    def compute(self, law: Law, shifts: Sequence[Combination]) -> None:
        """Compute them, once.

        Args:
            law: what the directions are.
            shifts: of each variant.
        """
        for numbers, parts in self._todo.items():
            law.add_parts(parts, shifts_of(numbers, shifts))


def restricted(hooked: HookedModule, names: frozenset[str]) -> HookedModule:
    """``hooked``, of whose weights only those called ``names`` may move."""
    weights = [dataclasses.replace(w, trainable=w.trainable and w.name in names) for w in hooked.weights]
    return dataclasses.replace(hooked, weights=tuple(weights))


def aligned(tensor: Tensor) -> bool:
    """Whether kernels may use a tensor where it lies (`mezo_dist.engines.scratch.ALIGNMENT`)."""
    return devices.address(tensor) % ALIGNMENT == 0
