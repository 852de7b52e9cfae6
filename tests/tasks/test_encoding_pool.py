"""Rows that several processes encode become the same samples, with the same refusals, and nothing is lost with one."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from mezo_dist.config import reader
from mezo_dist.errors import UserError
from mezo_dist.storage.sample_file import block_of
from mezo_dist.tasks import encoding_pool
from mezo_dist.tasks.encoding import encode_rows
from mezo_dist.tasks.fields import Row
from mezo_dist.tasks.kind import TextModel
from mezo_dist.tasks.kinds import kind_of
from mezo_dist.tasks.regression.kind import Sample
from mezo_dist.testing import tiny_tokenizer
from tests.tasks import kind_configs
from tests.tasks.kind_configs import TASKS, write_kind_config

NUM_ROWS, BLOCK = 70, 16
ROWS = [{"number": number} for number in range(NUM_ROWS)]


@pytest.fixture(autouse=True)
def _two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding_pool, "LEAST_ROWS", NUM_ROWS)
    monkeypatch.setattr(encoding_pool, "BLOCK", BLOCK)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})


def test_few_rows_are_encoded_here() -> None:
    assert set(encode_rows(ROWS[:-1], "train", lambda _: os.getpid())) == {os.getpid()}


def test_many_rows_are_encoded_by_others_in_their_order() -> None:
    results = list(encode_rows(ROWS, "train", lambda row: (row["number"], os.getpid())))
    assert [number for number, _ in results] == list(range(NUM_ROWS))
    assert os.getpid() not in {process for _, process in results}
    assert "TOKENIZERS_PARALLELISM" not in os.environ


@pytest.mark.parametrize("name", TASKS)
def test_the_samples_are_those_of_one_process(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = reader.load(write_kind_config(tmp_path, name)).task
    rows = kind_configs.rows(NUM_ROWS)
    model = TextModel(tiny_tokenizer(), "classifier" if name == "regression" else "causal", 24, None)
    kind = kind_of(task, model, rows[0])
    shared = list(kind.encode(rows, "train"))
    monkeypatch.setattr(encoding_pool, "LEAST_ROWS", NUM_ROWS + 1)
    assert shared == list(kind.encode(rows, "train"))


def test_what_is_made_of_samples_is_made_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of samples has the same bytes, and the process that writes it sees no sample."""
    samples = encode_rows(ROWS, "train", lambda row: Sample((row["number"],), 0.5))
    assert os.getpid() not in set(samples.blocks(lambda _: os.getpid()))
    shared = list(samples.blocks(block_of))
    monkeypatch.setattr(encoding_pool, "LEAST_ROWS", NUM_ROWS + 1)
    alone = list(samples.blocks(block_of))
    assert [len(block.ends) for block in alone] == [NUM_ROWS]
    assert [len(block.ends) for block in shared] == [BLOCK] * (NUM_ROWS // BLOCK) + [NUM_ROWS % BLOCK]
    assert b"".join(block.content for block in shared) == alone[0].content == block_of(list(samples)).content


def test_the_first_wrong_row_is_named_and_what_came_before_it_is_there() -> None:
    def encode(row: Row) -> int:
        if row["number"] in (BLOCK + 3, BLOCK + 5, 3 * BLOCK):
            raise UserError(f"no number {row['number']}")
        return int(row["number"])

    done: list[int] = []
    with pytest.raises(UserError, match=r"^test sample 19, \{'number': 19\}: no number 19$"):
        done.extend(encode_rows(ROWS, "test", encode))
    samples = iter(encode_rows(ROWS, "test", encode))
    assert [next(samples) for _ in range(BLOCK + 3)] == list(range(BLOCK + 3))


def test_where_a_process_dies_one_goes_on_alone(caplog: pytest.LogCaptureFixture) -> None:
    here = os.getpid()

    def encode(row: Row) -> tuple[int, int]:
        if row["number"] == 2 * BLOCK + 1 and os.getpid() != here:
            os._exit(9)
        return int(row["number"]), os.getpid()

    with caplog.at_level(logging.WARNING):
        results = list(encode_rows(ROWS, "train", encode))
    assert [number for number, _ in results] == list(range(NUM_ROWS))
    assert results[-1][1] == here
    assert "one goes on alone" in caplog.text


def test_rows_are_not_encoded_long_before_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding_pool, "BLOCK", 2)
    seen = tmp_path / "seen"

    def encode(row: Row) -> int:
        with seen.open("a") as file:
            file.write(".")
        return int(row["number"])

    samples = iter(encode_rows(ROWS, "train", encode))
    assert next(samples) == 0
    samples.close()  # type: ignore[attr-defined]
    assert 2 <= seen.stat().st_size <= 2 * encoding_pool.AHEAD * 2
