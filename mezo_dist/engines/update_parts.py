"""What an update changes together: on a GPU many shards, which one launch of a kernel changes; elsewhere one after
another. Weights that are whole are looked up once, and are the same in every step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import final

import torch

from mezo_dist.algorithms.decay import decays
from mezo_dist.directions import devices
from mezo_dist.directions.parts import KeptParts, Part
from mezo_dist.engines.hooked import Weight
from mezo_dist.engines.layouts.base import Layout, Shard
from mezo_dist.engines.whereabouts import Whereabouts

PARTS_AT_ONCE = 32
"""Shards on a GPU that are changed together: as many as one launch of a kernel takes."""
MOST_CHOICES = 8
"""Choices of weights that are remembered; algorithms may choose others in every step."""

Group = tuple[bool, Sequence[Part]]
"""Whether they are rounded stochastically; and they."""


@final
class UpdateParts:
    """Groups the weights that updates change.

    Args:
        layout: where the weights live.
        trainable: names of the weights that updates change, in the model's order.
        stochastic_rounding: whether bf16 weights are rounded stochastically.
    """

    def __init__(self, layout: Layout, trainable: Sequence[str], *, stochastic_rounding: bool) -> None:
        self._layout = layout
        self._trainable = trainable
        self._stochastic_rounding = stochastic_rounding
        self._weights: dict[str, Weight] = {}
        for weight in (w for unit in layout.units for hooked in unit.hooked_modules for w in hooked.weights):
            self._weights.setdefault(weight.name, weight)
        self._known: dict[tuple[tuple[str, ...] | None, bool], tuple[list[Group], Whereabouts]] = {}

    def groups(self, only: tuple[str, ...] | None, *, exempt_vectors: bool = False) -> Iterable[Group]:
        """What is changed together.

        Args:
            only: names of the trainable weights that are changed; all if None.
            exempt_vectors: leave out what `decays` does not name.
        """
        if self._layout.is_sharded:
            return self._grouped(self._shards(only, exempt_vectors))
        known = self._known.get((only, exempt_vectors))
        if known is None or not known[1].unchanged():
            if len(self._known) >= MOST_CHOICES:
                self._known.clear()
            weights = self._chosen(only, exempt_vectors)
            shards = (Shard(w.name, w.param_id, w.shape, 0, w.tensor) for w in weights)
            groups: list[Group] = [(stochastic, KeptParts(parts)) for stochastic, parts in self._grouped(shards)]
            known = self._known[only, exempt_vectors] = groups, Whereabouts(weights)
        return known[0]

    def _chosen(self, only: tuple[str, ...] | None, exempt_vectors: bool) -> list[Weight]:
        """The weights that are changed. Arguments are those of `groups`."""
        names = self._trainable if only is None else set(only)
        weights = [self._weights[name] for name in self._trainable if name in names]
        return [w for w in weights if decays(w.name, len(w.shape))] if exempt_vectors else weights

    def _shards(self, only: tuple[str, ...] | None, exempt_vectors: bool) -> Iterator[Shard]:
        """This rank's shards of `_chosen`."""
        names = {weight.name for weight in self._chosen(only, exempt_vectors)}
        return (shard for shard in self._layout.shards() if shard.name in names)

    def _grouped(self, shards: Iterable[Shard]) -> Iterator[Group]:
        groups: dict[bool, list[Part]] = {}
        for shard in shards:
            stochastic = self._stochastic_rounding and shard.tensor.dtype == torch.bfloat16
            part = Part(shard.tensor, (shard.tensor,), shard.param_id, shard.shape, shard.offset)
            if not shard.stays or not devices.takes_launches(shard.tensor.device):
                yield stochastic, [part]
                continue
            groups.setdefault(stochastic, []).append(part)
            if len(groups[stochastic]) == PARTS_AT_ONCE:
                yield stochastic, groups.pop(stochastic)
        yield from groups.items()
