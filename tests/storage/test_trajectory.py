"""The trajectory: exact, and small."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mezo_dist.algorithms.base import Losses, Problem
from mezo_dist.algorithms.mezo import MeZO, MeZOPlanner
from mezo_dist.algorithms.operations import Add
from mezo_dist.algorithms.svrg import MeZOSVRG, SVRGPlanner
from mezo_dist.directions.combination import Combination
from mezo_dist.storage.trajectory import Mark, Step, digest, read, to_line
from tests.storage.trajectories import FINGERPRINT, HEADER, STEPS


def test_round_trip_is_exact(trajectory_path: Path) -> None:
    log = read(trajectory_path)
    assert (log.header, log.steps, log.marks) == (HEADER, STEPS, {2: Mark(2, FINGERPRINT)})
    assert (log.size, log.torn) == (trajectory_path.stat().st_size, 0)


finite = st.floats(allow_nan=False, allow_infinity=False)
single = st.floats(allow_nan=False, allow_infinity=False, width=32)
# Losses of samples come from fp32 and are multiples of 2**-32; others may be anything, black boxes too.
row = st.lists(finite, min_size=1, max_size=20) | st.lists(single, min_size=9, max_size=20)
losses = st.builds(Losses, row.map(tuple), st.lists(row.map(tuple), max_size=4).map(tuple))


@settings(max_examples=60, deadline=None)
@given(st.lists(losses, min_size=1, max_size=3).map(tuple))
def test_every_bit_of_the_losses_survives(rounds: tuple[Losses, ...]) -> None:
    step = Step(0, rounds, "00000000")
    again = Step.from_json(json.loads(json.dumps(step.to_json(), allow_nan=False)))
    assert again == step
    for one, other in zip(again.rounds, rounds, strict=True):
        assert bits(one.mean) == bits(other.mean)
        assert [bits(values) for values in one.each] == [bits(values) for values in other.each]


def bits(values: tuple[float, ...]) -> bytes:
    return struct.pack(f"<{len(values)}d", *values)


def test_means_that_follow_from_the_samples_are_not_written() -> None:
    each = tuple(tuple(round((i + 1) / (v + 3) * 2**20) / 2**32 for i in range(16)) for v in range(2))
    mean = tuple(sum(int(loss * 2**32) for loss in row) / (16 * 2**32) for row in each)
    same, weighted = Step(0, (Losses(mean, each),), "0" * 8), Step(0, (Losses((0.5, 0.25), each),), "0" * 8)
    assert "mean" not in json.dumps(same.to_json())
    assert Step.from_json(same.to_json()) == same
    assert Step.from_json(weighted.to_json()) == weighted


def test_learning_rates_from_outside_stand_beside_the_losses() -> None:
    rounds = (Losses((0.5, 0.25)),)
    given = Step(3, rounds, "ab", lr=(1e-6, 0.0))
    assert given.to_json()["lr"] == [1e-6, 0.0]
    assert Step.from_json(given.to_json()) == given
    assert "lr" not in Step(3, rounds, "ab").to_json()
    with pytest.raises(ValueError, match="damaged"):
        Step.from_json({**given.to_json(), "lr": ["1e-6"]})


# Sizes, with losses as runs have them: sums of fp32 losses of so many samples, all digits


def measured(v: int, i: int) -> float:
    loss: float = struct.unpack("<f", struct.pack("<f", random.Random(v * 1000 + i).uniform(0.1, 3)))[0]
    return loss


def line_size(number: int, *rounds: Losses) -> int:
    step = Step(number, rounds, digest([Add(Combination.single(number, 1e-7))]))
    return len(to_line(step.to_json(), "01234567")[0])


def test_twenty_thousand_steps_with_one_direction_take_less_than_4_MB() -> None:
    sizes = []
    for number in range(19_000, 19_200):
        mean = tuple(sum(measured(v, number + i) for i in range(16)) / 16 for v in range(4))
        sizes.append(line_size(number, Losses(mean)))
    assert max(sizes) < 200
    assert sum(sizes) / len(sizes) * 20_000 < 4e6


@pytest.mark.parametrize("batch", [16, 64])
def test_a_direction_per_sample_takes_at_most_16_bytes_per_coefficient(batch: int) -> None:
    problem = Problem(0, 20_000, batch, 128)
    each = tuple(tuple(measured(v, i) for i in range(batch)) for v in range(4))
    mean = tuple(sum(int(loss * 2**32) for loss in row) / (batch * 2**32) for row in each)
    mezo: Any = MeZOPlanner(MeZO(per_sample=True), problem)
    losses = Losses(mean[:2], each[:2])
    update = mezo.update(mezo.init(), 19_000, [losses])
    assert len(update.combination) == batch
    assert line_size(19_000, losses) <= 16 * batch
    svrg: Any = SVRGPlanner(MeZOSVRG(per_sample=True), problem)
    anchor = tuple(tuple(measured(v, i) for i in range(128)) for v in range(2))
    means = tuple(sum(int(loss * 2**32) for loss in row) / (128 * 2**32) for row in anchor)
    first = svrg.update(svrg.init(), 0, [Losses(means, anchor)])
    assert line_size(19_000, Losses(means, anchor)) <= 16 * len(first.combination)
    second = svrg.update(first.state, 1, [Losses(mean, each)])
    assert len(second.combination) == 128 + batch
    assert line_size(19_001, Losses(mean, each)) <= 8 * len(second.combination)
