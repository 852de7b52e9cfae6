"""Makes the weights of variants into scratch, just before they are used: those of one hooked module at a time, while
the cache holds them; on a GPU, where a launch costs more than a small module, those of several modules of a unit
together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, final

import torch
from torch import Tensor, nn

from mezo_dist.directions import devices
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.law import Law
from mezo_dist.engines.hooked import HookedModule, Weight
from mezo_dist.engines.layouts.base import Layout
from mezo_dist.engines.lockstep.call_order import CallOrder
from mezo_dist.engines.lockstep.factors import Factors
from mezo_dist.engines.lockstep.fanout import Served, on_tensors
from mezo_dist.engines.lockstep.forwards import Forward, Layer, forward_below
from mezo_dist.engines.lockstep.head_slice import head_rows
from mezo_dist.engines.lockstep.in_registers import InRegisters
from mezo_dist.engines.lockstep.lowrank_shift import shifts_in_activations, with_shift
from mezo_dist.engines.lockstep.passes import Call, Coroutine, Read
from mezo_dist.engines.lockstep.persample import seeds_of, thin_weights, with_sample_directions
from mezo_dist.engines.lockstep.plans import UNMOVED, Plan, Plans, same_shifts
from mezo_dist.engines.lockstep.scratch_buffer import Allocate, ScratchBuffer
from mezo_dist.engines.lockstep.sparse_rows import Rows, may_need_rows, plan_sparse_rows
from mezo_dist.engines.lockstep.variant_tensors import VariantTensors, aligned, restricted
from mezo_dist.engines.scratch import leading, padded
from mezo_dist.engines.units import Unit
from mezo_dist.engines.whereabouts import Whereabouts
from mezo_dist.errors import UserError


class Need(Protocol):
    """See `Materialiser`."""

    def __call__(self, hooked: HookedModule, *, keep_current: bool) -> None:
        """Make the unit of ``hooked`` whole."""


@final
class Materialiser:
    """See `Server` in `mezo_dist.engines.lockstep.fanout`.

    Args:
        law: what the directions are.
        compute_dtype: dtype of what is made; the weights' own if None.
        layout: where the weights live.
        need: makes the unit of a hooked module whole (and keeps the one that is whole now, if told so).
        compiled: forwards of modules that stand in for their own.
        in_registers: computes linear layers on variants that are not made in scratch; None: nobody does.

    Attributes:
        factors: what directions per sample, and shifts in activation space, are made of.
        in_activations: shifts of matrices are added to what their layers give, where law and layer allow it.
        only: names of the weights that shifts, and directions per sample, move; all trainable ones if None.
        scratch: where the weights of variants are made.
    """

    def __init__(
        self,
        law: Law,
        compute_dtype: torch.dtype | None,
        layout: Layout,
        need: Need,
        compiled: Mapping[nn.Module, Callable[[Call, list[Tensor]], object]],
        in_registers: InRegisters | None = None,
    ) -> None:
        self._shifts: Sequence[Combination] = ()
        self._same: tuple[int, ...] = ()
        self._base = ""
        self.only: frozenset[str] | None = None
        self.factors = Factors(law)
        self.in_activations = False
        self._law = law
        self._compute_dtype = compute_dtype
        self._layout = layout
        self._need = need
        self._compiled = compiled
        self._in_registers = in_registers
        # Weights stay where they are while passes run, so variants without a shift may use them themselves. Not so on
        # sharded layouts, whose gathered weights are released when the passes have gone on.
        self._keep_sources = not layout.is_sharded
        self._plans = Plans()
        self.scratch = ScratchBuffer(self._plans.clear)
        self._unit_of = {hooked.module: unit for unit in layout.units for hooked in unit.hooked_modules}
        self._unrestricted = {hooked.module: hooked for unit in layout.units for hooked in unit.hooked_modules}
        # Passes with shifts in activation space make other modules than others do.
        self._orders = {in_activations: CallOrder(layout.units) for in_activations in (False, True)}
        self._kept: dict[nn.Module, Served] = {}
        self._by_sample: dict[nn.Module, Served] = {}
        self._made: Mapping[nn.Module, Served] = {}
        self._at_hand: Mapping[nn.Module, Served] = {}
        self._came: set[nn.Module] = set()

    def begin(self, shifts: Sequence[Combination], base: str = "current") -> None:
        """Passes are about to run.

        Args:
            shifts: what each of their variants adds to the weights.
            base: which contents the weights have now; each has memory, and so plans, of its own.
        """
        self._shifts, self._same, self._base = shifts, same_shifts(shifts), base

    def serve(self, hooked: HookedModule, calls: Sequence[Call], real: Forward) -> Served:
        """The weights of a module under every variant among its calls.

        Args:
            hooked: the module.
            calls: its waiting calls.
            real: its own forward.
        """
        self._need(hooked, keep_current=False)
        hooked = self._as_restricted(hooked)
        if self.in_activations and self._can_keep(hooked) and not any(call.caller.sample_shifts for call in calls):
            if hooked.module not in self._kept:
                self._keep(self._unit_of[hooked.module])
            return self._kept[hooked.module]
        if self.in_activations and (matrix := shifts_in_activations(hooked)):
            return self._serve_in_activations(hooked, matrix, calls, real)
        if self._in_registers is not None:
            usual = functools.partial(self._serve_weights, alone=True)  # layers are not made before others need theirs
            return self._in_registers.serve(hooked, calls, real, self._shifts, usual)
        return self._serve_weights(hooked, calls, real)

    def at_hand(self, hooked: HookedModule, caller: Coroutine) -> Served | None:
        """See `Server.at_hand`."""
        served = self._kept.get(hooked.module)
        if served is not None:
            return None if caller.sample_shifts else served
        served = self._at_hand.get(hooked.module)
        if served is None or caller.variant not in served.tensors:
            return None
        if hooked.module not in self._came:
            if may_need_rows(hooked.module):
                return None
            self._came.add(hooked.module)
            self._orders[self.in_activations].add(hooked.module)
        return self._with_sample_directions(hooked, served) if caller.sample_shifts else served

    def _with_sample_directions(self, hooked: HookedModule, served: Served) -> Served:
        """A module whose weights were made with others', for passes with a direction per sample; until others are made.

        Args:
            hooked: the module.
            served: its weights.
        """
        if not self._by_sample:
            self.factors.make_together(w for other in self._at_hand for w in self._thin_weights(other))
        if hooked.module not in self._by_sample:
            real = forward_below(hooked.module, Layer.FAN_OUT)
            shared = functools.partial(on_tensors, hooked, real)
            some = self._as_restricted(hooked)
            forward = with_sample_directions(self.factors, some, self.factors.seeds, real, shared, None)
            self._by_sample[hooked.module] = Served(served.tensors, forward)
        return self._by_sample[hooked.module]

    def _thin_weights(self, module: nn.Module) -> list[Weight]:
        """See `thin_weights`; none of modules that `_with_sample_directions` is not asked about."""
        return [] if may_need_rows(module) else thin_weights(self._as_restricted(self._unrestricted[module]))

    def _as_restricted(self, hooked: HookedModule) -> HookedModule:
        """``hooked``, of whose weights only those that may move now are trainable."""
        return hooked if self.only is None else restricted(hooked, self.only)

    def _can_keep(self, hooked: HookedModule) -> bool:
        """Whether a module's weights under all variants take so little memory with shifts in activation space that
        they are kept while the passes run: only vectors are copied."""
        if hooked.spans_blocks or not self._keep_sources or self._compute_dtype or hooked.module in self._compiled:
            return False
        matrix = shifts_in_activations(hooked)
        return all(
            len(weight.shape) < 2 or (aligned(weight.tensor) and (weight is matrix or not weight.trainable))
            for weight in hooked.weights
        )

    def _keep(self, unit: Unit) -> None:
        """Make what all passes use of a unit's modules until they are over, in one go: so the model can be called once
        for every token, and passes wait for one another but rarely."""
        tensors = VariantTensors(self._same, self._compute_dtype)
        for hooked in unit.hooked_modules:
            some = self._as_restricted(hooked)
            if not self._can_keep(some):
                continue
            matrix = shifts_in_activations(some)
            vectors = frozenset(weight.name for weight in some.weights if weight is not matrix)
            sources = [weight.tensor for weight in some.weights]
            variants, must_copy = range(len(self._shifts)), not all(map(aligned, sources))
            under = tensors.of_module(restricted(some, vectors), sources, variants, must_copy=must_copy)
            forward = None
            if matrix is not None:
                real = functools.partial(on_tensors, hooked, forward_below(hooked.module, Layer.FAN_OUT))
                forward = with_shift(self.factors, hooked, matrix, self._shifts, real, head_rows(hooked.module))
            self._kept[hooked.module] = Served(under, forward)
        tensors.compute(self._law, self._shifts)

    def _serve_in_activations(
        self, hooked: HookedModule, matrix: Weight, calls: Sequence[Call], real: Forward
    ) -> Served:
        """The matrix as it is, and what its shifts change in the output.

        Args:
            hooked: the module.
            matrix: its weight.
            calls: those that wait.
            real: its forward.
        """
        others = frozenset(weight.name for weight in hooked.weights) - {matrix.name}
        served = self._serve_weights(restricted(hooked, others), calls, real, alone=True)
        unmoved = served.forward or functools.partial(on_tensors, hooked, real)
        forward = with_shift(self.factors, hooked, matrix, self._shifts, unmoved, head_rows(hooked.module))
        return Served(served.tensors, forward)

    def _serve_weights(
        self, hooked: HookedModule, calls: Sequence[Call], real: Forward, *, alone: bool = False
    ) -> Served:
        """The weights themselves.

        Args:
            hooked: the module.
            calls: those that wait.
            real: its forward.
            alone: no other modules' weights are made with them.
        """
        rows = plan_sparse_rows(hooked, calls, real)
        variants = sorted({call.caller.variant for call in calls})
        self._at_hand, before = {}, self._made
        if alone or rows is not None or hooked.spans_blocks or not self._takes_launches(hooked):
            self._made = self._make([hooked], rows, variants)
        else:
            self._orders[self.in_activations].add(hooked.module)
            served = self._made.get(hooked.module)
            if served is None or not served.tensors.keys() >= set(variants):
                self._made = self._make_together(hooked, variants)
                self._came = {hooked.module}
            if self._keep_sources and not self._compiled:
                self._at_hand = self._made
        if self._made is not before:
            self._by_sample = {}
        served = self._made[hooked.module]
        forward = self._compiled.get(hooked.module) if rows is None else rows.forward
        if any(call.caller.sample_shifts for call in calls):
            shared = forward or functools.partial(on_tensors, hooked, real)
            if hooked.module in self._at_hand:
                return self._with_sample_directions(hooked, served)
            seeds, rows_of_head = seeds_of(calls), head_rows(hooked.module)
            forward = with_sample_directions(self.factors, hooked, seeds, real, shared, rows_of_head)
        return served if forward is None else Served(served.tensors, forward)

    def _takes_launches(self, hooked: HookedModule) -> bool:
        return devices.takes_launches(self.describe(hooked.weights[0])[1])

    def _make_together(self, hooked: HookedModule, variants: Sequence[int]) -> Mapping[nn.Module, Served]:
        """The weights of a module, and of those that follow it, under every variant: by a plan, where there is one.

        Args:
            hooked: the module.
            variants: numbers of the variants, ascending.
        """
        if self.only is not None or not self._keep_sources:  # other weights every time
            return self._make(self._together(hooked, len(variants)), None, variants)
        key = (hooked.module, self.in_activations, tuple(variants), self._same, self._base)
        plan = self._plans.find(key, self.scratch.buffer)
        if plan is None:
            self._made = {}
            plan = self._plan(self._together(hooked, len(variants)), None, variants)
            self._plans.keep(key, plan)
        self.scratch.use(plan.num_bytes)
        plan.run(self._law, self._shifts)
        return plan.made

    def _together(self, hooked: HookedModule, num_variants: int) -> list[HookedModule]:
        """The module, and those of its unit that the passes before this one called after it: as many as are worth a
        launch of their own.

        Args:
            hooked: the module.
            num_variants: that are made of each weight.
        """
        following = self._orders[self.in_activations].following(hooked.module)
        if self.in_activations:  # passes before this one may have needed these matrices, and this one does not
            following = [other for other in following if not shifts_in_activations(other)]
        group = [hooked, *map(self._as_restricted, following)]
        sizes = [num_variants * self._bytes_of([weight.tensor for weight in some.weights]) for some in group]
        return group[: leading(sizes)]

    def _make(
        self, group: Sequence[HookedModule], rows: Rows | None, variants: Sequence[int]
    ) -> Mapping[nn.Module, Served]:
        """All weights of some modules under every variant, in one go.

        Args:
            group: the modules.
            rows: the needed rows of a single module's weights, if not all.
            variants: numbers of the variants, ascending.
        """
        self._made = {}  # they are in the same scratch
        plan = self._plan(group, rows, variants)
        plan.run(self._law, self._shifts)
        return plan.made

    def _plan(self, group: Sequence[HookedModule], rows: Rows | None, variants: Sequence[int]) -> Plan:
        """How all weights of some modules are made under every variant. Arguments are those of `_make`."""
        # Parameters themselves, for a plan must not hold memory that these have left.
        sources = {hooked: [_source(weight.tensor, rows) for weight in hooked.weights] for hooked in group}
        must_copy = {
            hooked: (hooked.spans_blocks and not self._keep_sources) or not all(map(aligned, some))
            for hooked, some in sources.items()
        }
        moved = sum(self._same[v] != UNMOVED for v in variants)
        need = sum(
            self._bytes_of(some) * (len(variants) if must_copy[hooked] or self._compute_dtype else moved)
            for hooked, some in sources.items()
        )
        allocate: Allocate = torch.empty_like
        if not group[0].spans_blocks:
            allocate = self.scratch.pieces(need, sources[group[0]][0].device)
        tensors, made = VariantTensors(self._same, self._compute_dtype, allocate), dict[nn.Module, Served]()
        for hooked, some in sources.items():
            under = tensors.of_module(hooked, some, variants, rows=rows, must_copy=must_copy[hooked])
            made[hooked.module] = Served(under)
        whereabouts = Whereabouts(weight for hooked in group for weight in hooked.weights)
        return Plan(made, tensors.fills(), need, self.scratch.buffer, whereabouts)

    def read(self, reads: Sequence[Read], *, nested: bool) -> dict[int, Tensor]:
        """One weight under every variant among ``reads``, not in scratch: a reader does not say when it is done with
        it.

        Raises:
            UserError: a pass has a direction per sample, which only the weight's own module can apply.
        """
        self._need(reads[0].hooked, keep_current=nested)
        hooked = self._as_restricted(reads[0].hooked)
        weight = hooked.weights[reads[0].hooked.weights.index(reads[0].weight)]
        if weight.trainable and any(read.caller.sample_shifts for read in reads):
            raise UserError(
                f"algorithm.per_sample: {weight.name} is used by other modules than its own, where a direction per "
                "sample cannot be applied; set it to false, or leave it out with model.freeze"
            )
        source = weight.tensor.detach()
        variants = sorted({read.caller.variant for read in reads})
        tensors = VariantTensors(self._same, self._compute_dtype)
        must_copy = not self._keep_sources or not aligned(source)
        under = tensors.of_weight(weight, source, variants, must_copy=must_copy)
        tensors.compute(self._law, self._shifts)
        return {v: nn.Parameter(tensor, requires_grad=weight.trainable) for v, tensor in under.items()}

    def describe(self, weight: Weight) -> tuple[torch.dtype, torch.device]:
        """See `Server.describe`."""
        dtype, device = self._layout.describe(weight)
        return self._compute_dtype if self._compute_dtype and dtype.is_floating_point else dtype, device

    def any_goes_on(self, answers: Sequence[bool]) -> bool:
        """See `Server.any_goes_on`. Collective on sharded layouts."""
        if not self._layout.is_sharded:
            return any(answers)
        self._layout.synchronize("agree whether a forward pass goes on")
        return self._layout.total(int(any(answers))) > 0

    def end(self) -> None:
        """The passes are over."""
        self.scratch.end()
        self._made = self._at_hand = {}
        self._kept, self._by_sample = {}, {}
        self.factors.make_together(())
        if self._orders[self.in_activations].end():
            self._plans.clear()

    def _bytes_of(self, sources: Sequence[Tensor]) -> int:
        """Bytes of one variant of some weights."""
        return sum(padded(source.numel() * (self._compute_dtype or source.dtype).itemsize) for source in sources)


def _source(tensor: Tensor, rows: Rows | None) -> Tensor:
    return tensor if rows is None else tensor.index_select(0, rows.indices)
