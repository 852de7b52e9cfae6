"""Makes the variants' weights of one hooked module: into scratch, from one read of the weights, just before they are
used."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from mezo_dist.directions.combination import ZERO, Combination
from mezo_dist.directions.law import Law
from mezo_dist.engines.hooked import HookedModule, Weight
from mezo_dist.engines.lockstep.fanout import Call, Served, on_tensors
from mezo_dist.engines.lockstep.head_slice import SlicedHead
from mezo_dist.engines.lockstep.persample import with_sample_directions
from mezo_dist.engines.lockstep.sparse_rows import Rows, plan_sparse_rows

ALIGNMENT = 64
"""Bytes. Matrix kernels may give other bits for operands that are not aligned to their vector registers."""


@final
class Materialiser:
    """See `Materialise` in `mezo_dist.engines.lockstep.fanout`.

    Args:
        law: what the directions are.
        compute_dtype: dtype of what is made; the weights' own if None.
        keep_sources: weights stay where they are while passes run, so variants without a shift may use them
            themselves. Not so on sharded layouts, whose gathered weights are released when the passes have gone on.

    Attributes:
        shifts: what each variant of the current passes adds to the weights; set it before they run.
    """

    def __init__(self, law: Law, compute_dtype: torch.dtype | None, *, keep_sources: bool) -> None:
        self.shifts: list[Combination] = []
        self._law = law
        self._compute_dtype = compute_dtype
        self._keep_sources = keep_sources
        self._scratch = torch.empty(0)

    def __call__(self, hooked: HookedModule, calls: Sequence[Call], real: Callable[..., Any]) -> Served:
        """The weights of ``hooked module`` under every variant among its ``calls``."""
        rows = plan_sparse_rows(hooked, calls, real)
        variants = sorted({call.caller.variant for call in calls})
        sources = [_source(weight.tensor.detach(), rows) for weight in hooked.weights]
        must_copy = (hooked.spans_blocks and not self._keep_sources) or not all(map(_aligned, sources))
        copies = len(variants) if must_copy or self._compute_dtype else sum(bool(self.shifts[v]) for v in variants)
        allocate = torch.empty_like if hooked.spans_blocks else self._scratch_for(sources, copies)
        tensors: dict[int, list[Tensor]] = {v: [] for v in variants}
        for weight, source in zip(hooked.weights, sources, strict=True):
            for v, tensor in self._variants_of(weight, source, rows, variants, allocate, must_copy).items():
                tensors[v].append(tensor)
        forward = None if rows is None else rows.forward
        if any(call.caller.sample_shifts for call in calls):
            shared = forward or functools.partial(on_tensors, hooked, real)
            head_rows = rows.indices if rows is not None and isinstance(real, SlicedHead) else None
            forward = with_sample_directions(self._law, hooked, calls, real, shared, head_rows)
        return Served(tensors, forward)

    def _variants_of(
        self,
        weight: Weight,
        source: Tensor,
        rows: Rows | None,
        variants: Sequence[int],
        allocate: Callable[..., Tensor],
        must_copy: bool,
    ) -> dict[int, Tensor]:
        """One weight (or its needed rows) under every variant. Variants with the same shift share one tensor, and those
        that do not move the weight share the weight itself."""
        dtype = self._compute_dtype if self._compute_dtype and source.is_floating_point() else source.dtype
        shifts = {v: self.shifts[v] if weight.trainable else ZERO for v in variants}
        must_copy = must_copy or dtype != source.dtype
        moved = [shift for shift in dict.fromkeys(shifts.values()) if shift or must_copy]
        made = {shift: allocate(source, dtype=dtype) for shift in moved}
        if moved:
            self._law.add(
                source,
                moved,
                list(made.values()),
                param_id=weight.param_id,
                shape=weight.shape,
                rows=None if rows is None else rows.indices,
            )
        return {v: made.get(shift, source) for v, shift in shifts.items()}

    def _scratch_for(self, sources: Sequence[Tensor], copies: int) -> Callable[..., Tensor]:
        """Hands out pieces of one buffer that is kept from hooked module to hooked module: fresh memory costs page
        faults."""
        sizes = (source.numel() * (self._compute_dtype or source.dtype).itemsize for source in sources)
        need = sum(map(_padded, sizes)) * copies
        if self._scratch.numel() < need or self._scratch.device != sources[0].device:
            self._scratch = torch.empty(need, dtype=torch.uint8, device=sources[0].device)
        used = 0

        def allocate(like: Tensor, dtype: torch.dtype) -> Tensor:
            nonlocal used
            num_bytes = like.numel() * dtype.itemsize
            piece = self._scratch[used : used + num_bytes].view(dtype).view(like.shape)
            used += _padded(num_bytes)
            return piece

        return allocate


def _source(tensor: Tensor, rows: Rows | None) -> Tensor:
    return tensor if rows is None else tensor.index_select(0, rows.indices)


def _aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % ALIGNMENT == 0


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
