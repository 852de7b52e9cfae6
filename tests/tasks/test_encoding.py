"""Rows become samples many at a time: the same samples as one by one, with few calls of the tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mezo_dist.config import reader
from mezo_dist.config.schema import ModelKind
from mezo_dist.errors import UserError
from mezo_dist.tasks import encoding
from mezo_dist.tasks import text as text_module
from mezo_dist.tasks.encoding import Texts, ask, encode_rows
from mezo_dist.tasks.fields import Row
from mezo_dist.tasks.kind import TextModel
from mezo_dist.tasks.kinds import kind_of
from mezo_dist.tasks.text import TextEncoder
from mezo_dist.testing import tiny_tokenizer
from tests.tasks import kind_configs
from tests.tasks.encoders import TOKENIZERS, encoder
from tests.tasks.kind_configs import TASKS, write_kind_config

NUM_ROWS = 300


class Calls:
    """A tokenizer of lengths that counts its calls."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def lengths(self, texts: Sequence[Texts]) -> list[int]:
        self.sizes.append(len(texts))
        return [sum(map(len, one)) for one in texts]


def test_rows_wait_for_one_another() -> None:
    calls, rows = Calls(), [{"text": "a" * number} for number in range(NUM_ROWS)]

    def encode(row: Row) -> int:
        first, second = ask(calls.lengths, [(row["text"],), (row["text"] + "b",)])
        again: int = ask(calls.lengths, [("c" * first,)])[0]  # a second question
        return again + int(second)

    assert list(encode_rows(rows, "train", encode)) == [2 * number + 1 for number in range(NUM_ROWS)]
    assert sum(calls.sizes) == 3 * NUM_ROWS
    assert len(calls.sizes) <= 3 * (NUM_ROWS // encoding.AT_ONCE + 1)


def test_pairs_and_texts_are_asked_apart() -> None:
    calls = Calls()
    rows = [{"texts": ("a", "b") if number % 3 else ("abc",)} for number in range(9)]
    assert list(encode_rows(rows, "train", lambda row: ask(calls.lengths, [row["texts"]])[0])) == [3, 2, 2] * 3
    assert sorted(calls.sizes) == [3, 6]


def test_a_call_is_no_larger_than_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "MOST_CHARACTERS", 100)
    calls = Calls()
    rows = [{"text": "a" * 40}] * 12
    assert list(encode_rows(rows, "train", lambda row: ask(calls.lengths, [(row["text"],)])[0])) == [40] * 12
    assert calls.sizes == [3] * 4


def test_the_first_wrong_row_is_named() -> None:
    """Though one after it fails before it does, which asks for nothing."""
    calls = Calls()

    def encode(row: Row) -> int:
        if row["number"] == 7:
            raise UserError("no number 7")
        ask(calls.lengths, [("a",)])
        if row["number"] == 5:
            raise UserError("no number 5")
        return int(row["number"])

    samples = encode_rows([{"number": number} for number in range(20)], "test", encode)
    done: list[int] = []
    with pytest.raises(UserError, match=r"^test sample 5, \{'number': 5\}: no number 5$"):
        done.extend(samples)
    assert not done or done == list(range(5))


def test_rows_without_questions_do_not_run_ahead_of_one_that_waits() -> None:
    """Else all samples could be in memory before the first is taken."""
    calls, seen = Calls(), list[int]()

    def encode(row: Row) -> int:
        seen.append(row["number"])
        if row["number"] % 1_000 == 0:
            ask(calls.lengths, [("a",)])
            ask(calls.lengths, [("b",)])
        return int(row["number"])

    rows = [{"number": number} for number in range(10_000)]
    for number, sample in enumerate(encode_rows(rows, "train", encode)):
        assert sample == number
        assert len(seen) <= number + 6 * encoding.AT_ONCE


def test_samples_come_as_they_are_asked_for() -> None:
    """A million rows are not in memory before the first sample is there."""
    seen: list[int] = []

    def encode(row: Row) -> int:
        seen.append(row["number"])
        return int(row["number"])

    samples = iter(encode_rows([{"number": number} for number in range(10_000)], "train", encode))
    assert next(samples) == 0
    assert len(seen) <= encoding.AT_ONCE
    samples.close()  # type: ignore[attr-defined]


def longer(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every fifth text is too long for a window of 24 tokens."""
    return [
        {**row, "text": row["text"] + " very good film" * (number % 5 // 4 * 12)} for number, row in enumerate(rows)
    ]


@pytest.mark.parametrize("name", TASKS)
def test_many_rows_are_encoded_as_one_by_one(name: str, tmp_path: Path) -> None:
    task = reader.load(write_kind_config(tmp_path, name)).task
    rows = longer(kind_configs.rows(NUM_ROWS))
    model = TextModel(tiny_tokenizer(), "classifier" if name == "regression" else "causal", 24, None)
    kind = kind_of(task, model, rows[0])
    together = list(kind.encode(rows, "train"))
    assert together == [sample for row in rows for sample in kind.encode([row], "train")]
    assert {type(sample) for sample in together} == {kind.sample}


@pytest.mark.parametrize("kind", ["causal", "masked", "classifier"])
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_many_classifications_are_encoded_as_one_by_one(kind: ModelKind, tokenizer: str) -> None:
    rows = longer(kind_configs.rows(60))
    the_encoder = encoder(kind, tokenizer, 24, plain=("{{ text }}",))
    together = list(the_encoder.encode(rows, "train"))
    assert together == [sample for row in rows for sample in the_encoder.encode([row], "train")]


def test_pairs_of_which_one_is_empty() -> None:
    texts = TextEncoder(tiny_tokenizer(), 24, ())
    rows = [{"one": "good film", "other": " very plain plot"[: 16 * (number % 2)]} for number in range(40)]
    templates = ["{{ one }}", "{{ other }}"]
    together = list(encode_rows(rows, "train", lambda row: texts.plain(templates, row)))
    assert together == [texts.plain(templates, row) for row in rows]


def test_the_number_of_calls_does_not_grow_with_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    calls = []
    call = type(tokenizer).__call__

    def counted(self: Any, *texts: Any, **options: Any) -> Any:
        calls.append(texts)
        return call(self, *texts, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    monkeypatch.setattr(TextEncoder, "is_plain", True)
    texts = TextEncoder(tokenizer, 64, None)
    rows = [{"text": f"the film was {'good ' * (number % 7)}"} for number in range(NUM_ROWS)]
    samples = list(encode_rows(rows, "train", lambda row: texts.tokenize(row["text"])))
    first = 6  # to see what is put around texts, and for the first pieces
    assert len(calls) <= first + NUM_ROWS // text_module.CHECKED + 2 * (NUM_ROWS // encoding.AT_ONCE + 1)
    assert samples == [call(tokenizer, row["text"])["input_ids"] for row in rows]


def test_a_tokenizer_with_code_of_its_own_is_called(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    usual = tiny_tokenizer()

    class Upside(type(usual)):  # type: ignore[misc]
        def __call__(self, text: str, **options: Any) -> Any:
            return super().__call__(text[::-1], **options)

    upside = Upside(tokenizer_object=usual.backend_tokenizer)
    texts = TextEncoder(upside, 64, None)
    rows = [{"text": "good film"}] * 40
    assert (
        list(encode_rows(rows, "train", lambda row: texts.tokenize(row["text"]))) == [texts.tokenize("good film")] * 40
    )
    assert "Upside has code of its own" in caplog.text


def test_tokens_that_differ_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = TextEncoder(tiny_tokenizer(), 64, None)

    class Wrong:
        def encode_batch_fast(self, texts: list[str]) -> list[Any]:
            return [dataclasses.make_dataclass("Encoding", ["ids"])([1]) for _ in texts]

    monkeypatch.setattr(type(texts.tokenizer), "backend_tokenizer", Wrong())
    with pytest.raises(RuntimeError, match="makes other tokens of a text than its backend"):
        texts.tokenize_all(["good film"] * 40)


def test_progress_says_how_long_it_will_take() -> None:
    assert encoding._progress("train", 600_000, 1_000_000, 5.0) == (
        "encoding the train split: 600,000 of 1,000,000 rows, 120,000 a second, about 3 s to go"
    )
