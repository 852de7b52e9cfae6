"""A probe at start-up, for every model: what the engine says about it is held against the model itself.

Model code may do with weights what it likes, and what the engine cannot serve would be a wrong loss that nobody
notices. So before training one micro-batch goes through the model five times (with directions per sample, twice and
once for each of its samples more; and with another micro-batch four times, together and alone): without and under a
large shift, by the engine and on really changed weights, which are put back bit for bit.

* Whole weights (layout replicated): the model itself is called, without any hook of the engine, on changed copies of
  the weights.
* Sharded weights, and a forward pass in another dtype whose cast weights do not fit beside the others: the shards are
  changed, and the engine evaluates them without a shift. So it is checked that variants are changed weights, but not
  what the engine makes of weights that do not move.

Copies take up to a quarter of the free memory. Where that is too little for all trainable weights, quarters of these
are changed in turn, three passes for each, and a warning names those that do not fit.

Where the two disagree, halves of the weights are changed in turn until the one is found that makes the difference.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mezo_dist.algorithms.base import Variant
from mezo_dist.directions.combination import ZERO, Combination
from mezo_dist.directions.seeds import derive_seed
from mezo_dist.distributed.communicator import OutOfStepError
from mezo_dist.engines.capacity import free_bytes
from mezo_dist.engines.changed import shards_changed, whole_weights_changed
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.left_state import states_left
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
MOST_NAMES = 3
TOLERANCE_PER_SAMPLE = {4: 1e-2, 2: 0.2}
"""The same for directions per sample, by the bytes of a number: they are computed in another way, which does not round
the changed weights."""
PART = 0.25
"""Share of the free memory that copies of weights may fill."""
MOST_GROUPS = 4
_OF_DTYPES = re.compile("dtype|scalar type|BFloat16|Half")
"""What torch says where tensors of different dtypes meet."""


class FlatLossError(UserError):
    """No loss depends on what is to be trained."""


def check_model(
    engine: Engine,
    item: ItemT,
    forward: Callable[[nn.Module, ItemT], Any],
    *,
    other: ItemT | None = None,
    per_sample: bool = False,
    processes: int = 1,
    refuse_flat: bool = True,
) -> None:
    """Hold what ``engine`` finds on one micro-batch against the model itself. Collective on sharded layouts.

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
        refuse_flat: a model whose outputs no weight changes is an error (of a loss that is a metric, it is a warning).

    Raises:
        UserError: the model cannot be trained so; the message names the weight or the module, and what to set. (What a
            model computes of a weight once, and keeps, is noticed if the engine's very first passes had no samples
            that are not in ``item``.)
        FlatLossError: no weight changes its outputs.
    """
    probe = _Probe(engine, item, forward, int(PART * free_bytes() / processes))
    before = engine.fingerprint()
    with failures_explained(engine):
        probe.check_losses(refuse_flat=refuse_flat)
        if other is not None:
            probe.check_company(other)
    if engine.fingerprint() != before:
        raise UserError(
            "model.name: a forward pass changes the model's own weights (an embedding with max_norm, a normalised "
            "weight); its losses depend on what was evaluated before, so it cannot be trained here"
        )
    if per_sample:
        probe.in_fp32().check_directions_per_sample()


Outputs = list[Tensor]


@final
class _Probe:
    """One probe; see `check_model`."""

    def __init__(self, engine: Engine, item: Any, forward: Callable[[nn.Module, Any], Any], budget: int) -> None:
        self.engine, self.item, self.forward, self.budget = engine, item, forward, budget
        model, dtype = engine.model, engine.compute_dtype
        cast = sum(p.numel() for p in model.parameters()) * dtype.itemsize if dtype else 0
        self.is_plain = not engine.layout.is_sharded and cast <= budget
        """The model itself is called."""

    def check_losses(self, *, refuse_flat: bool) -> None:
        groups, unchecked = self._groups()
        if unchecked:
            log.warning("too little memory is free to probe losses under a shift of %s", _some(unchecked))
        if self.is_plain:
            self._by_engine([ZERO])  # before the model is called by itself, for this fails where weights are written to
        with states_left(self.engine.model) as left:
            base = self._really(ZERO, ())
        if not _all_finite(base):
            log.warning("the model's first losses are not finite, so they cannot be held against those of the engine")
            return
        effects = [self._check_group(names, base, left) for names in groups]
        self._check_use()
        if groups and not any(effects) and not refuse_flat:
            log.warning("no weight changes the loss of the first micro-batch: a metric as loss needs a larger eps")
        elif groups and not any(effects):
            raise FlatLossError(
                f"model.trainable: no loss depends on {_some(self.engine.trainable)}, so there is nothing to learn; "
                "train other weights"
            )

    def _check_group(self, names: Sequence[str], base: Outputs, left_before: set[str]) -> float:
        """Check the weights ``names`` together. Returns how much the shift changes the outputs."""
        for size in SIZES:
            shift = Combination.single(SEED, size)
            with states_left(self.engine.model) as left:
                wanted = self._really(shift, names)
            if _all_finite(wanted):
                break
        else:
            log.warning("losses under a shift of %s are not finite, so they are not checked", _some(names))
            return 1.0
        if kept := sorted(left & left_before):  # what a pass writes once and the next one does not is a constant
            self._run_one_by_one(kept)
        error, allowed, effect = self._compare(names, shift, base, wanted)
        if error > allowed:
            self._check_determinism(base)
            culprits = self._narrow(names, lambda some: self._is_wrong(some, shift, base))
            raise UserError(
                f"model.name: losses under a shift of {_some(culprits)} are wrong, by {error:.2g} where the shift "
                f"changes them by {effect:.2g}: the model uses weights in a way that is not followed; leave them out: "
                f"model.freeze: {json.dumps(culprits[:MOST_NAMES])}"
            )
        return effect

    def _check_use(self) -> None:
        """A model that computes something of a weight once, and keeps it, does the same on really changed weights. So
        it is the weights that passes use which tell."""
        if kept := self.engine.no_longer_used():
            raise UserError(
                f"model.name: the first forward pass used {_some(kept)}, and those after it do not: the model keeps "
                "what it computed of it, so that changes do not reach its losses; leave it out: "
                f"model.freeze: {json.dumps(kept[:MOST_NAMES])}"
            )
        if unused := self.engine.never_used():
            log.warning(
                "the first micro-batch does not use %s: as long as no sample does, its updates are noise (freeze it)",
                _some(unused),
            )

    def _check_determinism(self, base: Outputs) -> None:
        """Raises UserError if the same weights give another loss the next time: then weights are not what is wrong."""
        if _distance(self._really(ZERO, ()), base) > self._epsilon() * _size(base):
            raise UserError(
                "model.name: two passes on the same weights give different losses (random numbers, or state that "
                "a pass changes), so estimates would be noise; make the loss deterministic"
            )

    def check_company(self, other: Any) -> None:
        """Two micro-batches in lock step against each alone: state outside of modules may pass from one to the
        other."""
        if self.engine.one_by_one:
            return
        together = [_tensors(row[0]) for row in self.engine.evaluate([Variant()], [self.item, other], self.forward)]
        for item, in_company in zip((self.item, other), together, strict=True):
            ((result,),) = self.engine.evaluate([Variant()], [item], self.forward)
            alone = _tensors(result)
            if _distance(in_company, alone) > self._epsilon() * _size(alone):
                self._run_one_by_one(["outside of its modules"])
                return

    def _is_wrong(self, names: Sequence[str], shift: Combination, base: Outputs) -> bool:
        error, allowed, _ = self._compare(names, shift, base, self._really(shift, names))
        return error > allowed

    def _compare(
        self, names: Sequence[str], shift: Combination, base: Outputs, wanted: Outputs
    ) -> tuple[float, float, float]:
        """Error of the engine's outputs, the largest that is allowed, and by how much the shift changes outputs."""
        zero, shifted = self._by_engine([ZERO, shift], names)
        noise, effect = _distance(zero, base), _distance(wanted, base)
        floor = self._epsilon() * _size(wanted)
        return max(_distance(shifted, wanted), noise), TOLERANCE * effect + floor, effect

    def _narrow(self, names: Sequence[str], is_wrong: Callable[[Sequence[str]], bool]) -> list[str]:
        """The smallest set of weights that is wrong, found by halving."""
        while len(names) > 1:
            halves = names[: len(names) // 2], names[len(names) // 2 :]
            wrong = next((half for half in halves if is_wrong(half)), None)
            if wrong is None:
                break
            names = wrong
        return list(names)

    def _run_one_by_one(self, kept: Sequence[str]) -> None:
        if self.engine.layout.is_sharded:
            raise UserError(
                f"layout.name: the model keeps state between calls ({_some(kept)}), so passes cannot go through "
                "sharded weights together; use layout.name: replicated"
            )
        if not self.engine.one_by_one:
            log.info("the model keeps state between calls (%s): passes run one after another", _some(kept))
        self.engine.one_by_one = True

    def _by_engine(self, shifts: Sequence[Combination], names: Sequence[str] = ()) -> list[Outputs]:
        with self.engine.moving_only(names):
            (row,) = self.engine.evaluate([Variant(shift) for shift in shifts], [self.item], self.forward)
        return [_tensors(result) for result in row]

    def _really(self, shift: Combination, names: Sequence[str]) -> Outputs:
        """Outputs on weights of which those called ``names`` are really changed."""
        if self.is_plain:
            with torch.no_grad(), whole_weights_changed(self.engine, shift, names):
                return _tensors(self.forward(self.engine.model, self.item))
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

    def _epsilon(self) -> float:
        """Relative error of outputs that were computed by equal operations on equal numbers. There is none on a CPU,
        but operations may be summed in another order elsewhere."""
        if self._dtype.itemsize < 4:
            return torch.finfo(self._dtype).eps
        return 2e-6 if next(self.engine.model.parameters()).device.type == "cpu" else 1e-4

    @property
    def _dtype(self) -> torch.dtype:
        return self.engine.compute_dtype or next(self.engine.model.parameters()).dtype

    def in_fp32(self) -> _Probe:
        """A probe of the same weights in a forward pass in fp32, if the model's code can do that."""
        if self._dtype.itemsize >= 4:
            return self
        engine = Engine(self.engine.model, self.engine.law, self.engine.layout, compute_dtype=torch.float32)
        engine.one_by_one = self.engine.one_by_one
        probe = _Probe(engine, self.item, self.forward, self.budget)
        try:
            probe._by_engine([ZERO])
        except (OutOfStepError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:
            log.info("directions per sample are checked in %s: %s", self._dtype, _first_line(error))
            return self
        return probe

    def check_directions_per_sample(self) -> None:
        """Every sample of a pass with a direction per sample against a pass in which all have that sample's."""
        slots: Sequence[int] = self.item.slots
        shifts = tuple(Combination.single(derive_seed(SEED, "sample", k), SIZES[0]) for k in range(max(slots) + 1))

        failures: list[Exception] = []

        def is_wrong(names: Sequence[str]) -> bool:
            try:
                return self._is_wrong_per_sample(names, shifts, slots)
            except (UserError, OutOfStepError):
                raise
            except (RuntimeError, ValueError, IndexError, TypeError) as failure:
                failures.append(failure)
                return True

        if not is_wrong(self.engine.trainable):
            return
        culprits = self._narrow(self.engine.trainable, is_wrong)
        failed = f": it fails ({_first_line(failures[-1])})" if failures else ""
        raise UserError(
            f"algorithm.per_sample: a direction per sample of {_some(culprits)} does not reach the sample that it is "
            f"for, as the module does not work sample by sample{failed}; set it to false, or leave them out with "
            f"model.freeze: {json.dumps(culprits[:MOST_NAMES])}"
        ) from (failures[-1] if failures else None)

    def _is_wrong_per_sample(self, names: Sequence[str], shifts: tuple[Combination, ...], slots: Sequence[int]) -> bool:
        variants = [Variant(), Variant(ZERO, shifts), *(Variant(shifts[slot]) for slot in slots)]
        with self.engine.moving_only(names):
            (row,) = self.engine.evaluate(variants, [self.item], self.forward)
        base, each, *alone = [_samples(_tensors(result), len(slots)) for result in row]
        wanted = [torch.stack([alone[i][t][i] for i in range(len(slots))]) for t in range(len(base))]
        part = TOLERANCE_PER_SAMPLE[4 if self._dtype.itemsize >= 4 else 2]
        return _distance(each, wanted) > part * _distance(wanted, base) + max(self._epsilon(), 1e-5) * _size(wanted)


@contextlib.contextmanager
def failures_explained(engine: Engine) -> Iterator[None]:
    """Within, what model code raises because of the engine, and not on ordinary weights, becomes a UserError."""
    try:
        yield
    except NotImplementedError as error:
        raise UserError(f"model.name: this model cannot be trained here: {_first_line(error)}") from error
    except RuntimeError as error:
        if isinstance(error, (OutOfStepError, torch.OutOfMemoryError)):
            raise
        if engine.compute_dtype is None:
            dtypes = {str(p.dtype).removeprefix("torch.") for p in engine.model.parameters()} - {"float32"}
            if not dtypes or not _OF_DTYPES.search(str(error)):
                raise
            raise UserError(
                f"model.weights: the model's code fails on weights in {', '.join(sorted(dtypes))} "
                f"({_first_line(error)}); use float32"
            ) from error
        name = str(engine.compute_dtype).removeprefix("torch.")
        raise UserError(
            f"model.compute: the model's code fails on weights that are cast to {name} ({_first_line(error)}); leave "
            f"it out, or set model.weights: {name}"
        ) from error


def _tensors(result: Any) -> Outputs:
    """The floating-point tensors in what a forward pass gave, in fp32."""
    leaves = (torch.as_tensor(leaf) for leaf in pytree.tree_leaves(result) if isinstance(leaf, (Tensor, float)))
    return [leaf.detach().float() for leaf in leaves if leaf.is_floating_point()]


def _samples(outputs: Outputs, num_samples: int) -> Outputs:
    """Those of one row per sample."""
    rows = [tensor for tensor in outputs if tensor.dim() and len(tensor) == num_samples]
    if not rows:
        raise UserError("algorithm.per_sample: a forward pass must give one loss for each sample")
    return rows


def _distance(some: Outputs, others: Outputs) -> float:
    """Largest difference; infinite if shapes differ."""
    if [tensor.shape for tensor in some] != [tensor.shape for tensor in others]:
        return math.inf
    return max((_largest(one - other) for one, other in zip(some, others, strict=True)), default=0.0)


def _size(outputs: Outputs) -> float:
    return max(map(_largest, outputs), default=0.0)


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _all_finite(outputs: Outputs) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in outputs)


def _some(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
