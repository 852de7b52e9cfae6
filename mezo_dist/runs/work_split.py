"""Which rank evaluates what of a round: some of its variants, on some of its micro-batches. Changes no result.

Every rank can evaluate all variants on its own micro-batches; that is all there is to share out where several ranks
hold the weights together. Where they hold several copies, groups of ranks may take some of the variants each (several
directions in parallel), and share the micro-batches out within the group. That pays where a batch has fewer
micro-batches than there are ranks, or a number of them that does not divide well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mezo_dist.algorithms.base import Variant
from mezo_dist.tasks.batches import MicroBatch, deal


@dataclass(frozen=True)
class Share:
    """What one rank evaluates: each of its variants on each of its micro-batches."""

    variants: tuple[int, ...]
    """Places among the variants of the round."""
    micro_batches: Sequence[MicroBatch]
    most_variants: int
    """Of any rank."""
    most_micro_batches: int
    """Of any rank."""


@dataclass(frozen=True)
class WorkSplit:
    """How rounds are shared out.

    Args:
        world_size: number of ranks.
        copies: how often they hold the weights; ranks that hold one together follow one another.
        groups: into so many groups at most (always a divisor of ``copies``); None: whatever gives the busiest rank
            least to do, and as few as possible.
        by_base: every group must have variants of every base (`Variant.base`), for ranks gather alike.
    """

    world_size: int = 1
    copies: int = 1
    groups: int | None = None
    by_base: bool = False

    def share(self, rank: int, variants: Sequence[Variant], batch: Sequence[MicroBatch]) -> Share:
        """Of ``rank``."""
        sets = self._sets(variants)
        groups = self._num_groups(sets, batch)
        group, place = divmod(rank, self.world_size // groups)
        dealt = deal(batch, self.world_size // groups)
        own = [v for s in sets for v in s[group * len(s) // groups : (group + 1) * len(s) // groups]]
        return Share(tuple(own), dealt[place], _most_variants(sets, groups), max(map(len, dealt)))

    def _sets(self, variants: Sequence[Variant]) -> list[list[int]]:
        """Places of the variants of each base."""
        if not self.by_base:
            return [list(range(len(variants)))]
        bases = dict.fromkeys(variant.base for variant in variants)
        return [[v for v, variant in enumerate(variants) if variant.base == base] for base in bases]

    def _num_groups(self, sets: Sequence[Sequence[int]], batch: Sequence[MicroBatch]) -> int:
        most = min(map(len, sets))
        allowed = [n for n in range(1, min(most, self.copies) + 1) if self.copies % n == 0]
        if self.groups is not None:
            return max(n for n in allowed if n <= self.groups)

        def tokens_of_busiest(groups: int) -> int:
            loads = [sum(item.cost for item in items) for items in deal(batch, self.world_size // groups)]
            return _most_variants(sets, groups) * max(loads)

        return min(allowed, key=tokens_of_busiest)  # of equal ones the first: the fewest groups


def _most_variants(sets: Sequence[Sequence[int]], groups: int) -> int:
    return sum(-(-len(s) // groups) for s in sets)
