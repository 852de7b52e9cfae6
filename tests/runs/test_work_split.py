"""Rounds are shared out over the ranks: everything is evaluated once, and ranks that gather together gather alike."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mezo_dist.algorithms.base import Variant
from mezo_dist.config.schema import DistributedConfig
from mezo_dist.runs.work_split import RankWork, WorkSplit
from mezo_dist.tasks.batches import MicroBatch


def batch(*costs: int) -> list[MicroBatch]:
    """Micro-batches of so many tokens."""
    return [
        MicroBatch((slot,), {"input_ids": torch.zeros(1, c, dtype=torch.int64)}, {}) for slot, c in enumerate(costs)
    ]


def work_of_ranks(
    sharing: WorkSplit, num_variants: int, items: list[MicroBatch], num_anchor: int = 0
) -> list[RankWork]:
    variants = [Variant()] * num_variants + [Variant(base="anchor")] * num_anchor
    return [sharing.of_rank(rank, variants, items) for rank in range(sharing.world_size)]


@given(
    per_copy=st.integers(1, 3),
    copies=st.integers(1, 4),
    groups=st.none() | st.integers(1, 5),
    num_variants=st.integers(1, 5),
    num_anchor=st.integers(0, 5),
    costs=st.lists(st.integers(1, 50), min_size=1, max_size=6),
)
def test_everything_is_evaluated_once_and_alike(
    per_copy: int, copies: int, groups: int | None, num_variants: int, num_anchor: int, costs: list[int]
) -> None:
    sharing = WorkSplit(per_copy * copies, copies, groups, by_base=per_copy > 1)
    parts = work_of_ranks(sharing, num_variants, batch(*costs), num_anchor)
    done = Counter((v, item.slots) for work in parts for v in work.variants for item in work.micro_batches)
    assert done == {(v, (slot,)): 1 for v in range(num_variants + num_anchor) for slot in range(len(costs))}
    for what in ("most_variants", "most_micro_batches"):
        assert len({getattr(work, what) for work in parts}) == 1
    assert max(len(work.micro_batches) for work in parts) == parts[0].most_micro_batches
    assert max(len(work.variants) for work in parts) <= parts[0].most_variants
    if sharing.by_base and num_anchor:  # every rank gathers both
        assert all(min(s.variants) < num_variants <= max(s.variants) for s in parts)
    by_copy = [parts[first : first + per_copy] for first in range(0, len(parts), per_copy)]
    assert all(len({work.variants for work in copy}) == 1 for copy in by_copy)


def test_variants_are_split_where_there_are_too_few_micro_batches() -> None:
    alone = work_of_ranks(WorkSplit(4, copies=4), 4, batch(10, 10))
    assert [(s.variants, len(s.micro_batches)) for s in alone] == [((0, 1), 1), ((0, 1), 1), ((2, 3), 1), ((2, 3), 1)]
    assert [s.variants for s in work_of_ranks(WorkSplit(2, copies=2), 2, batch(10))] == [(0,), (1,)]


def test_otherwise_every_rank_evaluates_all() -> None:
    assert {s.variants for s in work_of_ranks(WorkSplit(2, copies=2), 4, batch(10, 10, 10, 10))} == {(0, 1, 2, 3)}
    assert {s.variants for s in work_of_ranks(WorkSplit(4), 4, batch(10))} == {(0, 1, 2, 3)}, "there is one copy"


@pytest.mark.parametrize(("groups", "wanted"), [(1, 4), (2, 2), (3, 2), (4, 1), (99, 1)])
def test_groups_that_were_asked_for(groups: int, wanted: int) -> None:
    parts = work_of_ranks(WorkSplit(4, copies=4, groups=groups), 4, batch(10, 10, 10, 10))
    assert {len(s.variants) for s in parts} == {wanted}


def test_no_groups_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match=r"distributed.variant_groups: must be at least 1"):
        DistributedConfig(variant_groups=0)
