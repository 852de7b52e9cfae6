"""Messages that name fields of the data: short, however many there are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mezo_dist.config.task import Split, Splits
from mezo_dist.errors import UserError
from mezo_dist.tasks.encoding import encode_rows
from mezo_dist.tasks.fields import keys_of, listed, lookup, replaced, shown
from mezo_dist.tasks.rows import load_rows
from mezo_dist.tasks.text import TextEncoder, render_row
from mezo_dist.testing import tiny_tokenizer
from tests.tasks.encoders import task
from tests.tasks.test_choice import kind

WIDE: dict[str, Any] = {f"a column with a rather long name, number {n}": "x" for n in range(50_000)}
NESTED = {"inner": WIDE, "text": "x", "label": 0}
MANY = [f"option {n}" * 20 for n in range(5_000)]
CALLS: dict[str, Callable[[], object]] = {
    "a field that is not there": lambda: lookup(WIDE, "text", "task.label"),
    "one inside others": lambda: lookup(NESTED, "inner.text", "task.label"),
    "a template": lambda: render_row("{{ text }}", WIDE),
    "truncation": lambda: TextEncoder(tiny_tokenizer(), 9, ("inner",)).fit(NESTED, lambda _: ()),
    "options": lambda: kind().right_options({"label": "none"}, MANY),
    "a sample": lambda: list(encode_rows([WIDE], "train", lambda row: lookup(row, "text", "task.label"))),
}


@pytest.mark.parametrize("name", CALLS)
def test_messages_are_short(name: str) -> None:
    with pytest.raises(UserError) as caught:
        CALLS[name]()
    assert len(str(caught.value)) < 4_000
    assert "more" in str(caught.value)


def test_so_are_those_about_files(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",".join([*WIDE, *WIDE]).replace("name, number", "name number") + "\n")
    splits = Splits(Split(size=1), Split("train", 1), Split("train", 1))
    with pytest.raises(UserError, match=r"two columns have the same name: .* and 49,980 more") as caught:
        load_rows(task(data=str(tmp_path / "a.csv"), splits=splits))
    assert len(str(caught.value)) < 4_000


def test_values_are_cut() -> None:
    assert listed(["a", 1]) == "['a', '1']"
    assert len(listed(["a" * 999] * 30)) < 2_000
    assert shown([0, "a" * 999]).startswith("[0, 'aaa")
    assert len(shown(["a" * 999] * 30)) < 2_000


def test_names_with_dots_are_found_at_any_depth() -> None:
    row = {"a": {"b.c": {"d": 1}}, "a.b": {"e": 2}, "x.y": 3}
    for name, keys, value in (("a.b.c.d", ["a", "b.c", "d"], 1), ("a.b.e", ["a.b", "e"], 2), ("x.y", ["x.y"], 3)):
        assert keys_of(row, name, "") == keys
        assert lookup(row, name, "") == value
        assert lookup(replaced(row, name, 7), name, "") == 7
        assert lookup(row, name, "") == value
    with pytest.raises(UserError, match=r"task.label: there is no field 'a.b.z'"):
        lookup(row, "a.b.z", "task.label")
