"""Batches: their order, their cut into micro-batches, and how those are dealt to ranks."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mezo_dist.errors import UserError
from mezo_dist.tasks.batches import BatchOrder, MicroBatch, cut, deal
from mezo_dist.tasks.classification.kind import collate
from mezo_dist.tasks.classification.prompts import Sample

PAD = 99


def samples(lengths: Sequence[int], types: bool = False) -> list[Sample]:
    """Samples of these lengths, with ids that tell them apart; labels and positions that can be told too."""
    return [
        Sample(
            tuple(range(100 * slot, 100 * slot + length)),
            label=slot % 3,
            position=length - 1,
            types=(0,) * (length - 1) + (1,) if types else (),
        )
        for slot, length in enumerate(lengths)
    ]


# Order


def steps(order: BatchOrder, number: int) -> list[list[int]]:
    return [order.batch(step) for step in range(number)]


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**40))
def test_every_epoch_covers_every_sample_once(num_samples: int, batch_size: int, seed: int) -> None:
    batch_size = min(batch_size, num_samples)
    order = BatchOrder(num_samples, batch_size, seed)
    flat = [index for batch in steps(order, 3 * num_samples) for index in batch]
    for start in range(0, len(flat) - num_samples + 1, num_samples):
        assert sorted(flat[start : start + num_samples]) == list(range(num_samples))


@pytest.mark.parametrize(("num_samples", "batch_size"), [(12, 4), (10, 4), (7, 7), (5, 1)])
def test_a_batch_is_a_function_of_seed_and_step_alone(num_samples: int, batch_size: int) -> None:
    forward = steps(BatchOrder(num_samples, batch_size, 3), 20)
    backward = [BatchOrder(num_samples, batch_size, 3).batch(step) for step in reversed(range(20))]
    assert forward == backward[::-1]
    assert all(len(batch) == batch_size for batch in forward)


def test_batches_span_epochs() -> None:
    first, second, third = steps(BatchOrder(5, 3, 0), 3)
    assert set(first) | set(second[:2]) == set(range(5))  # the first epoch ends within the second batch
    assert len({second[2], *third}) == 4


def test_epochs_and_seeds_differ() -> None:
    order = BatchOrder(50, 50, 0)
    assert order.batch(0) != list(range(50))
    assert order.batch(0) != order.batch(1)
    assert order.batch(0) != BatchOrder(50, 50, 1).batch(0)


def test_a_batch_larger_than_the_data() -> None:
    with pytest.raises(UserError, match=r"train\.batch_size 8 is larger than the training split \(7 samples\)"):
        BatchOrder(7, 8, 0)


# Cut


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 10))
def test_a_cut_is_a_partition_of_samples_of_similar_length(lengths: list[int], size: int) -> None:
    batch = samples(lengths)
    micro_batches = cut(batch, size, PAD, collate)
    slots = [slot for micro_batch in micro_batches for slot in micro_batch.slots]
    assert sorted(slots) == list(range(len(batch)))
    assert [lengths[slot] for slot in slots] == sorted(lengths)
    assert all(len(micro_batch.slots) == size for micro_batch in micro_batches[:-1])
    assert 1 <= len(micro_batches[-1].slots) <= size


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 10))
def test_every_sample_keeps_its_tokens_label_and_position(lengths: list[int], size: int) -> None:
    batch = samples(lengths, types=True)
    for micro_batch in cut(batch, size, PAD, collate):
        longest = max(lengths[slot] for slot in micro_batch.slots)
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            assert micro_batch.inputs[name].shape == (len(micro_batch.slots), longest)
            assert micro_batch.inputs[name].dtype == torch.int64
        for row, slot in enumerate(micro_batch.slots):
            sample, length = batch[slot], lengths[slot]
            padding = longest - length
            assert micro_batch.inputs["input_ids"][row].tolist() == [*sample.ids, *[PAD] * padding]
            assert micro_batch.inputs["attention_mask"][row].tolist() == [1] * length + [0] * padding
            assert micro_batch.inputs["token_type_ids"][row].tolist() == [*sample.types, *[0] * padding]
            assert micro_batch.targets["position"][row] == sample.position
            assert micro_batch.targets["label"][row] == sample.label


def test_models_without_token_types_get_none() -> None:
    (micro_batch,) = cut(samples([2, 3]), 4, PAD, collate)
    assert sorted(micro_batch.inputs) == ["attention_mask", "input_ids"]


def test_a_cut_is_the_same_every_time_and_ties_go_by_slot() -> None:
    micro_batches = cut(samples([3, 1, 3, 1, 2]), 2, PAD, collate)
    assert [micro_batch.slots for micro_batch in micro_batches] == [(1, 3), (4, 0), (2,)]


def test_an_empty_batch_has_no_micro_batches() -> None:
    assert cut([], 4, PAD, collate) == []


# Deal


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 5), st.integers(1, 9))
def test_every_micro_batch_goes_to_exactly_one_rank(lengths: list[int], size: int, world_size: int) -> None:
    micro_batches = cut(samples(lengths), size, PAD, collate)
    dealt = [micro_batch for mine in deal(micro_batches, world_size) for micro_batch in mine]
    assert sorted(m.slots for m in dealt) == sorted(m.slots for m in micro_batches)


def test_ranks_agree_whatever_order_they_see() -> None:
    micro_batches = cut(samples([5, 9, 2, 7, 7, 3, 1, 8]), 1, PAD, collate)
    shuffled = list(micro_batches)
    random.Random(0).shuffle(shuffled)
    for rank in range(3):
        assert [m.slots for m in deal(micro_batches, 3)[rank]] == [m.slots for m in deal(shuffled, 3)[rank]]


def loads(micro_batches: Sequence[MicroBatch], world_size: int) -> list[int]:
    return [sum(m.cost for m in mine) for mine in deal(micro_batches, world_size)]


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 6))
def test_loads_differ_by_one_micro_batch_at_most(lengths: list[int], world_size: int) -> None:
    micro_batches = cut(samples(lengths), 2, PAD, collate)
    dealt_loads = loads(micro_batches, world_size)
    assert max(dealt_loads) - min(dealt_loads) <= max(m.cost for m in micro_batches)


def test_equal_micro_batches_are_shared_out_equally() -> None:
    assert loads(cut(samples([4] * 12), 2, PAD, collate), 3) == [16, 16, 16]


def test_one_rank_gets_all_and_more_ranks_than_work_get_none() -> None:
    micro_batches = cut(samples([4, 4]), 1, PAD, collate)
    assert len(deal(micro_batches, 1)[0]) == 2
    assert [len(mine) for mine in deal(micro_batches, 4)] == [1, 1, 0, 0]


def test_cost_counts_padding() -> None:
    (micro_batch,) = cut(samples([2, 5, 3]), 4, PAD, collate)
    assert micro_batch.cost == 15
