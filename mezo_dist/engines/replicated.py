"""The engine that keeps a whole copy of the weights in every process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn

from mezo_dist.algorithms.base import Variant
from mezo_dist.directions.combination import ZERO, Combination
from mezo_dist.directions.field import Field
from mezo_dist.directions.seeds import param_id
from mezo_dist.engines.fanout import Call, FanOut, Job, Served, on_tensors
from mezo_dist.engines.fingerprint import combine, fingerprint_shard
from mezo_dist.engines.persample import with_sample_directions
from mezo_dist.engines.rows import Rows, plan_rows
from mezo_dist.engines.sites import Site, Weight, find_sites, trainable_parameters
from mezo_dist.readout import RowLinear

ItemT = TypeVar("ItemT")


@final
class Replicated:
    """One process or many, each with all the weights; see `mezo_dist.engines.base.Engine`.

    Variants are materialised site by site into scratch; the weights are edited by `apply` and by nothing else.

    Args:
        model: any module; put into eval mode (dropout would give the two sides of an estimate different masks).
        field: what the directions are.
        compute_dtype: dtype in which weights are materialised for the forward pass; the weights' own if None.
        stochastic_rounding: how `apply` rounds 16-bit (bf16) weights; fp32 weights need no rounding.
        width: micro-batches that share one making of the variants; more of them cost activation memory.
    """

    def __init__(
        self,
        model: nn.Module,
        field: Field,
        *,
        compute_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        width: int = 8,
    ) -> None:
        self.model = model.eval()
        self.field = field
        self.width = width
        self.compute_dtype = compute_dtype
        self.stochastic_rounding = stochastic_rounding
        self._parameters = trainable_parameters(model)
        self._fanout = FanOut(find_sites(model, include_frozen=compute_dtype is not None), self._materialise)
        self._shifts: list[Combination] = []
        self._scratch = torch.empty(0)

    @torch.no_grad()
    def evaluate(
        self,
        variants: Sequence[Variant],
        items: Sequence[ItemT],
        forward: Callable[[nn.Module, ItemT], Any],
    ) -> list[list[Any]]:
        """See `Engine.evaluate`. Results are the same bits whatever the other items and variants are."""
        if any(variant.per_sample for variant in variants) and not self.field.is_lowrank:
            raise NotImplementedError(f"a direction per sample needs law lowrank, not {self.field.name}")
        results: list[list[Any]] = []
        for start in range(0, len(items), self.width):
            group = items[start : start + self.width]
            jobs = [
                Job(v, functools.partial(forward, self.model, item), _shifts_of(variant, item))
                for item in group
                for v, variant in enumerate(variants)
            ]
            self._shifts = [variant.shift for variant in variants]
            flat = self._fanout.run(jobs)
            results += [flat[i : i + len(variants)] for i in range(0, len(flat), len(variants))]
        return results

    @torch.no_grad()
    def apply(self, combination: Combination, rounding_seed: int) -> None:
        """See `Engine.apply`."""
        for number, tensor in self._parameters.values():
            stochastic = self.stochastic_rounding and tensor.dtype == torch.bfloat16
            self.field.add(
                tensor.data,
                [combination],
                [tensor.data],
                param_id=number,
                shape=tensor.shape,
                rounding_seed=rounding_seed if stochastic else None,
            )

    def fingerprint(self) -> str:
        """See `Engine.fingerprint`."""
        return combine([fingerprint_shard(tensor, param_id(name)) for name, tensor in self.named_weights()])

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine.named_weights`."""
        for name, tensor in self.model.named_parameters():
            yield name, tensor.detach()

    def never_used(self) -> list[str]:
        """Names of trainable weights that no forward pass has used so far (their updates are noise)."""
        served = self._fanout.sites_served
        used = {w.name for site in self._fanout._sites if site.name in served for w in site.weights}
        return [name for name in self._parameters if name not in used]

    def _materialise(self, site: Site, calls: Sequence[Call], real: Callable[..., Any]) -> Served:
        rows = plan_rows(site, calls, real)
        variants = sorted({call.job.variant for call in calls})
        sources = [_source(weight.tensor.detach(), rows) for weight in site.weights]
        copies = len(variants) if self.compute_dtype else sum(bool(self._shifts[v]) for v in variants)
        allocate = torch.empty_like if site.spans_blocks else self._scratch_for(sources, copies)
        tensors: dict[int, list[Tensor]] = {v: [] for v in variants}
        for weight, source in zip(site.weights, sources, strict=True):
            for v, tensor in self._variants_of(weight, source, rows, variants, allocate).items():
                tensors[v].append(tensor)
        forward = None if rows is None else rows.forward
        if any(call.job.sample_shifts for call in calls):
            shared = forward or functools.partial(on_tensors, site, real)
            head_rows = rows.indices if rows is not None and isinstance(real, RowLinear) else None
            forward = with_sample_directions(self.field, site, calls, real, shared, head_rows)
        return Served(tensors, forward)

    def _variants_of(
        self,
        weight: Weight,
        source: Tensor,
        rows: Rows | None,
        variants: Sequence[int],
        allocate: Callable[..., Tensor],
    ) -> dict[int, Tensor]:
        """One weight (or its needed rows) under every variant. Variants with the same shift share one tensor, and those
        that do not move the weight share the weight itself."""
        dtype = self.compute_dtype if self.compute_dtype and source.is_floating_point() else source.dtype
        shifts = {v: self._shifts[v] if weight.trainable else ZERO for v in variants}
        moved = [shift for shift in dict.fromkeys(shifts.values()) if shift or dtype != source.dtype]
        made = {shift: allocate(source, dtype=dtype) for shift in moved}
        if moved:
            self.field.add(
                source,
                moved,
                list(made.values()),
                param_id=weight.param_id,
                shape=weight.tensor.shape,
                rows=None if rows is None else rows.indices,
            )
        return {v: made.get(shift, source) for v, shift in shifts.items()}

    def _scratch_for(self, sources: Sequence[Tensor], copies: int) -> Callable[..., Tensor]:
        """Hands out pieces of one buffer that is kept from site to site: fresh memory costs page faults."""
        sizes = (source.numel() * (self.compute_dtype or source.dtype).itemsize for source in sources)
        need = sum(map(_aligned, sizes)) * copies
        if self._scratch.numel() < need or self._scratch.device != sources[0].device:
            self._scratch = torch.empty(need, dtype=torch.uint8, device=sources[0].device)
        used = 0

        def allocate(like: Tensor, dtype: torch.dtype) -> Tensor:
            nonlocal used
            num_bytes = like.numel() * dtype.itemsize
            piece = self._scratch[used : used + num_bytes].view(dtype).view(like.shape)
            used += _aligned(num_bytes)
            return piece

        return allocate


def _source(tensor: Tensor, rows: Rows | None) -> Tensor:
    return tensor if rows is None else tensor.index_select(0, rows.indices)


def _shifts_of(variant: Variant, item: Any) -> tuple[Combination, ...]:
    """The directions of the samples of one micro-batch, which knows their places in the batch."""
    return tuple(variant.per_sample[slot] for slot in item.slots) if variant.per_sample else ()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 64) * 64
