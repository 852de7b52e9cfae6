"""The trajectory: exact, small, and honest about damage."""

from __future__ import annotations

import json
import logging
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mezo_dist.algorithms.base import Losses
from mezo_dist.directions.combination import ZERO, Combination
from mezo_dist.directions.seeds import derive_seed
from mezo_dist.errors import UserError
from mezo_dist.trajectory import Header, Step, TrajectoryWriter, cut_torn_line, read

HEADER = Header({"seed": 3, "train": {"steps": 2}}, "d" * 64, "0123456789abcdef", "law/v1", 3)
STEPS = [
    Step(0, (Losses((0.1, 1 / 3)),), Combination.of([(2**64 - 1, -1e-7), (0, 3e38), (5, 1e-45)])),
    Step(1, (), ZERO, skipped="a loss is not finite"),
    Step(2, (Losses((0.5, 0.25), ((0.1, 0.9), (1e-300, 2.0**29))), Losses((5e-324, 7.0))), Combination.single(7, 1.0)),
]


def write(path: Path, steps: list[Step], header: Header | None = HEADER) -> Path:
    writer = TrajectoryWriter(path, header)
    for step in steps:
        writer.append(step)
    writer.close()
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "trajectory.jsonl", STEPS)


def test_round_trip_is_exact(path: Path) -> None:
    assert read(path) == (HEADER, STEPS)


finite = st.floats(allow_nan=False, allow_infinity=False)
terms = st.lists(st.tuples(st.integers(0, 2**64 - 1), st.floats(allow_nan=False, allow_infinity=False, width=32)))
losses = st.builds(
    Losses, st.lists(finite, min_size=1).map(tuple), st.lists(st.lists(finite, min_size=1).map(tuple)).map(tuple)
)
directions = terms.map(lambda pairs: Combination.of(dict(pairs).items()))


@settings(max_examples=40, deadline=None)
@given(st.builds(Step, st.integers(0, 10**9), st.lists(losses).map(tuple), directions, st.text()))
def test_every_bit_of_a_step_survives(step: Step) -> None:
    again = Step.from_json(json.loads(json.dumps(step.to_json(), allow_nan=False)))
    assert again == step
    assert [bits(c) for _, c in again.combination.terms] == [bits(c) for _, c in step.combination.terms]
    assert [[bits(v) for v in r.mean] for r in again.rounds] == [[bits(v) for v in r.mean] for r in step.rounds]


def bits(value: float) -> bytes:
    return struct.pack("<d", value)


def test_going_on_appends(path: Path) -> None:
    more = Step(3, (Losses((1.0,)),), ZERO)
    write(path, [more], header=None)
    assert read(path) == (HEADER, [*STEPS, more])


def test_a_new_trajectory_never_overwrites_one(path: Path) -> None:
    with pytest.raises(FileExistsError):
        TrajectoryWriter(path, HEADER)
    assert read(path) == (HEADER, STEPS)


def test_a_step_is_on_disk_when_append_returns(tmp_path: Path) -> None:
    writer = TrajectoryWriter(tmp_path / "t.jsonl", HEADER)
    for number, step in enumerate(STEPS, start=1):
        writer.append(step)
        assert read(tmp_path / "t.jsonl") == (HEADER, STEPS[:number])
    writer.close()


@pytest.mark.parametrize("left", [1, 20, -1])
def test_a_torn_last_line_is_left_out_and_can_be_cut(path: Path, left: int, caplog: pytest.LogCaptureFixture) -> None:
    """``left``: bytes of the last line that made it to disk (-1: all but the end of the line)."""
    whole = path.read_bytes()
    start = whole[:-1].rfind(b"\n") + 1
    torn = whole[start:][:left]
    path.write_bytes(whole[:start] + torn)
    assert read(path) == (HEADER, STEPS[:-1])
    with caplog.at_level(logging.WARNING, "mezo_dist"):
        cut_torn_line(path)
    assert f"cut a torn last line of {len(torn)} bytes" in caplog.text
    assert path.read_bytes() == whole[:start]
    write(path, STEPS[-1:], header=None)
    assert path.read_bytes() == whole


def test_cutting_leaves_a_whole_file_alone(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = path.read_bytes()
    cut_torn_line(path)
    assert path.read_bytes() == before
    assert not caplog.messages


DAMAGE = {
    "no JSON": ('"combination"', "combination", "damaged"),
    "half a line": ('"combination"', '"combination"\n', "damaged"),
    "a list": ('{"step":2', '[{"step":2', "damaged"),
    "no losses": ('"rounds"', '"around"', "damaged step"),
    "a seed that is no integer": ("[7,1.0]", "[7.5,1.0]", "damaged step"),
    "a seed that is too large": ("[7,1.0]", "[18446744073709551616,1.0]", "damaged step"),
    "a coefficient that is not finite": ("[7,1.0]", "[7,NaN]", "damaged step"),
    "a coefficient that fp32 cannot hold": ("[7,1.0]", "[7,1e300]", "damaged step"),
    "half a term": ("[7,1.0]", "[7]", "damaged step"),
    "another step": ('"step":2', '"step":5', "step 5 where step 2 was expected"),
    "a step twice": ('"step":2', '"step":1', "step 1 where step 2 was expected"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_names_file_and_line(path: Path, what: str) -> None:
    old, new, message = DAMAGE[what]
    lines = path.read_text().splitlines(keepends=True)
    assert old in lines[3]
    path.write_text("".join([*lines[:3], lines[3].replace(old, new)]))
    with pytest.raises(UserError, match=f"trajectory.jsonl, line 4: {message}"):
        read(path)


def test_a_step_that_is_missing_or_out_of_order_is_named(path: Path) -> None:
    head, *steps = path.read_text().splitlines(keepends=True)
    path.write_text("".join([head, steps[0], steps[2]]))
    with pytest.raises(UserError, match="line 3: step 2 where step 1 was expected"):
        read(path)
    path.write_text("".join([head, steps[1], steps[0]]))
    with pytest.raises(UserError, match="line 2: step 1 where step 0 was expected"):
        read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"format": "mezo_dist/traj', "is empty"),
        ('{"format":"something/9"}\n', "line 1: not a trajectory of format mezo_dist/trajectory/1"),
        ("[1, 2]\n", "line 1: not a JSON object"),
        ('{"format":"mezo_dist/trajectory/1","seed":3}\n', "line 1: damaged header"),
        ("\x00\x00\x00\n", "line 1: damaged"),
    ],
)
def test_what_is_no_trajectory_is_said(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read(path)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist: not a run folder"):
        read(tmp_path / "trajectory.jsonl")


def test_twenty_thousand_steps_of_mezo_take_less_than_4_MB() -> None:
    """Losses and coefficients with all their digits, seeds of full length, steps of five digits."""
    sizes = []
    for number in range(10_000, 10_200):
        step = Step(
            number,
            (Losses((0.6931471805599453 + number / 7e5, 0.7012345678901234 - number / 3e5)),),
            Combination.single(derive_seed(0, "direction", number, 0), -1e-7 * (number + 1) / 3),
        )
        sizes.append(len(json.dumps(step.to_json(), separators=(",", ":"))) + 1)
    assert max(sizes) < 200
    assert sum(sizes) / len(sizes) * 20_000 < 4e6


def test_hundreds_of_samples_fit_the_format(tmp_path: Path) -> None:
    each = tuple(tuple((i + 1) / (v + 3) for i in range(512)) for v in range(4))
    terms = Combination.of((derive_seed(0, "direction", 0, i), (i + 1) / 3e7) for i in range(512))
    step = Step(0, (Losses((1.0,) * 4, each),), terms)
    path = write(tmp_path / "t.jsonl", [step])
    assert read(path) == (HEADER, [step])
    assert len(terms) == 512
    assert path.stat().st_size < 100_000
