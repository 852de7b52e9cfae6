"""What data look like, on rows like those of known data sets."""

from __future__ import annotations

from typing import Any

import pytest

from mezo_dist.config.values import ClassIndex
from mezo_dist.errors import UserError
from mezo_dist.tasks.guess import Guess, guess

TEXTS = [f"this is sentence {i} of many" for i in range(12)]
REPLIES = [f"reply number {i}" for i in range(12)]


def rows(**columns: list[Any]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        (
            {"id": list(range(12)), "review": TEXTS, "stars": ["bad", "good"] * 6},
            Guess("classification", ("review",), "stars", classes=("bad", "good")),
        ),
        (
            {"premise": TEXTS, "hypothesis": REPLIES, "label": [0, 1, 2] * 4},
            Guess("classification", ("premise", "hypothesis"), "label", classes=(0, 1, 2)),
        ),
        (
            {"question": TEXTS, "passage": REPLIES, "answer": [True, False] * 6},
            Guess("classification", ("question", "passage"), "answer", classes=(False, True)),
        ),
        (
            {"text": TEXTS, "label": [ClassIndex(i % 2, ["down", "up"][i % 2]) for i in range(12)]},
            Guess("classification", ("text",), "label", classes=(0, 1), names={0: "down", 1: "up"}),
        ),
        (
            {"source": ["web", "book"] * 6, "question": TEXTS, "answer": REPLIES},
            Guess("completion", ("question",), "answer"),
        ),
        (
            {"instruction": TEXTS, "input": ["", "of this"] * 6, "output": REPLIES},
            Guess("completion", ("instruction", "input"), "output"),
        ),
        ({"text": TEXTS}, Guess("completion", (), "text")),
        ({"title": REPLIES, "body": [9 * text for text in TEXTS]}, Guess("completion", (), "body")),
        ({"messages": [[{"role": "user", "content": "hi"}]] * 12}, Guess("completion", (), conversation="messages")),
        (
            {"data": [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)]},
            Guess("classification", ("data.text",), "data.label", classes=(0, 1)),
        ),
        (
            {"text": TEXTS, "label": [0, 1, None] * 4},
            Guess("classification", ("text",), "label", classes=(0, 1), has_gaps=True),
        ),
    ],
)
def test_what_data_look_like(columns: dict[str, list[Any]], wanted: Guess) -> None:
    assert guess(rows(**columns)) == wanted


def test_numbers_that_are_nearly_all_different_are_no_classes() -> None:
    assert guess(rows(text=TEXTS, score=[i // 2 for i in range(12)])).kind == "completion"


def test_data_without_texts() -> None:
    with pytest.raises(UserError, match=r"no field holds texts, among \['a', 'b'\]"):
        guess(rows(a=list(range(12)), b=[0.5] * 12))
