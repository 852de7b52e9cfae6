"""Losses as fixed-point integers: sums do not depend on their order, and what is no loss is flagged."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mezo_dist.distributed.fixed_point import mean, to_fixed

fp32 = st.floats(min_value=-1e6, max_value=1e6, width=32)


@settings(deadline=None)
@given(st.lists(fp32, min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_sums_do_not_depend_on_the_order(losses: list[float], shuffle: random.Random) -> None:
    fixed, sound = to_fixed(torch.tensor(losses))
    assert bool(sound.all())
    total = int(fixed.sum())
    shuffled = fixed.tolist()
    shuffle.shuffle(shuffled)
    place = shuffle.randint(0, len(shuffled))
    assert sum(shuffled[:place]) + sum(shuffled[place:]) == total
    exact = sum((Fraction(loss) for loss in losses), Fraction(0))
    assert abs(Fraction(total, 2**32) - exact) <= Fraction(len(losses), 2**33)


@settings(deadline=None)
@given(st.integers(-(2**61), 2**61))
def test_fixed_point_round_trip_is_exact(multiple: int) -> None:
    value = multiple / 2**32
    fixed, sound = to_fixed(torch.tensor([value], dtype=torch.float64))
    assert bool(sound)
    assert int(fixed) / 2**32 == value


def test_every_loss_from_2_to_the_minus_9_up_is_exact_in_fp32() -> None:
    losses = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 20 + 2**-9
    assert torch.equal(to_fixed(losses)[0].double() / 2**32, losses.double())


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 2.0**30, -(2.0**30), 3e38])
def test_what_is_no_loss_is_flagged_and_counts_nothing(loss: float) -> None:
    fixed, sound = to_fixed(torch.tensor([1.5, loss, -0.25]))
    assert sound.tolist() == [True, False, True]
    assert fixed.tolist() == [3 * 2**31, 0, -(2**30)]


def test_the_mean_is_rounded_once() -> None:
    total = sum(int(to_fixed(torch.tensor([loss]))[0]) for loss in (0.1, 0.2, 0.7))
    exact = sum(Fraction(float(torch.tensor(loss))) for loss in (0.1, 0.2, 0.7)) / 3
    assert mean(total, 3) == float(exact)
    assert mean(2**61 + 1, 7) == float(Fraction(2**61 + 1, 7 * 2**32))
