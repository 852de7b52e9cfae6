"""A probe at start-up, for every model: the losses that the engine finds are held against those of the model itself.

Model code may use weights in any way, and a use that the engine cannot serve would be a wrong loss that nobody notices.
So before training, one micro-batch goes through the model five times: without and under a large shift, by the engine
and on really changed weights, which are put back bit for bit. Directions per sample take two passes more and one for
each of its samples (`probe_samples`), and another micro-batch takes four, together with the first one and alone.

* Whole weights (layout replicated): the model itself is called, without any hook of the engine, on changed copies of
  the weights.
* Sharded weights, and a forward pass in another dtype whose cast weights do not fit beside the others: the shards are
  changed, and the engine evaluates them without a shift. This checks that variants are changed weights, but not what
  the engine makes of weights that do not move.

Copies take up to a quarter of the free memory. Where that is too little for all trainable weights, quarters of these
are changed in turn, three passes for each, and a warning names those that do not fit.

Where the two disagree, halves of the weights are changed in turn until the weight that makes the difference is known.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar, cast, final

import torch
from torch import nn

from mezo_dist.algorithms.base import Variant
from mezo_dist.directions.combination import ZERO, Combination
from mezo_dist.directions.seeds import derive_seed
from mezo_dist.engines.capacity import free_bytes
from mezo_dist.engines.changed import shards_changed, whole_weights_changed
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.left_state import states_left
from mezo_dist.engines.outputs import Outputs, all_finite, distance, rounding_error, size_of, tensors_of
from mezo_dist.engines.probe_messages import CONFIG_NAMES, SettingNames, failures_explained, narrowed, some_of
from mezo_dist.engines.probe_samples import check_directions_per_sample
from mezo_dist.errors import UserError

log = logging.getLogger(__name__)
ItemT = TypeVar("ItemT")

SEED = derive_seed(0, "probe")
SIZES = (1e-2, 1e-3, 1e-4)
"""Coefficients of the shift, tried in turn until the outputs are finite. Where rounding to 16 bits can hide an error,
a large one shows it best."""
TOLERANCE = 1e-3
"""Largest error of outputs, as a part of the largest change by the shift. Both ways compute the same kernels on the
same bits, so on a CPU there is no error at all."""
PART = 0.25
"""Share of the free memory that copies of weights may fill."""
MOST_GROUPS = 4


class FlatLossError(UserError):
    """No loss depends on the weights that are to be trained."""


def check_model(
    engine: Engine,
    item: ItemT,
    forward: Callable[[nn.Module, ItemT], object],
    *,
    other: ItemT | None = None,
    per_sample: bool = False,
    processes: int = 1,
    refuse_flat: bool = True,
    settings: SettingNames = CONFIG_NAMES,
) -> None:
    """Hold the engine's outputs for one micro-batch against the model's. Collective on sharded layouts.

    A model that keeps state between calls is run pass by pass from now on (`Engine.one_by_one`).

    Args:
        engine: its weights come out of this with the same bits.
        item: a micro-batch of a few samples, the same one on all ranks of a sharded layout; with ``per_sample`` it has
            ``slots``, as for `Engine.evaluate`.
        forward: as for `Engine.evaluate`; gives tensors (logits, losses), the first dimension of which are the samples
            if ``per_sample``.
        other: another micro-batch: both together must give what each gives alone, or passes run one by one.
        per_sample: also compare directions per sample with passes sample by sample.
        processes: number of processes on this machine, which share its memory.
        refuse_flat: a model whose outputs no weight changes is an error; otherwise it is a warning, for a loss that is
            a metric may not see a small change.
        settings: the caller's names of the settings that messages point to.

    Raises:
        UserError: the model cannot be trained so; the message names the weight or the module, and what to set. (A value
            that the model computes of a weight once, and keeps, is noticed if the engine's very first passes had no
            samples that are not in ``item``.)
        FlatLossError: no weight changes its outputs.
    """
    probe = _ShiftCheck(engine, item, forward, int(PART * free_bytes() / processes), settings)
    before = engine.fingerprint()
    with failures_explained(engine, settings):
        probe.check_losses(refuse_flat=refuse_flat)
        if other is not None:
            probe.check_company(other)
    if engine.fingerprint() != before:
        raise settings.error(
            settings.model,
            "a forward pass changes the model's own weights (an embedding with max_norm, a normalised weight); its "
            "losses depend on what was evaluated before, so it cannot be trained here",
        )
    if per_sample:
        slots: Sequence[int] = cast(Any, item).slots
        check_directions_per_sample(engine, item, forward, slots=slots, seed=SEED, settings=settings)


@final
class _ShiftCheck(Generic[ItemT]):
    """Losses under a shift, by the engine and on really changed weights; see `check_model`.

    Args:
        engine: owns the weights.
        item: the micro-batch.
        forward: calls the model.
        budget: bytes that copies of weights may take.
        settings: the caller's names of settings.
    """

    def __init__(
        self,
        engine: Engine,
        item: ItemT,
        forward: Callable[[nn.Module, ItemT], object],
        budget: int,
        settings: SettingNames,
    ) -> None:
        self.engine, self.item, self.forward, self.budget, self.settings = engine, item, forward, budget, settings
        model, dtype = engine.model, engine.compute_dtype
        cast = sum(p.numel() for p in model.parameters()) * dtype.itemsize if dtype else 0
        self.is_plain = not engine.layout.is_sharded and cast <= budget
        """Whether the model itself is called, on changed copies of its weights; otherwise its shards are changed."""

    def check_losses(self, *, refuse_flat: bool) -> None:
        groups, unchecked = self._groups()
        if unchecked:
            log.warning("too little memory is free to probe losses under a shift of %s", some_of(unchecked))
        if self.is_plain:
            self._by_engine([ZERO])  # first, for it raises where the model writes to its weights
        with states_left(self.engine.model) as left:
            base = self._really(ZERO, ())
        if not all_finite(base):
            log.warning("the model's first losses are not finite, so they cannot be held against those of the engine")
            return
        effects = [self._check_group(names, base, left) for names in groups]
        self._check_use()
        if groups and not any(effects) and not refuse_flat:
            log.warning("no weight changes the loss of the first micro-batch: a metric as loss needs a larger eps")
        elif groups and not any(effects):
            error = self.settings.error(
                "model.trainable",
                f"no loss depends on {some_of(self.engine.trainable)}, so there is nothing to learn; train other "
                "weights",
            )
            raise FlatLossError(str(error))

    def _check_group(self, names: Sequence[str], base: Outputs, left_before: set[str]) -> float:
        """Check some weights together.

        Args:
            names: the weights.
            base: outputs without a shift.
            left_before: what the first pass left on modules.

        Returns:
            How much the shift changes the outputs.
        """
        for size in SIZES:
            shift = Combination.single(SEED, size)
            with states_left(self.engine.model) as left:
                wanted = self._really(shift, names)
            if all_finite(wanted):
                break
        else:
            log.warning("losses under a shift of %s are not finite, so they are not checked", some_of(names))
            return 1.0
        if kept := sorted(left & left_before):  # what a pass writes once and the next one does not is a constant
            self._run_one_by_one(kept)
        error, allowed, effect = self._compare(names, shift, base, wanted)
        if error > allowed:
            self._check_determinism(base)
            culprits = narrowed(names, lambda some: self._is_wrong(some, shift, base))
            raise self.settings.error(
                self.settings.model,
                f"losses under a shift of {some_of(culprits)} are wrong, by {error:.2g} where the shift changes them "
                f"by {effect:.2g}: the model uses weights in a way that is not followed; "
                f"{self.settings.leave_out(culprits)}",
            )
        return effect

    def _check_use(self) -> None:
        """Raises UserError if a model computes something of a weight once and keeps it. It does the same on really
        changed weights; so what tells is which weights passes use."""
        if kept := self.engine.no_longer_used():
            raise self.settings.error(
                self.settings.model,
                f"the first forward pass used {some_of(kept)}, and those after it do not: the model keeps what it "
                f"computed of it, so that changes do not reach its losses; {self.settings.leave_out(kept)}",
            )
        if unused := self.engine.never_used():
            log.warning(
                "the first micro-batch does not use %s: as long as no sample does, its updates are noise (freeze it)",
                some_of(unused),
            )

    def _check_determinism(self, base: Outputs) -> None:
        """Raises UserError if the same weights give another loss the next time: then weights are not what is wrong."""
        if distance(self._really(ZERO, ()), base) > rounding_error(self.engine) * size_of(base):
            raise self.settings.error(
                self.settings.model,
                "two passes on the same weights give different losses (random numbers, or state that a pass changes), "
                "so estimates would be noise; make the loss deterministic",
            )

    def check_company(self, other: ItemT) -> None:
        """Hold two micro-batches in lock step against each alone: state outside of modules may pass from one to the
        other."""
        if self.engine.one_by_one:
            return
        together = [tensors_of(row[0]) for row in self.engine.evaluate([Variant()], [self.item, other], self.forward)]
        for item, in_company in zip((self.item, other), together, strict=True):
            ((result,),) = self.engine.evaluate([Variant()], [item], self.forward)
            alone = tensors_of(result)
            if distance(in_company, alone) > rounding_error(self.engine) * size_of(alone):
                self._run_one_by_one(["outside of its modules"])
                return

    def _is_wrong(self, names: Sequence[str], shift: Combination, base: Outputs) -> bool:
        """Whether the engine's outputs are wrong where some weights are shifted.

        Args:
            names: the weights that are shifted.
            shift: what is added to them.
            base: outputs without a shift.
        """
        error, allowed, _ = self._compare(names, shift, base, self._really(shift, names))
        return error > allowed

    def _compare(
        self, names: Sequence[str], shift: Combination, base: Outputs, wanted: Outputs
    ) -> tuple[float, float, float]:
        """Error of the engine's outputs, the largest that is allowed, and by how much the shift changes outputs.

        Args:
            names: the weights that are shifted.
            shift: what is added to them.
            base: outputs without a shift.
            wanted: outputs on weights that are really shifted.
        """
        zero, shifted = self._by_engine([ZERO, shift], names)
        noise, effect = distance(zero, base), distance(wanted, base)
        floor = rounding_error(self.engine) * size_of(wanted)
        return max(distance(shifted, wanted), noise), TOLERANCE * effect + floor, effect

    def _run_one_by_one(self, kept: Sequence[str]) -> None:
        """Let passes run one after another from now on; a UserError on sharded layouts, where they cannot."""
        if self.engine.layout.is_sharded:
            raise self.settings.error(
                "layout.name",
                f"the model keeps state between calls ({some_of(kept)}), so passes cannot go through sharded weights "
                "together; use layout.name: replicated",
            )
        if not self.engine.one_by_one:
            log.info("the model keeps state between calls (%s): passes run one after another", some_of(kept))
        self.engine.one_by_one = True

    def _by_engine(self, shifts: Sequence[Combination], names: Sequence[str] = ()) -> list[Outputs]:
        with self.engine.moving_only(names):
            (row,) = self.engine.evaluate([Variant(shift) for shift in shifts], [self.item], self.forward)
        return [tensors_of(result) for result in row]

    def _really(self, shift: Combination, names: Sequence[str]) -> Outputs:
        """Outputs on weights of which those called ``names`` are really changed."""
        if self.is_plain:
            with torch.no_grad(), whole_weights_changed(self.engine, shift, names):
                return tensors_of(self.forward(self.engine.model, self.item))
        with torch.no_grad(), shards_changed(self.engine, shift, names):
            return self._by_engine([ZERO])[0]

    def _groups(self) -> tuple[list[list[str]], list[str]]:
        """Groups of trainable weights that are changed together, and those that fit nowhere. All ranks that gather
        together have the same ones."""
        sizes = {shard.name: shard.tensor.nbytes for shard in self.engine.shards()}
        names = self.engine.trainable
        if self._fits(sizes, names):
            return [names], []
        cut = [names[len(names) * k // MOST_GROUPS : len(names) * (k + 1) // MOST_GROUPS] for k in range(MOST_GROUPS)]
        fits = [self._fits(sizes, group) for group in cut]
        groups = [group for group, does_fit in zip(cut, fits, strict=True) if does_fit and group]
        checked = {name for group in groups for name in group}
        return groups, [name for name in names if name not in checked]

    def _fits(self, sizes: Mapping[str, int], names: Sequence[str]) -> bool:
        total = self.engine.layout.total
        return total(int(sum(sizes[name] for name in names) <= self.budget)) == total(1)
