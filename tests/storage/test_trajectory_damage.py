"""A damaged trajectory: what is torn or wrong is said, with line and offset, or refused."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mezo_dist.errors import UserError
from mezo_dist.storage.trajectory import FORMAT, Log, parse, read, to_line
from mezo_dist.storage.trajectory_writer import TrajectoryWriter
from tests.storage.trajectories import HEADER, STEPS


def test_torn_anywhere_in_its_last_line(
    trajectory_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = trajectory_path.read_bytes()
    start = whole[:-1].rfind(b"\n") + 1
    for end in range(start + 1, len(whole)):
        trajectory_path.write_bytes(whole[:end])
        log = read(trajectory_path)
        assert (log.steps, log.size, log.torn) == (STEPS[:2], start, end - start)
    with caplog.at_level(logging.WARNING, "mezo_dist"):
        writer = TrajectoryWriter.go_on(trajectory_path, log)
    assert f"cut a torn last line of {len(whole) - 1 - start} bytes" in caplog.text
    writer.append(STEPS[2])
    writer.close()
    assert trajectory_path.read_bytes() == whole


def test_torn_anywhere_in_its_header_there_is_no_run(trajectory_path: Path) -> None:
    whole = trajectory_path.read_bytes()
    for end in range(whole.find(b"\n") + 1):
        assert parse(whole[:end], trajectory_path) is None


def test_any_changed_byte_names_line_and_offset(trajectory_path: Path) -> None:
    whole = trajectory_path.read_bytes()
    starts = [0, *(i + 1 for i, byte in enumerate(whole[:-1]) if byte == ord("\n"))]
    for place in range(len(whole) - 1):
        line = max(number for number, start in enumerate(starts) if start <= place)
        changed = bytearray(whole)
        changed[place] ^= 1
        with pytest.raises(UserError) as error:
            parse(bytes(changed), trajectory_path)
        # A line's end that is gone, or a new one, shows where the check is missing.
        assert f"trajectory.jsonl, line {line + 1} (offset {starts[line]}): " in str(error.value)


def test_lines_that_are_missing_moved_or_of_another_run(trajectory_path: Path) -> None:
    head, *lines = trajectory_path.read_bytes().splitlines(keepends=True)
    for kept in ([0, 2, 3], [1, 0, 2, 3], [0, 0, 1, 2, 3]):
        with pytest.raises(UserError, match=r"damaged: the line does not fit its checksum, or does not follow"):
            parse(b"".join([head, *(lines[i] for i in kept)]), trajectory_path)
    other, _ = to_line({"format": FORMAT, **vars(HEADER), "base_fingerprint": "0" * 16}, "")
    with pytest.raises(UserError, match="line 2"):
        parse(b"".join([other, *lines]), trajectory_path)
    elsewhere, _ = to_line({"format": FORMAT, **vars(HEADER), "config": {**HEADER.config, "output": {"dir": "x"}}}, "")
    assert parse(b"".join([elsewhere, *lines]), trajectory_path) is not None, "the same run in another folder"


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
        (to_line({"format": FORMAT, "seed": 3}, "")[0], "line 1 .*damaged header: .*'base_model', .*are missing"),
        (to_line({"format": FORMAT, **vars(HEADER), "seed": "3"}, "")[0], "damaged header: seed is '3'"),
        (to_line({"format": FORMAT, **vars(HEADER), "config": {"seed": 4}}, "")[0], "settings do not fit their digest"),
        (to_line({"format": FORMAT, **vars(HEADER), "config_digest": "0" * 64}, "")[0], "do not fit their digest"),
        (
            to_line({"format": FORMAT, **vars(HEADER), "more": 3}, "")[0],
            r"damaged header: \['more'\] are missing, or",
        ),
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


def test_a_hole_in_a_trajectory_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(WHOLE)
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=r"damaged: at byte \d+ a megabyte of zeros begins; cut the file there"):
        read(path)
    path.write_bytes(WHOLE + b"\0" * 3000)  # what a crash may leave is a torn line
    assert read(path).torn == 3000


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(WHOLE)
    (tmp_path / "t.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "t.jsonl")


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
    result = outcome(bytes(content))
    if isinstance(result, str):
        assert result.startswith("t, line ")
    else:
        assert result is None or (result.header == HEADER and result.steps in ([], STEPS[:1]))


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
    result = outcome(head + line)
    assert isinstance(result, Log) or "t, line 2 (offset " in str(result)
