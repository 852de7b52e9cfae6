"""Data sets: files and folders become rows, rows become splits."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from mezo_dist.config.task import Split, Splits
from mezo_dist.config.values import Where
from mezo_dist.errors import UserError
from mezo_dist.tasks.rows import load_rows, uses_cache
from tests.tasks.encoders import task

ROWS = [{"text": f'review "{i}", with a comma', "label": i % 2, "stars": str(i)} for i in range(12)]


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


# Files


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows))


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_tsv(path: Path, rows: list[dict[str, Any]]) -> None:
    write_csv(path, rows, "\t")


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    datasets.Dataset.from_list(rows).to_parquet(path)


def write_arrow(path: Path, rows: list[dict[str, Any]]) -> None:
    folder = path.with_suffix(".saved")
    datasets.Dataset.from_list(rows).save_to_disk(folder)
    next(folder.glob("*.arrow")).rename(path)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "jsonl": write_jsonl,
    "json": write_json,
    "csv": write_csv,
    "tsv": write_tsv,
    "parquet": write_parquet,
    "arrow": write_arrow,
}


def texts(rows: list[Any]) -> list[str]:
    return [row["text"] for row in rows]


@pytest.mark.parametrize("suffix", WRITERS)
def test_one_file_of_each_type(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"some [odd] name*.{suffix}"
    WRITERS[suffix](path, ROWS)
    rows = load_rows(task(data=str(path)))
    assert [len(rows.train), len(rows.validation), len(rows.test)] == [5, 3, 4]
    every = [*rows.train, *rows.validation, *rows.test]
    assert sorted(texts(every)) == sorted(texts(ROWS))
    labels = [ROWS[int(row["stars"])]["label"] for row in every]
    assert [row["label"] for row in every] == ([str(label) for label in labels] if suffix in ("csv", "tsv") else labels)


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_folder_of_files_named_after_their_splits(tmp_path: Path, suffix: str) -> None:
    WRITERS[suffix](tmp_path / f"train.{suffix}", ROWS[:6])
    WRITERS[suffix](tmp_path / f"held-out.{suffix}", ROWS[6:])
    (tmp_path / "README.md").write_text("not data")
    splits = Splits(Split("train"), Split("held-out", 2), Split("held-out"))
    rows = load_rows(task(data=str(tmp_path), splits=splits))
    assert sorted(texts(rows.train)) == sorted(texts(ROWS[:6]))
    assert sorted(texts([*rows.validation, *rows.test])) == sorted(texts(ROWS[6:]))
    assert len(rows.validation) == 2


@pytest.mark.parametrize("with_splits", [False, True])
def test_a_data_set_saved_by_datasets(tmp_path: Path, with_splits: bool) -> None:
    data = datasets.Dataset.from_list(ROWS)
    (datasets.DatasetDict({"all": data}) if with_splits else data).save_to_disk(tmp_path / "saved")
    source = "all" if with_splits else "train"
    rows = load_rows(
        task(data=str(tmp_path / "saved"), splits=Splits(Split(source, 5), Split(source, 3), Split(source)))
    )
    assert sorted(texts([*rows.train, *rows.validation, *rows.test])) == sorted(texts(ROWS))


def test_csv_keeps_words_that_pandas_takes_for_missing(tmp_path: Path) -> None:
    words = ["NA", "null", "nan", "None", ""]
    write_csv(tmp_path / "a.csv", [{"text": word, "label": i} for i, word in enumerate(words)])
    splits = Splits(Split("train", 3), Split("train", 1), Split("train"))
    rows = load_rows(task(data=str(tmp_path / "a.csv"), splits=splits))
    texts = {int(row["label"]): row["text"] for row in (*rows.train, *rows.validation, *rows.test)}
    assert texts == dict(enumerate(words))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("gone.jsonl", None, "file {path} does not exist"),
        ("empty.jsonl", b"", "{path} is empty"),
        ("blank.jsonl", b"\n\n", "cannot read {path} as json: it has no rows"),
        ("header.csv", b"text,label\n", "cannot read {path} as csv: it has no rows"),
        ("torn.jsonl", b'{"a": 1}\n{"a": \n', "cannot read {path} as json: "),
        ("text.parquet", b"hello", "cannot read {path} as parquet: "),
        ("latin.csv", b"text,label\n\xff\xfe,1\n", "cannot read {path} as csv: "),
        ("notes.txt", b"hello", "{path} is no file ending in .jsonl, .json, "),
        ("folder/notes.txt", b"hello", "folder {folder} has no file ending in .jsonl, .json, "),
        ("saved/state.json", b"{}", "cannot read the data set saved in {folder}: "),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes | None, expected: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if content is not None:
        path.write_bytes(content)
    data = path if path.parent == tmp_path else path.parent
    with pytest.raises(UserError) as caught:
        load_rows(task(data=str(data)))
    assert str(caught.value).startswith("task.data: " + expected.format(path=path, folder=path.parent))


def test_text_that_is_not_utf8_and_that_the_reader_lets_pass(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"text": "\x80", "label": 0}\n' * 20)
    with pytest.raises(UserError, match=r"task\.data: .*latin\.jsonl.*(UTF-8|Invalid)"):
        load_rows(task(data=str(path)))


def test_a_folder_of_mixed_types(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_csv(tmp_path / "train.csv", ROWS)
    with pytest.raises(UserError, match=r"task\.data: folder .* mixes file types \['\.csv', '\.jsonl'\]; keep one"):
        load_rows(task(data=str(tmp_path)))


@pytest.mark.parametrize("name", ["some/never-published-data-set", "no such name!", "a/b/c"])
def test_a_hub_name_that_does_not_load(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=rf"task\.data: '{name}' is no local file, no demo data set, and the hub did"):
        load_rows(task(data=name))


# Splits


@pytest.fixture
def data(tmp_path: Path) -> str:
    write_jsonl(tmp_path / "data.jsonl", ROWS)
    return str(tmp_path / "data.jsonl")


def test_splits_are_a_function_of_their_seed(data: str) -> None:
    first = load_rows(task(data=data))
    assert load_rows(task(data=data)) == first
    splits = dataclasses.replace(task().splits, seed=1)
    assert texts(load_rows(task(data=data, splits=splits)).train) != texts(first.train)


def test_splits_of_one_source_are_cut_one_after_another_from_one_permutation(data: str) -> None:
    rows = load_rows(task(data=data))
    order = texts([*rows.train, *rows.validation, *rows.test])
    assert len(set(order)) == 12
    assert order != texts(ROWS)  # shuffled
    for sizes in ((1, 1, 10), (9, 2, 1), (3, 3, None)):
        train, validation, test = (Split("train", size) for size in sizes)
        cut = load_rows(task(data=data, splits=Splits(train, validation, test)))
        assert texts([*cut.train, *cut.validation, *cut.test]) == order
        assert [len(cut.train), len(cut.validation)] == list(sizes[:2])


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        ((Split("train", 5), Split("train", 3), Split("train", 5)), "task.splits.test.size: 5 samples wanted, but "),
        ((Split("train", 13), Split("train", 3), Split("train", 4)), "task.splits.train.size: 13 samples wanted, but "),
        (
            (Split("train", 13), Split("train", 3), Split("train", 4)),
            "has 12; make a split smaller, as in --task.splits",
        ),
        ((Split("train"), Split("train", 1), Split("train", 1)), "which 12 are taken by the splits before; make a"),
        ((Split("train", 5), Split("train", 7), Split("train")), "task.splits.test.size: some samples wanted, but "),
        ((Split("train", 5), Split("dev"), Split("test")), "task.splits.validation.source: "),
        ((Split("train", 5), Split("dev"), Split("test")), "has no split 'dev', only ['train']"),
    ],
)
def test_too_few_rows(data: str, splits: tuple[Split, Split, Split], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_rows(task(data=data, splits=Splits(*splits)))
    assert expected in str(caught.value)


def test_images_and_sounds_stay_undecoded(tmp_path: Path) -> None:
    """A picture may be a bomb, and a task's prompt has no use for one."""
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.Value("int64"), "picture": datasets.Image()}
    )
    picture = {"bytes": b"no picture at all", "path": None}
    rows = {"text": [r["text"] for r in ROWS], "label": [r["label"] for r in ROWS], "picture": [picture] * len(ROWS)}
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(tmp_path / "data.parquet")
    assert datasets.load_dataset("parquet", data_files=str(tmp_path / "data.parquet"))["train"].features == features
    assert load_rows(task(data=str(tmp_path / "data.parquet"))).train[0]["picture"] == picture


def test_a_file_with_other_rows_of_the_same_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    write_jsonl(path, ROWS)
    before, stat = load_rows(task(data=str(path))), path.stat()
    write_jsonl(path, [row | {"label": 1 - i % 2} for i, row in enumerate(ROWS)])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    after = load_rows(task(data=str(path)))
    assert [row["label"] for row in after.train] == [1 - row["label"] for row in before.train]


# Which rows count


def where_task(data: str, **conditions: Any) -> Any:
    return task(
        data=data, where=Where(**conditions), splits=Splits(Split("train", 1), Split("train", 1), Split("train"))
    )


def stars(rows: Any) -> list[int]:
    return sorted(int(row["stars"]) for row in (*rows.train, *rows.validation, *rows.test))


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({"keep": {"label": (1,)}}, [1, 3, 5, 7, 9, 11]),
        ({"keep": {"label": ("1",)}}, [1, 3, 5, 7, 9, 11]),
        ({"drop": {"label": (0,)}}, [1, 3, 5, 7, 9, 11]),
        ({"keep": {"label": (1,), "stars": (1, 2, 3, 5)}}, [1, 3, 5]),
        ({"keep": {"label": (1, 0)}, "drop": {"stars": ("0", 1, 2)}}, list(range(3, 12))),
        ({"drop": {"stars": (12,)}}, list(range(12))),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_rows_are_kept_and_dropped_by_their_values(
    tmp_path: Path, suffix: str, conditions: dict[str, Any], expected: list[int]
) -> None:
    WRITERS[suffix](tmp_path / f"data.{suffix}", ROWS)
    assert stars(load_rows(where_task(str(tmp_path / f"data.{suffix}"), **conditions))) == expected


def test_too_few_rows_are_left(data: str) -> None:
    with pytest.raises(
        UserError, match=r"split 'train' has 2 that task\.where leaves, of which 2 are taken by the split"
    ):
        load_rows(where_task(data, keep={"stars": (1, 2)}))


def test_what_is_left_out_is_told(data: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    load_rows(where_task(data, drop={"stars": (3, 5), "label": (0,)}))
    assert (
        f"task.where leaves 4 of the 12 rows of split 'train' of {data}; left out: 6 with label: 0; 1 with stars: 3; "
        "1 with stars: 5"
    ) in caplog.text


def test_splits_are_cut_from_what_is_left(tmp_path: Path, data: str) -> None:
    """As from a file that has nothing but these rows."""
    write_jsonl(tmp_path / "less.jsonl", [row for row in ROWS if row["label"] == 1])
    less = load_rows(where_task(str(tmp_path / "less.jsonl")))
    assert load_rows(where_task(data, keep={"label": (1,)})) == less


def test_booleans_nulls_and_nested_fields(tmp_path: Path) -> None:
    cells = [{"ok": True}, {"ok": False}, {"ok": None}, {"ok": True}, {"ok": "true"}]
    write_jsonl(tmp_path / "a.jsonl", [{"stars": str(i), "in": cell} for i, cell in enumerate(cells)])
    name = str(tmp_path / "a.jsonl")
    assert stars(load_rows(where_task(name, keep={"in.ok": (True,)}))) == [0, 3, 4]
    assert stars(load_rows(where_task(name, drop={"in.ok": (None,)}))) == [0, 1, 3, 4]


def test_classes_go_by_their_names(tmp_path: Path) -> None:
    names = ["entailment", "neutral", "contradiction"]
    features = datasets.Features({"stars": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    labels = [0, 1, 2, -1, 0, None]
    rows = {"stars": [str(i) for i in range(6)], "label": labels}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features=features)}).save_to_disk(tmp_path / "a")
    name = str(tmp_path / "a")
    assert stars(load_rows(where_task(name, keep={"label": ("neutral", "contradiction", -1)}))) == [1, 2, 3]
    assert stars(load_rows(where_task(name, drop={"label": (1, "contradiction", None)}))) == [0, 3, 4]
    kept = load_rows(where_task(name, drop={"label": (None,)})).test
    assert {repr(row["label"]) for row in kept} <= {"0", "1", "2", "-1"}


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({"keep": {"lable": (0,)}}, "task.where.keep: there is no field 'lable', only ['label', 'stars', 'text']"),
        ({"drop": {"text.label": (0,)}}, "task.where.drop: there is no field 'text.label', only "),
        ({"keep": {"label": (7,)}}, "task.where: it leaves no row of split 'train' of "),
    ],
)
def test_conditions_that_cannot_be(data: str, conditions: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_rows(where_task(data, **conditions))
    assert str(caught.value).startswith(expected)


def test_nulls_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": None if i % 3 else "x", "label": 0, "note": None} for i in range(12)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    splits = Splits(Split("train", 10), Split("train", 1), Split("train", 1))
    train = load_rows(task(data=str(tmp_path / "a.jsonl"), splits=splits)).train
    count = sum(row["text"] is None for row in train)
    assert f"fields that are null, of the 10 rows of the train split: text in {count}\n" in caplog.text


@pytest.mark.parametrize(
    "used",
    [
        {"prompt": "{{ text }} {{ note }} {{ answer }}"},
        {"prompt": "{{ text }} {{ row.note }} {{ answer }}"},
        {"prompt": "{{ text }} {{ note.inside['deep'] }} {{ answer }}"},
        {"prompt": "{{ text }} {% if row['note'] %}{{ text }}{% endif %} {{ answer }}"},
        {"plain": ("{{ text }}", "{{ note | default('') }}")},
        {"label": "note"},
        {"truncate": ("note.inside",)},
    ],
)
def test_only_fields_that_the_task_reads_are_counted(
    used: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": 0, "note": None, "other": None}] * 3)
    splits = Splits(Split("train", 1), Split("train", 1), Split("train", 1))
    load_rows(task(data=str(tmp_path / "a.jsonl"), splits=splits))
    assert "null" not in caplog.text
    load_rows(task(data=str(tmp_path / "a.jsonl"), splits=splits, **used))
    assert "of the 1 rows of the train split: note in 1\n" in caplog.text


@pytest.mark.parametrize(
    ("name", "expected"),
    [("glue", True), ("a/b", True), ("data.csv", False), ("data.parquet", True), ("demo:movie-sentences", False)],
)
def test_which_data_are_in_a_cache_that_ranks_may_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, expected: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "data.csv", ROWS)
    write_parquet(tmp_path / "data.parquet", ROWS)
    assert uses_cache(task(data=name)) is expected


FORGOTTEN: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({"plain": ("text",)}, "task.plain: 'text' names no field"),
    "prompt": ({"prompt": "text It was {{ answer }}"}, "task.prompt: 'text It was {{ answer }}' names no field"),
}


@pytest.mark.parametrize("case", FORGOTTEN)
def test_a_text_without_a_field_is_refused(case: str, tmp_path: Path) -> None:
    """Else all samples would be one text, and a run would learn nothing without a word."""
    options, message = FORGOTTEN[case]
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(UserError, match=re.escape(message)):
        load_rows(dataclasses.replace(task(data=str(tmp_path / "rows.jsonl")), **options))
