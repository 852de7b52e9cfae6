"""The trajectory: exact, small, and honest about damage."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mezo_dist.algorithms.base import Losses, Problem
from mezo_dist.algorithms.mezo import Mezo, MezoConfig
from mezo_dist.algorithms.svrg import Svrg, SvrgConfig
from mezo_dist.directions.combination import Combination
from mezo_dist.errors import UserError
from mezo_dist.journal import Journal
from mezo_dist.trajectory import FORMAT, Header, Log, Mark, Step, digest, parse, read, to_line

CONFIG = {"seed": 3, "train": {"steps": 2}}
HEADER = Header(CONFIG, "d" * 64, "a/model@main", "0123456789abcdef", "law/v1", "float32, to nearest", 3, 30, "0.1")
STEPS = [
    Step(0, (Losses((0.1, 1 / 3)),), "00000000"),
    Step(1, (), skipped="a loss is not finite"),
    Step(2, (Losses((0.5, 0.25), ((0.1, 0.9), (1e-300, 2.0**29))), Losses((5e-324, 7.0))), "12345678"),
]
FINGERPRINT = "fedcba9876543210"


def write(path: Path, entries: list[Step | Mark]) -> Path:
    journal = Journal.begin(path, HEADER)
    for entry in entries:
        journal.append(entry)
    journal.close()
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "trajectory.jsonl", [*STEPS[:2], Mark(2, FINGERPRINT), STEPS[2]])


def test_round_trip_is_exact(path: Path) -> None:
    found = read(path)
    assert (found.header, found.steps, found.marks) == (HEADER, STEPS, {2: FINGERPRINT})
    assert (found.size, found.torn) == (path.stat().st_size, 0)


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


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("count", [1, 20])
def test_what_is_not_finite_is_not_written(tmp_path: Path, bad: float, count: int) -> None:
    journal = Journal.begin(tmp_path / "t.jsonl", HEADER)
    with pytest.raises(ValueError, match="a loss is not finite"):
        journal.append(Step(0, (Losses((0.5,), ((bad,) * count,)),), "0" * 8))
    journal.append(STEPS[0])
    journal.close()
    assert read(tmp_path / "t.jsonl").steps == STEPS[:1]


# Writing


def test_going_on_appends(path: Path) -> None:
    journal = Journal.go_on(path, read(path))
    journal.append(Step(3, (Losses((1.0,)),), "0" * 8))
    journal.append(Mark(4, FINGERPRINT))
    journal.close()
    found = read(path)
    assert [step.step for step in found.steps] == [0, 1, 2, 3]
    assert found.marks == {2: FINGERPRINT, 4: FINGERPRINT}


def test_a_new_trajectory_never_overwrites_one(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        Journal.begin(path, HEADER)
    path.write_bytes(b"something else\n")
    with pytest.raises(UserError, match="not a trajectory"):
        Journal.begin(path, HEADER)
    path.write_bytes(before[:50])  # not even a header: nothing is lost
    Journal.begin(path, HEADER).close()
    assert read(path).header == HEADER


def test_a_file_that_grew_since_it_was_read_is_left_alone(path: Path) -> None:
    found = read(path)
    Journal.go_on(path, found).append(Mark(3, FINGERPRINT))
    with pytest.raises(UserError, match="changed since it was read: another job is writing to it"):
        Journal.go_on(path, found)


@pytest.mark.parametrize(("sync_s", "synced"), [(0.0, [1, 1, 1, 1]), (10.0, [0, 0, 1, 0]), (None, [0, 0, 0, 0])])
def test_how_often_it_waits_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync_s: float | None, synced: list[int]
) -> None:
    count, now = [0], [0.0]

    def fsync(handle: int) -> None:
        count[0] += 1

    Journal.begin(tmp_path / "t.jsonl", HEADER).close()
    journal = Journal(tmp_path / "t.jsonl", HEADER.identity, sync_s, clock=lambda: now[0])
    monkeypatch.setattr(os, "fsync", fsync)
    found = []
    for number in range(4):
        before, now[0] = count[0], now[0] + 4
        journal.append(Step(number, (Losses((0.5,)),), "0" * 8))
        found.append(count[0] - before)
        assert len(read(tmp_path / "t.jsonl").steps) == number + 1, "in the system's hands, if not on the disk"
    assert found == synced


@pytest.mark.parametrize("fails", ["write", "fsync"])
def test_a_step_that_cannot_be_written_leaves_no_trace(path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    whole, real = path.read_bytes(), os.write
    journal = Journal.go_on(path, read(path))

    def write_some(handle: int, data: bytes) -> int:
        if fails == "write" and len(data) < 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data[:30])  # as a disk that is nearly full does

    def fsync(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write_some)
        if fails == "fsync":
            patch.setattr(os, "fsync", fsync)
        with pytest.raises(
            UserError, match=r"output.dir: .*: step 3 could not be logged \((No space|Input).*--output.if_ex"
        ):
            journal.append(Step(3, (Losses((1.0,)),), "0" * 8))
    assert path.read_bytes() == whole
    journal.append(Step(3, (Losses((1.0,)),), "0" * 8))
    assert len(read(path).steps) == 4


# Damage


def test_torn_anywhere_in_its_last_line(path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = path.read_bytes()
    start = whole[:-1].rfind(b"\n") + 1
    for end in range(start + 1, len(whole)):
        path.write_bytes(whole[:end])
        found = read(path)
        assert (found.steps, found.size, found.torn) == (STEPS[:2], start, end - start)
    with caplog.at_level(logging.WARNING, "mezo_dist"):
        journal = Journal.go_on(path, found)
    assert f"cut a torn last line of {len(whole) - 1 - start} bytes" in caplog.text
    journal.append(STEPS[2])
    journal.close()
    assert path.read_bytes() == whole


def test_torn_anywhere_in_its_header_there_is_no_run(path: Path) -> None:
    whole = path.read_bytes()
    for end in range(whole.find(b"\n") + 1):
        assert parse(whole[:end], path) is None


def test_any_changed_byte_names_line_and_offset(path: Path) -> None:
    whole = path.read_bytes()
    starts = [0, *(i + 1 for i, byte in enumerate(whole[:-1]) if byte == ord("\n"))]
    for place in range(len(whole) - 1):
        line = max(number for number, start in enumerate(starts) if start <= place)
        changed = bytearray(whole)
        changed[place] ^= 1
        with pytest.raises(UserError) as error:
            parse(bytes(changed), path)
        # A line's end that is gone, or a new one, shows where the check is missing.
        assert f"trajectory.jsonl, line {line + 1} (offset {starts[line]}): " in str(error.value)


def test_lines_that_are_missing_moved_or_of_another_run(path: Path) -> None:
    head, *lines = path.read_bytes().splitlines(keepends=True)
    for kept in ([0, 2, 3], [1, 0, 2, 3], [0, 0, 1, 2, 3]):
        with pytest.raises(UserError, match=r"damaged: the line does not fit its checksum, or does not follow"):
            parse(b"".join([head, *(lines[i] for i in kept)]), path)
    other, _ = to_line({"format": FORMAT, **vars(HEADER), "base_fingerprint": "0" * 16}, "")
    with pytest.raises(UserError, match="line 2"):
        parse(b"".join([other, *lines]), path)
    elsewhere, _ = to_line({"format": FORMAT, **vars(HEADER), "config": {"output": {"dir": "x"}}}, "")
    assert parse(b"".join([elsewhere, *lines]), path) is not None, "the same run in another folder"


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another step": ({"step": 5, "loss": [], "add": ""}, "step 5 where step 0 was expected"),
    "a step that is no number": ({"step": True, "loss": [], "add": ""}, "step True is no number"),
    "no losses": ({"step": 0, "add": ""}, "damaged: 'loss' is missing"),
    "losses of text": ({"step": 0, "loss": [{"mean": ["a"]}], "add": ""}, "damaged: losses that are no numbers"),
    "an integer too large": ({"step": 0, "loss": [{"mean": [10**400]}], "add": ""}, "too large"),
    "no base64": ({"step": 0, "loss": [{"mean": "f:!"}], "add": ""}, "base64|padding|data"),
    "another packing": ({"step": 0, "loss": [{"mean": "x:AAAA"}], "add": ""}, "'x' is missing"),
    "half a number": ({"step": 0, "loss": [{"mean": "f:AAA="}], "add": ""}, "buffer size|padding"),
    "packed NaN": ({"step": 0, "loss": [{"mean": "f:AADAfwAAwH8"}], "add": ""}, "losses that are not finite"),
    "nothing": ({}, "'step' is missing"),
    "a fingerprint too early": ({"done": 4, "weights": ""}, "after 4 steps where there are 0"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_line_with_a_right_check_can_still_be_wrong(what: str) -> None:
    content, message = WRONG[what]
    head, _ = to_line({"format": FORMAT, **vars(HEADER)}, "")
    line, _ = to_line(content, HEADER.identity)
    with pytest.raises(UserError, match=rf"t, line 2 \(offset {len(head)}\): .*({message})"):
        parse(head + line, Path("t"))


def test_a_line_that_is_deep_or_no_object_is_an_error() -> None:
    head, _ = to_line({"format": FORMAT, **vars(HEADER)}, "")
    for text in (b"[" * 100_000, b'{"a":' * 100_000, b"[1", b'{"step":NaN'):
        check = hashlib.blake2b(text + HEADER.identity.encode(), digest_size=4).hexdigest()
        with pytest.raises(UserError, match="line 2"):
            parse(head + text + f',"check":"{check}"}}\n'.encode(), Path("t"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b'{"format":"mezo_dist/traj', "is empty"),
        (b'{"format":"something/9"}\n', r"line 1 \(offset 0\): not a trajectory"),
        (b'{"format":"mezo_dist/trajectory/1","seed":3}\n', "line 1"),
        (to_line({"format": "mezo_dist/trajectory/1"}, "")[0], "format 'mezo_dist/trajectory/1'; this version of mezo"),
        (to_line({"format": FORMAT, "seed": 3}, "")[0], "line 1 .*missing 8 required"),
        (to_line({"format": FORMAT, **vars(HEADER), "seed": "3"}, "")[0], "damaged header: seed is '3'"),
        (to_line({"format": FORMAT, **vars(HEADER), "more": 3}, "")[0], "line 1 .*unexpected"),
        (b"\x00" * 3000, "not a trajectory"),
    ],
)
def test_what_is_no_trajectory_is_said(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(path)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist: not a run folder"):
        read(tmp_path / "trajectory.jsonl")


def test_a_huge_file_of_something_else_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no room on the disk, but would in memory
    with pytest.raises(UserError, match="not a trajectory"):
        read(path)


WHOLE = b"".join([to_line({"format": FORMAT, **vars(HEADER)}, "")[0], to_line(STEPS[0].to_json(), HEADER.identity)[0]])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_is_done_to_a_file_it_is_read_or_refused(data: st.DataObject) -> None:
    """Bytes replaced, cut out and put in; other exceptions than UserError, and wrong steps, fail the test."""
    content = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(0, 4))):
        start = data.draw(st.integers(0, len(content)))
        stop = data.draw(st.integers(start, len(content)))
        content[start:stop] = data.draw(st.binary(max_size=40) | st.just(bytes(WHOLE[start:stop]) * 2))
    found = outcome(bytes(content))
    if isinstance(found, str):
        assert found.startswith("t, line ")
    else:
        assert found is None or (found.header == HEADER and found.steps in ([], STEPS[:1]))


def outcome(content: bytes) -> Log | str | None:
    """What was read, or the message."""
    try:
        return parse(content, Path("t"))
    except UserError as error:
        return str(error)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["mean", "each"]), inner),
    max_leaves=8,
)
keys = st.sampled_from(["step", "loss", "add", "skipped", "done", "weights"])


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(keys, json_values | st.just(0) | st.lists(st.dictionaries(st.just("mean"), json_values))))
def test_any_json_with_a_right_check_is_read_or_refused(content: dict[str, Any]) -> None:
    head, _ = to_line({"format": FORMAT, **vars(HEADER)}, "")
    line, _ = to_line(content, HEADER.identity)
    found = outcome(head + line)
    assert isinstance(found, Log) or "t, line 2 (offset " in str(found)


# Sizes, with losses as runs have them: sums of fp32 losses of so many samples, all digits


def measured(v: int, i: int) -> float:
    loss: float = struct.unpack("<f", struct.pack("<f", random.Random(v * 1000 + i).uniform(0.1, 3)))[0]
    return loss


def line_size(number: int, *rounds: Losses) -> int:
    step = Step(number, rounds, digest(Combination.single(number, 1e-7)))
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
    mezo = Mezo(MezoConfig(per_sample=True), problem)
    losses = Losses(mean[:2], each[:2])
    update = mezo.update(mezo.init(), 19_000, [losses])
    assert len(update.combination) == batch
    assert line_size(19_000, losses) <= 16 * batch
    svrg = Svrg(SvrgConfig(per_sample=True), problem)
    anchor = tuple(tuple(measured(v, i) for i in range(128)) for v in range(2))
    means = tuple(sum(int(loss * 2**32) for loss in row) / (128 * 2**32) for row in anchor)
    first = svrg.update(svrg.init(), 0, [Losses(means, anchor)])
    assert line_size(19_000, Losses(means, anchor)) <= 16 * len(first.combination)
    second = svrg.update(first.state, 1, [Losses(mean, each)])
    assert len(second.combination) == 128 + batch
    assert line_size(19_001, Losses(mean, each)) <= 8 * len(second.combination)
