"""What is left of a perturbation after the rounding of the forward pass: measured weight by weight, at start-up.

A variant is ``cast(w + eps z)``. Where eps is small against the spacing of numbers around w, that is w again: in bf16
the spacing is 2^-7 from 1 to 2, where the weights of norms lie, and with eps = 1e-3 nearly all of their perturbation is
gone. Weights that are kept in fp32 and computed in bf16 are rounded up or down by chance instead: the perturbation is
there on average, among noise that is longer than it. Matrices, whose weights are around 0.02, are fine.

The cosine between the intended perturbation and the realised one, and the ratio of their lengths, are measured. The
sample is the same part of the whole weight on every layout, and its sums are integers, so that any number of ranks
comes to the same numbers.

One eps holds for all weights. An eps for each class of weights would give norms a direction that is longer than that of
matrices, which is another law of directions (another trajectory, other learning rates), and the norms would still need
the eps that they need here.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mezo_dist.algorithms import Settings
from mezo_dist.algorithms.auto_eps import LADDER
from mezo_dist.directions.combination import ZERO, Combination
from mezo_dist.directions.law import Law
from mezo_dist.directions.seeds import derive_seed
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.layouts.base import Shard
from mezo_dist.errors import UserError

log = logging.getLogger(__name__)
MIN_COSINE = 0.9
"""Below it, more than a fifth of the realised perturbation's square is noise."""
MIN_LENGTH, MAX_LENGTH = 0.8, 1.25
SAMPLE = 2048
"""Elements of a weight that are looked at, in its middle."""
FEWEST = 256
"""A weight with fewer elements is measured along several directions, so that chance does not decide."""
_ONE = 1 << 36  # sums are multiples of 1 / _ONE; SAMPLE * _MOST^2 of them fit into 63 bits
_MOST = 100.0
_NAMED = 4
MEND = "compute in float32 (model.compute, model.weights), or freeze them"

Sums = dict[str, list[list[int]]]
"""Weight -> for each size, the sums of r z, r^2 and z^2 over the sample, in multiples of 1 / `_ONE`; r is the realised
perturbation over the size, z the direction."""


@dataclass(frozen=True)
class Survival:
    """What is left of the perturbation of one weight."""

    cosine: float
    """Cosine between the realised perturbation and the intended one; 0 if nothing is left."""
    length: float
    """Length of the realised perturbation over that of the intended one."""

    @property
    def is_sound(self) -> bool:
        """An estimate along it is one along the direction that was meant."""
        return self.cosine >= MIN_COSINE and MIN_LENGTH <= self.length <= MAX_LENGTH


def settle_eps(engine: Engine, comm: Communicator, settings: Settings, seed: int) -> float | None:
    """For ``eps: auto`` the smallest one left; for a number None, and a warning if it is lost in rounding. Collective.

    Args:
        engine: owns the weights, on which the perturbation is measured.
        comm: the ranks.
        settings: the algorithm's.
        seed: of the run.

    Raises:
        UserError: ``auto``, and the perturbation is lost at every eps.
    """
    eps = settings.eps
    sizes = LADDER if eps == "auto" else (eps, *(size for size in LADDER if size > eps))
    dtypes = {"compute_dtype": engine.compute_dtype, "gather_dtype": engine.layout.gather_dtype}
    sums = comm.collect(
        lambda: measure_settings(engine.trainable_shards(), engine.law, settings, sizes, seed=seed, **dtypes)
    )
    survivals = combined(sums if engine.layout.is_sharded else sums[:1])  # where weights are whole, one rank says all
    if eps == "auto":
        chosen = choose(survivals, sizes)
        log.info(
            "algorithm.eps: auto: from %g on the perturbations of all trainable weights survive rounding; "
            "the losses of the first step choose among these",
            chosen,
        )
        return chosen
    if comm.rank == 0 and (lost := lost_weights(survivals, 0)):
        enough = smallest_sound(survivals, sizes)
        advice = f"{enough:g} would do, as algorithm.eps: auto finds out" if enough else MEND
        log.warning("algorithm.eps: %g is lost in rounding on %s; %s", eps, lost, advice)
    return None


def measure_settings(
    shards: Iterable[Shard],
    law: Law,
    settings: Settings,
    sizes: Sequence[float],
    *,
    seed: int,
    compute_dtype: torch.dtype | None = None,
    gather_dtype: torch.dtype | None = None,
) -> Sums:
    """`measure` the perturbations of an algorithm with these ``settings``, if its eps were one of ``sizes``.

    Where ``eps_schedule`` makes eps smaller, the smallest one of the run is measured: it has to survive, too.

    Args:
        shards: this rank's shards of the trainable weights.
        law: of the directions.
        settings: the algorithm's.
        sizes: values of eps.
        seed: of the run.
        compute_dtype: dtype of the forward pass; the weights' own if None.
        gather_dtype: dtype to which weights are cast before they are gathered; none if None.
    """
    schedule = getattr(settings, "eps_schedule", None)
    factor = schedule.smallest() if schedule else 1.0
    return measure(
        shards,
        law,
        [factor * size for size in sizes],
        compute_dtype=compute_dtype,
        gather_dtype=gather_dtype,
        one_sided=getattr(settings, "one_sided", False),
        seed=seed,
    )


def measure(
    shards: Iterable[Shard],
    law: Law,
    sizes: Sequence[float],
    *,
    compute_dtype: torch.dtype | None = None,
    gather_dtype: torch.dtype | None = None,
    one_sided: bool = False,
    seed: int = 0,
) -> Sums:
    """What is left of perturbations on the sampled elements that lie in ``shards``. No weight is changed.

    Args:
        shards: this rank's shards of the trainable weights.
        law: of the directions.
        sizes: values of eps.
        compute_dtype: dtype of the forward pass; the weights' own if None.
        gather_dtype: dtype to which weights are cast before they are gathered; none if None.
        one_sided: compare w + eps z with w; otherwise half of what lies between w + eps z and w - eps z.
        seed: of the run.
    """
    sums: Sums = {}
    for shard in shards:
        sums[shard.name] = [[0, 0, 0] for _ in sizes]
        length = shard.shape.numel()
        first = max(0, (length - SAMPLE) // 2)
        start, stop = max(first, shard.offset), min(first + SAMPLE, length, shard.offset + shard.tensor.numel())
        if start >= stop or not shard.is_first:
            continue
        piece = shard.tensor.detach().reshape(-1)[start - shard.offset : stop - shard.offset].cpu()
        piece = piece.to(gather_dtype) if gather_dtype else piece.clone()
        number = math.ceil(FEWEST / min(length, FEWEST))
        for direction in (derive_seed(seed, "survival", k) for k in range(number)):
            dtype = compute_dtype or piece.dtype
            z, moved = _moved(piece, shard, start, law, direction, sizes, dtype, one_sided=one_sided)
            for row, r in zip(sums[shard.name], moved, strict=True):
                for k, product in enumerate((r * z, r * r, z * z)):
                    row[k] += int((product * _ONE).round().long().sum())
    return sums


def combined(sums: Sequence[Sums]) -> dict[str, list[Survival]]:
    """What is left of each weight's perturbation, for each size, given what `measure` says of all its shards."""
    rows: Sums = {}
    for mine in sums:
        for name, per_size in mine.items():
            total = rows.setdefault(name, [[0, 0, 0] for _ in per_size])
            rows[name] = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(total, per_size, strict=True)]
    return {name: [_survival(*row) for row in per_size] for name, per_size in rows.items()}


def smallest_sound(survivals: Mapping[str, Sequence[Survival]], sizes: Sequence[float]) -> float | None:
    """The first of ``sizes`` at which every weight's perturbation survives; None if there is none."""
    return next((size for k, size in enumerate(sizes) if all(row[k].is_sound for row in survivals.values())), None)


def choose(survivals: Mapping[str, Sequence[Survival]], sizes: Sequence[float]) -> float:
    """`smallest_sound`.

    Raises:
        UserError: there is none; the message names the weights for which even the last size is too small.
    """
    size = smallest_sound(survivals, sizes)
    if size is None:
        raise UserError(
            f"algorithm.eps: auto finds none up to {sizes[-1]:g} that survives rounding on "
            f"{lost_weights(survivals, -1)}; {MEND}"
        )
    return size


def lost_weights(survivals: Mapping[str, Sequence[Survival]], place: int) -> str:
    """The weights whose perturbation of size number ``place`` does not survive, worst first, for people; empty if there
    are none."""
    lost = {name: row[place] for name, row in survivals.items() if not row[place].is_sound}
    worst = sorted(lost, key=lambda name: (lost[name].cosine, name))
    shown = [f"{n} (cosine {lost[n].cosine:.2f}, length {lost[n].length:.2f})" for n in worst[:_NAMED]]
    more = len(worst) - _NAMED
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def _moved(
    piece: Tensor,
    shard: Shard,
    start: int,
    law: Law,
    direction: int,
    sizes: Sequence[float],
    dtype: torch.dtype,
    *,
    one_sided: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The direction on ``piece``, and what is realised of it for each size, over that size (fp64).

    Args:
        piece: the sampled elements, in the dtype in which they are gathered.
        shard: the shard that they lie in.
        start: index of the first one in the flattened weight.
        law: of the directions.
        direction: seed of the direction.
        sizes: values of eps.
        dtype: of the forward pass.
        one_sided: see `measure`.
    """
    shifts = [Combination.single(direction, sign * size) for size in sizes for sign in (1, -1)]
    outputs = [torch.empty_like(piece, dtype=dtype) for _ in range(len(shifts) + 1)]
    z = torch.zeros(len(piece))
    add = functools.partial(law.add, param_id=shard.param_id, shape=shard.shape, offset=start)
    add(piece, [*shifts, ZERO], outputs)
    add(z, [Combination.single(direction, 1.0)], [z])
    *around, here = (output.double() for output in outputs)
    ahead, behind = around[0::2], around[1::2]
    realised = (
        [plus - here for plus in ahead] if one_sided else [(p - m) / 2 for p, m in zip(ahead, behind, strict=True)]
    )
    scaled = (moved / size for moved, size in zip(realised, sizes, strict=True))
    return z.double(), [torch.nan_to_num(moved, 0.0).clamp(-_MOST, _MOST) for moved in scaled]


def _survival(product: int, realised: int, intended: int) -> Survival:
    """From sums over a sample to the cosine and the ratio of lengths.

    Args:
        product: sum of r z.
        realised: sum of r^2.
        intended: sum of z^2.
    """
    if not realised:
        return Survival(0.0, 0.0)
    return Survival(product / math.sqrt(realised * intended), math.sqrt(realised / intended))
