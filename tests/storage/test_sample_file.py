"""Samples in a file: the same as in memory, verified, and nothing that was changed or cut is taken."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mezo_dist.errors import UserError
from mezo_dist.storage.sample_file import PART, block_of, digest_of, evict, read_samples, write_samples
from mezo_dist.storage.sample_index import SampleIndex
from mezo_dist.tasks.choice.options import Sample as Options
from mezo_dist.tasks.classification.prompts import Sample as Prompt
from mezo_dist.tasks.completion.kind import Sample as Completed
from mezo_dist.tasks.generation.kind import Sample as Written
from mezo_dist.tasks.regression.kind import Sample as Value

SAMPLES: dict[str, list[Any]] = {
    "classification": [Prompt((1, 2, 3), 0, -1), Prompt((7,), 1, 0, (0,)), Prompt((5, 6), 2, 1)],
    "choice": [Options(((1, 2), (1, 3, 4)), (1, 1), (5, 9), 0, (0, 1)), Options(((9,), (8,)), (0, 0), (1, 1), 1, (1,))],
    "completion": [Completed((1, 2, 3, 4), ((1, 2), (3, 4))), Completed((1, 2), ())],
    "regression": [Value((1, 2), 0.1 + 0.2), Value((3,), -1e-300), Value((3,), 1e22), Value((4,), 0.0, (1,))],
    "generation": [
        Written((1,), (1, 2), 1, 9, ("it's (good, bad)", 'a "film"', "\n\\ \ufdd0 é"), '{"text": "[1, 2,)"}'),
        Written((1,), (1, 2), 1, 9, (), "{}"),
    ],
    "none": [],
}


def nothing() -> None:
    """Nobody waits."""


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_come_back(name: str, tmp_path: Path) -> None:
    samples, path = SAMPLES[name], tmp_path / "x.samples"
    make: Callable[..., object] = type(samples[0]) if samples else Prompt
    write_samples(path, [block_of(samples[:2]), block_of(samples[2:])], "key", nothing)
    file = read_samples(path, "key", make)
    assert file is not None
    assert list(file) == samples
    assert [repr(file[place]) for place in range(-len(file), 0)] == [repr(sample) for sample in samples]
    assert file[1:] == samples[1:]
    assert file[::-1] == samples[::-1]
    assert file.digest == digest_of(samples)
    assert file.table == SampleIndex.of(samples)
    with pytest.raises(IndexError):
        file[len(samples)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.samples"]


def test_the_digest_is_the_one_that_trajectories_have() -> None:
    assert digest_of(SAMPLES["classification"]) == "f494358f1c0d75d282b4fa9b42a67702"
    assert digest_of([]) == "cae66941d9efbd404e4d88758ea67670"


def test_damage_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every byte counts, and every length."""
    path = tmp_path / "x.samples"
    write_samples(path, [block_of(SAMPLES["classification"])], "key", nothing)
    content = path.read_bytes()
    damaged = [content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :] for place in range(len(content))]
    cut = [content[:place] for place in range(len(content))]
    more = [content + b"0", content + b"\n", b"0" + content]
    for number, some in enumerate([*damaged, *cut, *more]):
        path.write_bytes(some)
        file = read_samples(path, "key", Prompt)
        assert file is None or list(file) == SAMPLES["classification"], number  # a space in JSON is no damage
    assert "is damaged or no such file" in caplog.text
    path.write_bytes(content)
    assert read_samples(path, "key", Prompt) is not None


@pytest.mark.parametrize("kind", ["other key", "folder", "link", "pipe"])
def test_foreign_files_are_not_read(kind: str, tmp_path: Path) -> None:
    path, other = tmp_path / "x.samples", tmp_path / "y.samples"
    write_samples(other, [block_of(SAMPLES["classification"])], "key", nothing)
    if kind == "other key":
        other.rename(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(other)
    else:
        os.mkfifo(path)
    assert read_samples(path, "another" if kind == "other key" else "key", Prompt) is None
    assert read_samples(tmp_path / "none.samples", "key", Prompt) is None


def test_a_file_that_shrinks_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "x.samples"
    write_samples(path, [block_of(SAMPLES["classification"])], "key", nothing)
    file = read_samples(path, "key", Prompt)
    assert file is not None
    os.truncate(path, 3)
    with pytest.raises(UserError, match="was cut short while it was read; start again"):
        file[1]


def test_a_file_that_is_deleted_is_still_read(tmp_path: Path) -> None:
    path = tmp_path / "x.samples"
    write_samples(path, [block_of(SAMPLES["classification"])], "key", nothing)
    file = read_samples(path, "key", Prompt)
    path.unlink()
    assert file is not None
    assert list(file) == SAMPLES["classification"]


def test_nothing_is_left_where_encoding_fails(tmp_path: Path) -> None:
    def failing() -> None:
        raise UserError("no")

    with pytest.raises(UserError):
        write_samples(tmp_path / "x.samples", [block_of(SAMPLES["classification"])], "key", failing)
    assert not list(tmp_path.iterdir())


def test_what_was_not_used_for_longest_makes_room(tmp_path: Path) -> None:
    for number in range(4):
        write_samples(tmp_path / f"{number}.samples", [block_of(SAMPLES["classification"])], "key", nothing)
        os.utime(tmp_path / f"{number}.samples", (number, number))
    size = (tmp_path / "0.samples").stat().st_size
    in_use = read_samples(tmp_path / "1.samples", "key", Prompt)
    os.utime(tmp_path / "1.samples", (1, 1))
    (tmp_path / f".old{PART}").touch()
    os.utime(tmp_path / f".old{PART}", (1, 1))
    (tmp_path / f".new{PART}").touch()
    evict(tmp_path, 2 * size)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".new{PART}", "1.samples", "2.samples", "3.samples"]
    assert in_use is not None
    evict(tmp_path, size)
    assert {path.name for path in tmp_path.iterdir()} >= {"1.samples", "3.samples"}
    assert time.time() - (tmp_path / "3.samples").stat().st_mtime > 1, "only reading makes a file young"


def reads_of_a_step(path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each read for 16 of ``number`` samples."""
    write_samples(path, [block_of([Prompt((1, 2, 3), 0, 2) for _ in range(number)])], "key", nothing)
    file = read_samples(path, "key", Prompt)
    assert file is not None
    pread, reads = os.pread, []

    def counted(handle: int, size: int, start: int) -> bytes:
        reads.append(size)
        return pread(handle, size, start)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", counted)
        assert len([file[place] for place in range(16)]) == 16
    return reads


def test_reading_a_sample_reads_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are: what a step reads does not grow with the data."""
    few, many = (reads_of_a_step(tmp_path / f"{n}.samples", n, monkeypatch) for n in (100, 10_000))
    assert few == many
    assert len(few) == 16
