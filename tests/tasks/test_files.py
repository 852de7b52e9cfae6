"""Local files: their cells keep every character, no line is lost, and what is wrong is refused with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mezo_dist.errors import UserError
from mezo_dist.tasks import files
from mezo_dist.tasks.files import read_file


def read(folder: Path, name: str, content: bytes | str) -> list[Any]:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    table = read_file(folder / name)
    return table.take(range(len(table)))


CELLS = ["12", "034", "007", "1e5", "NA", "null", "", "2020-01-01", "True", "1.0", " x ", "nan", "0x1F", "1_000"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_cells_keep_their_characters(tmp_path: Path, suffix: str, mark: bytes, end: str) -> None:
    between = "," if suffix == "csv" else "\t"
    lines = [between.join(("id", "text")), *(f"{number}{between}{cell}" for number, cell in enumerate(CELLS))]
    rows = read(tmp_path, f"a.{suffix}", mark + (end.join(lines) + end).encode())
    assert rows == [{"id": str(number), "text": cell} for number, cell in enumerate(CELLS)]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_json_texts_keep_their_characters(tmp_path: Path, mark: bytes, end: str) -> None:
    texts = ["2020-01-01", "2020-01-01T00:00:00Z", "12", "NA", "a\u2028b", "\u00e9"]
    lines = [f'{{"text": "{text}", "n": {number}}}' for number, text in enumerate(texts)]
    rows = read(tmp_path, "a.jsonl", mark + (end.join(lines) + end).encode())
    assert rows == [{"text": text, "n": number} for number, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '[{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]'),
        ("a.json", ' [\n {"a": 1, "b": "x"},\n {"a": 2, "b": "y"}\n]\n'),
        ("a.json", '{"a": [1, 2],\n "b": ["x", "y"]}'),
        ("a.json", '{"a": 1, "b": "x"}\n{"a": 2, "b": "y"}\n'),
        ("a.jsonl", '{"a": 1, "b": "x"}\n{"b": "y", "a": 2}'),
    ],
)
def test_the_shapes_of_json(tmp_path: Path, name: str, content: str) -> None:
    assert read(tmp_path, name, content) == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]


def test_values_of_json_stay_what_they_are(tmp_path: Path) -> None:
    content = '{"a": true, "b": {"c": [1]}}\n{"a": "x", "b": null}\n{"b": 2.0}'
    expected = [{"a": True, "b": {"c": [1]}}, {"a": "x", "b": None}, {"a": None, "b": 2.0}]
    assert read(tmp_path, "a.jsonl", content) == expected


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (['"Great', 'bad" film', '"x" y', "z"], ['"Great', 'bad" film', '"x" y', "z"]),
        (['"Great film"', "bad"], ['"Great film"', "bad"]),  # nothing says that this is more than what it is
        (['"a ""b"" c"', "bad"], ['a "b" c', "bad"]),
        (['"a\tb"', "bad"], ["a\tb", "bad"]),
        (['"a ""b"" c"', '"bad'], ['"a ""b"" c"', '"bad']),
        (['5" tall', "bad"], ['5" tall', "bad"]),
    ],
)
def test_a_quote_in_a_tsv_never_swallows_a_line(tmp_path: Path, lines: list[str], expected: list[str]) -> None:
    content = "text\tlabel\n" + "".join(f"{line}\t{number}\n" for number, line in enumerate(lines))
    rows = read(tmp_path, "a.tsv", content)
    assert rows == [{"text": text, "label": str(number)} for number, text in enumerate(expected)]


def test_a_tsv_whose_names_are_quoted(tmp_path: Path) -> None:
    assert read(tmp_path, "a.tsv", '"text"\t"label"\n"Great film"\t1\n') == [{"text": "Great film", "label": "1"}]


def test_cells_of_several_lines_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert read(tmp_path, "a.csv", 'a,b\n"x\ny",1\n\nz,2\n') == [{"a": "x\ny", "b": "1"}, {"a": "z", "b": "2"}]
    assert "a.csv: 2 rows; 1 cells hold line breaks" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", 'a,b\n"x,1\ny,2\n', "the record that starts in line 2: unexpected end of data"),
        ("a.csv", 'a,b\nx,1\n"x"y,1\n', "the record that starts in line 3: "),
        ("a.csv", "a,b\nx,1\ny\n", "line 3 has 1 cells, but the first line names 2 columns"),
        ("a.tsv", "a\tb\nx\t1\ty\n", "line 2 has 3 cells, but the first line names 2 columns"),
        ("a.csv", "a,a\nx,1\n", "two columns have the same name: ['a']"),
        ("a.csv", b"a,b\nx,1\n\xe9,2\n", "line 3 is not UTF-8 (byte 0xe9): convert it, for instance with `iconv -f l"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\x80"}\n', "line 2 is not UTF-8 (byte 0x80)"),
        ("a.tsv", "a\tb\nx\t1\n".encode("utf-16"), "it is UTF-16, not UTF-8: convert it"),
        ("a.jsonl", '{"a": "x"}\n{"a": "\\ud800"}', "line 2: a text holds half a character"),
        ("a.jsonl", '{"a": 1}\n7\n', "row 2 is no object with fields but '7'"),
        ("a.json", "[" * 100_000, "maximum recursion depth exceeded"),
        ("a.json", '{"a": [1, 2],\n "b": [1]}', "its columns differ in length"),
        ("a.jsonl", '{"a": 1}\n{"a": 2, }\n', "line 2: "),
        ("a.jsonl", '{"a": 1}, {"a": 2}\n{"a": 3}\n', "line 1: Extra data"),
        ("a.jsonl", '{"b": 0}\n{"a": [1\n2]}\n{"a": 1}, {"a": 2}\n', "line 2: "),
        ("a.jsonl", '{"b": 0}\n{"a": 1\n"b": 2}\n{}, {}\n', "line 2: "),
        ("a.jsonl", '{"a": 1}\n\ufeff{"a": 1}', "line 2: Unexpected UTF-8 BOM"),
        ("a.jsonl", '{"a": 1}\n' + '{"a":' * 100_000, "maximum recursion depth exceeded"),
    ],
)
def test_what_is_wrong_is_refused_with_its_line(tmp_path: Path, name: str, content: bytes | str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, name, content)
    kind = name[2:].replace("jsonl", "json")
    assert str(caught.value).startswith(f"task.data: cannot read {tmp_path / name} as {kind}: {expected}")


def test_both_halves_of_a_character(tmp_path: Path) -> None:
    assert read(tmp_path, "a.jsonl", '{"a": "\\ud83d\\ude00"}') == [{"a": "\U0001f600"}]


def test_lines_of_json_are_read_together_as_they_are_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        '{"a": "x"}',
        ' {"a": 1.5e3} \t',
        '{"a": "\\ud83d\\ude00"}',
        '{"a": [NaN, "\\u00e9"]}',
        '{"a": {"a": null}}',
        "{}",
    ]
    monkeypatch.setattr(files, "LINES_AT_ONCE", 4)  # every other one is empty
    one_by_one: list[str] = []
    load = files._loaded

    def counted(line: str, where: str) -> Any:
        one_by_one.append(line)
        return load(line, where)

    monkeypatch.setattr(files, "_loaded", counted)
    rows = read(tmp_path, "a.jsonl", "\n\n".join(lines * 2))
    assert repr(rows) == repr([{"a": None} | json.loads(line) for line in lines * 2])
    assert one_by_one == lines[2:4] * 2, "those with an escape that may be half a character"


def test_a_long_cell(tmp_path: Path) -> None:
    assert read(tmp_path, "a.csv", "a\n" + "x" * 200_000 + "\n") == [{"a": "x" * 200_000}]


def test_rows_that_share_no_fields_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its 2000 rows have 2000 different fields"):
        read(tmp_path, "a.jsonl", "".join(f'{{"k{number}": 1}}\n' for number in range(2000)))
