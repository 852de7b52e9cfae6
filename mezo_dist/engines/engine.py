"""The engine: evaluates variants of a model's weights without changing a bit, and adds combinations to them.

There is one engine. Its layout says where the weights live and how those of a unit are gathered.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol, TypeVar, final

import torch
from torch import Tensor, nn

from mezo_dist.algorithms.base import Variant
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.law import Law
from mezo_dist.engines.anchor import Anchor
from mezo_dist.engines.compiled import Compile, compiled_units
from mezo_dist.engines.fingerprint import fingerprint_shard, to_text
from mezo_dist.engines.hooked import HookedModule
from mezo_dist.engines.layouts.base import Layout, Shard
from mezo_dist.engines.layouts.replicated import Replicated
from mezo_dist.engines.lockstep.fanout import FanOut
from mezo_dist.engines.lockstep.in_registers import InRegisters
from mezo_dist.engines.lockstep.materialise import Materialiser
from mezo_dist.engines.lockstep.passes import ForwardPass
from mezo_dist.engines.lockstep.unshard import UnshardSchedule
from mezo_dist.engines.units import find_blocks
from mezo_dist.engines.update_parts import UpdateParts

OPTIMIZER_PREFIX = "optimizer:"
"""Prefix of the names under which an optimiser's state is saved; no parameter's name has a colon."""
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class AttachedOptimizer(Protocol):
    """An optimiser that steps along gradients which were computed beside the weights."""

    def step(self, lr: float, scale: float) -> None:
        """Multiply the gradients by ``scale``, take one step with learning rate ``lr``, and forget the gradients."""

    def shards(self) -> Iterator[Shard]:
        """This rank's pieces of its state, under names that no weight has."""


@final
class Engine:
    """Runs forward passes on variants of a model's weights, and updates these. Nothing else writes to them.

    On a sharded layout `evaluate`, `fingerprint` and `named_weights` are collective: all ranks call them together.

    Args:
        model: any module; put into eval mode (dropout would give the two sides of an estimate different masks).
        law: what the directions are.
        layout: where the weights live; in every process, whole, if None.
        compute_dtype: dtype in which weights are materialised for the forward pass; the weights' own if None.
        stochastic_rounding: how `add` rounds 16-bit (bf16) weights; fp32 weights need no rounding.
        width: items that share one gather of the weights and one making of the variants; more of them cost activation
            memory. All that are given to `evaluate` if None.
        prefetch: gather a unit while the one before it computes; one unit more is held in memory.
        compile: compile the model's blocks; only where weights are whole (`mezo_dist.engines.compiled`).
        linear: how linear layers get variants of their weights: from scratch, where these are made
            (``materialised``), or in registers, as parts of the product (`mezo_dist.engines.lockstep.in_registers`),
            which sums in another order.

    Raises:
        UserError: ``registers``, where no layer can be computed so.

    Attributes:
        trainable: names of the weights that variants shift and that updates change.
        optimizer: an optimiser of torch, for the first-order baselines (`mezo_dist.baselines`); else None.
        one_by_one: run passes one after another, not in lock step; for models that keep state between calls. Only where
            weights are whole.
    """

    def __init__(
        self,
        model: nn.Module,
        law: Law,
        layout: Layout | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        width: int | None = None,
        prefetch: bool = False,
        compile: Compile = "off",
        linear: Literal["materialised", "registers"] = "materialised",
    ) -> None:
        self.model = model.eval()
        self.law = law
        self.compile = compile
        self.layout = layout or Replicated(model, whole_blocks=compile != "off")
        self.width = width
        self.compute_dtype = compute_dtype
        self.stochastic_rounding = stochastic_rounding
        self.one_by_one = False
        self.optimizer: AttachedOptimizer | None = None
        hooked_modules = [hooked for unit in self.layout.units for hooked in unit.hooked_modules]
        self._unit_of = {hooked: unit for unit in self.layout.units for hooked in unit.hooked_modules}
        self.trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        if not self.layout.is_sharded and compute_dtype is None:  # frozen weights serve as they are
            hooked_modules = [hooked for hooked in hooked_modules if any(weight.trainable for weight in hooked.weights)]
        self._unshard = UnshardSchedule(self.layout, prefetch=prefetch)
        compiled = compiled_units(iter(hooked_modules), find_blocks(model) if compile != "off" else (), compile)
        in_registers = InRegisters(law, compute_dtype, self.layout) if linear == "registers" else None
        self._materialise = Materialiser(law, compute_dtype, self.layout, self._need, compiled, in_registers)
        self._fanout = FanOut(hooked_modules, self._materialise)
        self._update_parts = UpdateParts(self.layout, self.trainable, stochastic_rounding=stochastic_rounding)
        self._anchor = Anchor(self.layout, self.trainable)

    def evaluate(
        self,
        variants: Sequence[Variant],
        items: Sequence[ItemT],
        forward: Callable[[nn.Module, ItemT], ResultT],
        *,
        most: int = 0,
        filler: ItemT | None = None,
    ) -> list[list[ResultT]]:
        """``forward(model, item)`` for every item (a micro-batch) on every variant: ``result[item][variant]``.

        `evaluate_groups` with all results at once; it raises the same errors.

        Args:
            variants: what to evaluate.
            items: this rank's micro-batches.
            forward: calls the model.
            most: the largest number of items that a rank has.
            filler: any micro-batch.
        """
        groups = self.evaluate_groups(variants, items, forward, most=most, filler=filler)
        return [row for group in groups for row in group]

    def evaluate_groups(
        self,
        variants: Sequence[Variant],
        items: Sequence[ItemT],
        forward: Callable[[nn.Module, ItemT], ResultT],
        *,
        most: int = 0,
        filler: ItemT | None = None,
        width: int | None = None,
    ) -> Iterator[list[list[ResultT]]]:
        """Evaluate ``width`` items at a time in lock step; the results of one such group after another.

        Results are the same bits whatever the other items and variants are, and on every layout. Variants of the copied
        anchor (`copy_anchor`) go through the model by themselves, after the others of their group.

        Args:
            variants: what to evaluate.
            items: this rank's micro-batches.
            forward: calls the model.
            most: the largest number of items that a rank has. A rank with fewer goes along on sharded layouts, so that
                all gather the same weights: it runs ``filler`` where it has nothing left, and throws the result away.
            filler: any micro-batch.
            width: items of a group; the engine's own ``width`` if None.

        Raises:
            NotImplementedError: per-sample directions that are not low-rank.
            UserError: per-sample directions on weights that cannot have them.
            OutOfStepError: ranks gather different units: their passes take different ways through the model.
            RuntimeError: a variant of the anchor, which was never copied.
        """
        if any(variant.per_sample for variant in variants) and not self.law.is_lowrank:
            raise NotImplementedError(f"a direction per sample needs law lowrank, not {self.law.name}")
        most = max(len(items), most if self.layout.is_sharded else 0)
        step = width or self.width or max(1, most)
        for start in range(0, most, step):
            yield self._evaluate_group(variants, items[start : start + step], forward, filler)

    @torch.no_grad()
    def _evaluate_group(
        self,
        variants: Sequence[Variant],
        items: Sequence[ItemT],
        forward: Callable[[nn.Module, ItemT], ResultT],
        filler: ItemT | None,
    ) -> list[list[ResultT]]:
        """One group of items on all variants, those of the copied anchor after the others.

        Args:
            variants: what to evaluate.
            items: the micro-batches of the group.
            forward: calls the model.
            filler: the micro-batch of a rank that has none left.
        """
        results: list[dict[int, ResultT]] = [{} for _ in items]
        for base, place in (("current", contextlib.nullcontext), ("anchor", self._anchor.in_place)):
            chosen = [v for v, variant in enumerate(variants) if variant.base == base]
            if not chosen:
                continue
            with place():
                rows = self._evaluate_in_place([variants[v] for v in chosen], base, items, forward, filler)
            for row, some in zip(results, rows, strict=True):
                for v, result in zip(chosen, some, strict=True):
                    row[v] = result
        return [[row[v] for v in range(len(variants))] for row in results]

    def _evaluate_in_place(
        self,
        variants: Sequence[Variant],
        base: str,
        items: Sequence[ItemT],
        forward: Callable[[nn.Module, ItemT], ResultT],
        filler: ItemT | None,
    ) -> list[list[ResultT]]:
        """All items on variants of the present contents of the weights, in lock step.

        Args:
            variants: what to evaluate.
            base: of all of them.
            items: the micro-batches of the group.
            forward: calls the model.
            filler: the micro-batch of a rank that has none left.
        """
        self._materialise.begin([variant.shift for variant in variants], base)
        passes = [
            ForwardPass(v, functools.partial(forward, self.model, item), _shifts_of(variant, item))
            for item in items
            for v, variant in enumerate(variants)
        ]
        if not passes:
            if filler is not None:
                self._run([ForwardPass(0, functools.partial(forward, self.model, filler))])
            return []
        alone = [[forward_pass] for forward_pass in passes]
        flat = [result for some in (alone if self.one_by_one else [passes]) for result in self._run(some)]
        return [flat[i : i + len(variants)] for i in range(0, len(flat), len(variants))]

    def _prepare_directions(self, passes: Sequence[ForwardPass]) -> None:
        """Bring what passes with a direction per sample need to their device."""
        shifts = [forward_pass.sample_shifts for forward_pass in passes if forward_pass.sample_shifts]
        if shifts:
            first = self.layout.units[0].hooked_modules[0].weights[0]
            self._materialise.factors.prepare(shifts, self._materialise.describe(first)[1])

    @contextlib.contextmanager
    def moving_only(self, names: Iterable[str]) -> Iterator[None]:
        """Within, variants shift the weights called ``names`` alone (of the trainable ones)."""
        self._materialise.only = frozenset(names)
        try:
            yield
        finally:
            self._materialise.only = None

    @contextlib.contextmanager
    def called_often(self) -> Iterator[None]:
        """Within, forwards may call the model many times, with few tokens each: under law lowrank no shifted matrices
        are made, and the thin factors of directions are kept."""
        self._materialise.in_activations = self.law.is_lowrank
        self._materialise.factors.start_keeping()
        try:
            yield
        finally:
            self._materialise.factors.stop_keeping()
            self._materialise.in_activations = False

    def anchor_in_place(self) -> contextlib.AbstractContextManager[None]:
        """Within, the contents of the copied anchor are the weights. Raises RuntimeError if it was never copied."""
        return self._anchor.in_place()

    def add(self, combination: Combination, rounding_seed: int) -> None:
        """weights <- weights + combination, in place, each rank on its shards.

        ``rounding_seed`` is for stochastic rounding, where it is on.
        """
        self.advance([(combination, rounding_seed)])

    @torch.no_grad()
    def advance(self, updates: Sequence[tuple[Combination, int]], only: tuple[str, ...] | None = None) -> None:
        """`add` for one update after another: the same bits, in one pass over the weights.

        Args:
            updates: combinations, and seeds of stochastic rounding.
            only: names of the trainable weights that are changed; all if None.
        """
        if not updates:
            return
        for stochastic, parts in self._update_parts.groups(only):
            self.law.advance_parts(
                parts, [(combination, seed if stochastic else None) for combination, seed in updates]
            )

    @torch.no_grad()
    def scale(
        self, factor: float, rounding_seed: int, *, exempt_vectors: bool, only: tuple[str, ...] | None = None
    ) -> None:
        """weights <- factor (an fp32 value) * weights, in place; rounded as by `add`.

        With ``exempt_vectors`` only the weights that `decays` names are multiplied.

        Args:
            factor: an fp32 value.
            rounding_seed: seed of stochastic rounding, where it is on.
            exempt_vectors: leave weights with fewer than two dimensions alone.
            only: names of the trainable weights that are changed; all if None.
        """
        for stochastic, parts in self._update_parts.groups(only, exempt_vectors=exempt_vectors):
            self.law.scale_parts(parts, factor, rounding_seed=rounding_seed if stochastic else None)

    @torch.no_grad()
    def copy_anchor(self) -> None:
        """Keep a copy of the trainable weights as they are now, for variants with ``base: anchor``."""
        self._anchor.copy()

    def optimizer_step(self, lr: float, scale: float) -> None:
        """Let the attached optimiser take a step (`mezo_dist.algorithms.operations.OptimizerStep`).

        Raises:
            RuntimeError: none is attached.
        """
        if self.optimizer is None:
            raise RuntimeError("no optimiser is attached to the weights, which only forward passes see")
        self.optimizer.step(lr, scale)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that depend on the bits of all weights, frozen ones too, and not on their layout."""
        mine = sum(fingerprint_shard(s.tensor, s.param_id, s.offset) for s in self.shards() if s.is_first)
        return to_text(self.layout.total(mine))

    def anchor_fingerprint(self) -> str:
        """The same of the kept copy; empty if there is none."""
        local = sum(fingerprint_shard(s.tensor, s.param_id, s.offset) for s in self.anchor_shards() if s.is_first)
        total, num_copies = self.layout.total(local), self.layout.total(int(bool(self._anchor)))
        return to_text(total) if num_copies else ""

    def shards(self) -> Iterator[Shard]:
        """What this rank owns of every parameter; see `Layout.shards`."""
        return self.layout.shards()

    def trainable_shards(self) -> Iterator[Shard]:
        """Those of `shards` that are pieces of trainable weights."""
        return (shard for shard in self.shards() if shard.name in self.trainable)

    def anchor_shards(self) -> Iterator[Shard]:
        """What this rank owns of the kept copy (nothing if there is none), under names of its own."""
        return self._anchor.shards()

    def optimizer_shards(self) -> Iterator[Shard]:
        """What this rank owns of the attached optimiser's state (nothing if there is none), under names of its own."""
        return iter(()) if self.optimizer is None else self.optimizer.shards()

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Canonical name and full tensor of every parameter, one after another (for export)."""
        return self.layout.named_weights()

    def never_used(self) -> list[str]:
        """Names of trainable weights that no forward pass has used so far: their updates are noise.

        The probe (`mezo_dist.engines.probe`) cannot find them: other samples than those of the probe may use an expert.
        """
        return [name for name in self.trainable if name not in self._fanout.weights_served]

    def no_longer_used(self) -> list[str]:
        """Names of trainable weights that the first forward passes used, and the last ones did not."""
        gone = self._fanout.served_first - self._fanout.served_last
        return [name for name in self.trainable if name in gone]

    @property
    def pass_dtype(self) -> torch.dtype:
        """Dtype of the forward passes."""
        return self.compute_dtype or next(self.model.parameters()).dtype

    @property
    def gathers(self) -> int:
        """Collectives that gathered weights so far."""
        return self._unshard.meter.gathers

    @property
    def gathered_bytes(self) -> int:
        """Bytes of weights that those collectives brought to this rank, its own share among them."""
        return self._unshard.meter.num_bytes

    def _run(self, passes: Sequence[ForwardPass]) -> list[Any]:
        self._prepare_directions(passes)
        try:
            return self._fanout.run(passes)
        finally:
            self._materialise.end()
            self._unshard.close()

    def _need(self, hooked: HookedModule, *, keep_current: bool) -> None:
        self._unshard.need(self._unit_of[hooked], keep_current=keep_current)


def _shifts_of(variant: Variant, item: Any) -> tuple[Combination, ...]:
    """The directions of the rows of one micro-batch, which knows the places of their samples in the batch."""
    if not variant.per_sample:
        return ()
    return tuple(variant.per_sample[slot] for slot in getattr(item, "row_slots", item.slots))
