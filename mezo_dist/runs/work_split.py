"""The work split: which variants of a round a rank evaluates, on which micro-batches. It changes no result.

Where several ranks hold the weights together, every rank evaluates all variants, on its part of the micro-batches.
Where there are several copies of the weights, the ranks can form groups: each group evaluates some of the variants
(several directions in parallel), and splits the micro-batches over its ranks. That pays where a batch has fewer
micro-batches than there are ranks, or a number of them that does not divide well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mezo_dist.algorithms.base import Variant
from mezo_dist.tasks.batches import MicroBatch, deal


@dataclass(frozen=True)
class RankWork:
    """The work of one rank in a round: each of its variants on each of its micro-batches."""

    variants: tuple[int, ...]
    """Places among the variants of the round."""
    micro_batches: Sequence[MicroBatch]
    most_variants: int
    """The largest number of variants that a rank has."""
    most_micro_batches: int
    """The largest number of micro-batches that a rank has."""


@dataclass(frozen=True)
class WorkSplit:
    """How rounds are split over the ranks.

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

    def of_rank(self, rank: int, variants: Sequence[Variant], batch: Sequence[MicroBatch]) -> RankWork:
        """The work of one rank.

        Args:
            rank: its number.
            variants: all variants of the round.
            batch: all micro-batches of the batch.
        """
        sets = self._sets(variants)
        groups = self._num_groups(sets, batch)
        group, place = divmod(rank, self.world_size // groups)
        dealt = deal(batch, self.world_size // groups)
        chosen = [v for s in sets for v in s[group * len(s) // groups : (group + 1) * len(s) // groups]]
        return RankWork(tuple(chosen), dealt[place], _most_variants(sets, groups), max(map(len, dealt)))

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
