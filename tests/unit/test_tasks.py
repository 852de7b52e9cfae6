"""Tasks: files become rows and splits, rows become prompts, prompts become tokens, predictions become metrics."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mezo_dist.errors import UserError
from mezo_dist.tasks.load import load_rows
from mezo_dist.tasks.metrics import measure
from mezo_dist.tasks.prompts import Encoder, Kind, Sample
from mezo_dist.tasks.task import Label, Metric, Split, Splits, Task
from mezo_dist.testing import tiny_tokenizer

ROWS = [{"text": f'review "{i}", with a comma', "label": i % 2, "stars": str(i)} for i in range(12)]
LABELS = (Label(0, "terrible"), Label(1, "great"))


def task(**changes: Any) -> Task:
    splits = Splits(Split("train", 5), Split("train", 3), Split("train", 4))
    base = Task("reviews", "nowhere", "{{ text }} It was {{ answer }}", LABELS, splits=splits)
    return dataclasses.replace(base, **changes)


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
    assert all(row["label"] == ROWS[int(row["stars"])]["label"] for row in every)


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
    assert {row["label"]: row["text"] for row in (*rows.train, *rows.validation, *rows.test)} == dict(enumerate(words))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("gone.jsonl", None, "file {path} does not exist (relative paths start at "),
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


# Tokenisers: three ways of treating the space before a word

SENTENCES = [
    "the film was great",
    "the plot was terrible",
    "It was great",
    "It was terrible",
    "Is the film good ? yes",
    "Is the plot good ? no",
]


def byte_level() -> Any:
    """As of GPT-2 and RoBERTa: the space belongs to the word after it, and a bare word is another token."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(SENTENCES * 9, trainer)
    core.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True, special=True)])  # as RoBERTa's
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", pad_token="<pad>", mask_token="<mask>")


def metaspace() -> Any:
    """As of Llama and T5 (sentencepiece): a mark for the space, before the first word too; and a first token."""
    core = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "<pad>", "<mask>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    core.train_from_iterator(SENTENCES * 9, trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", pad_token="<pad>", mask_token="<mask>"
    )


TOKENIZERS = {"byte-level": byte_level(), "metaspace": metaspace(), "word-level": tiny_tokenizer()}
SPACE = {"byte-level": "\u0120", "metaspace": "\u2581", "word-level": ""}


def encoder(kind: Kind = "causal", tokenizer: str = "word-level", window: int = 64, **changes: Any) -> Encoder:
    return Encoder(task(**changes), TOKENIZERS[tokenizer], kind, window)


def one(encoder: Encoder, **fields: Any) -> Sample:
    (sample,) = encoder.encode([{"label": 0, **fields}], "train")
    return sample


def fault(encoder: Encoder, **fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        one(encoder, **fields)
    return str(caught.value)


# Prompts


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_a_causal_prompt_stops_where_the_answer_goes(tokenizer: str) -> None:
    sample = one(encoder(tokenizer=tokenizer), text="the film", label=1)
    ids = TOKENIZERS[tokenizer]("the film It was")["input_ids"]
    assert sample == Sample(tuple(ids), label=1, position=len(ids) - 1)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_a_masked_prompt_has_its_mask_anywhere(tokenizer: str) -> None:
    made = encoder("masked", tokenizer, prompt="{{ text }} It was {{ answer }} .")
    sample = one(made, text="the film", label=1)
    mask = TOKENIZERS[tokenizer].mask_token_id
    assert sample.ids == tuple(TOKENIZERS[tokenizer]("the film It was<mask> .")["input_ids"])
    assert [i for i, token in enumerate(sample.ids) if token == mask] == [sample.position]


def test_a_classifier_reads_text_without_prompt() -> None:
    made = encoder("classifier", plain=("{{ text }}",))
    assert one(made, text="the film").ids == tuple(TOKENIZERS["word-level"]("the film")["input_ids"])
    assert one(made, text="the film").position == -1


def bert_like() -> Any:
    """Marks the two texts of a pair, as BERT's tokeniser does."""
    core = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "b": 4}, "[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def test_a_classifier_reads_a_pair_of_texts() -> None:
    made = Encoder(task(plain=("{{ premise }}", "{{ hypothesis }}")), bert_like(), "classifier", 8)
    sample = one(made, premise="a a", hypothesis="b")
    assert sample.ids == (1, 3, 3, 2, 4, 2)
    assert sample.types == (0, 0, 0, 0, 1, 1)
    long = one(made, premise="a a a a a a a", hypothesis="b b b")
    assert len(long.ids) == 8
    assert {3, 4} <= set(long.ids)  # neither text is lost


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_template_filters_and_conditions_work(kind: Kind) -> None:
    prompt = "{% if title %}{{ title | lower }} : {% endif %}{{ text }} It was {{ answer }}"
    made = encoder(kind, prompt=prompt)
    words = TOKENIZERS["word-level"].convert_ids_to_tokens(one(made, text="a film", title="THE PLOT").ids)
    assert words[:2] == ["the", "plot"]
    assert one(made, text="a film", title="") == one(encoder(kind), text="a film")


@pytest.mark.parametrize(
    ("changes", "fields", "expected"),
    [
        ({"prompt": "{{ txet }} {{ answer }}"}, {}, "'txet' is undefined (the fields are ['label', 'text'])"),
        ({"prompt": "{{ text {{ answer }}"}, {}, "task template '{{ text {{ answer }}': "),
        ({"prompt": "{{ text + 1 }} {{ answer }}"}, {}, "task template "),
        ({"prompt": "{{ 1 // 0 }} {{ answer }}"}, {}, "division"),
        ({"prompt": "{{ text }} {{ answer }} {{ answer }}"}, {}, "{{ answer }} must occur exactly once"),
        ({"prompt": "the answer to {{ text }}"}, {}, "{{ answer }} must occur exactly once"),
        (
            {"prompt": "{{ text }} {{ answer }} ."},
            {},
            "{{ answer }} must come last for a causal model, not before ' .'",
        ),
        ({}, {"text": None}, "a field that it prints is null"),
        ({}, {"label": 2}, "task.labels: the label is '2', the task knows ['0', '1']; add it or leave the row out"),
        ({}, {"label": None}, "task.labels: the label is 'None', the task knows"),
        ({"label": "stars"}, {}, "task.label: there is no field 'stars', only ['label', 'text']"),
    ],
)
def test_bad_rows_and_templates(changes: dict[str, Any], fields: dict[str, Any], expected: str) -> None:
    message = fault(encoder(**changes), **{"text": "a film", **fields})
    assert message.startswith("train sample 0, {'label': ")
    assert expected in message


def test_a_bad_row_is_told_apart_from_the_good_ones() -> None:
    rows: list[dict[str, Any]] = [{"text": "a film", "label": 0}, {"text": "a plot", "label": "?"}]
    with pytest.raises(UserError, match=r"^test sample 1, \{'label': '\?', 'text': 'a plot'\}: task\.labels: "):
        encoder().encode(rows, "test")


def test_masks_and_placeholders_in_the_text() -> None:
    assert "2 mask tokens where one is needed (is one in the text?)" in fault(encoder("masked"), text="a <mask> film")
    assert one(encoder(), text="a \ufffc film").label == 0  # the web is full of object replacement characters


def test_an_empty_text_for_a_classifier() -> None:
    assert "task.plain: the text is empty; leave the row out" in fault(
        encoder("classifier", plain=("{{ text }}",)), text=""
    )


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ text.__init__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ text.format.__self__.__class__ }}",
        "{{ '{0.__class__}'.format(text) }}",
        "{{ tags.append('x') }}",
        "{% include '/etc/passwd' %}",
        "{{ range(999999999) | list }}",
    ],
)
def test_templates_are_boxed_in(attack: str) -> None:
    made = encoder(prompt=attack + "{{ text }} {{ answer }}")
    row = {"text": "a film", "tags": ["y"]}
    message = fault(made, **row)
    assert "task template" in message
    assert row["tags"] == ["y"]


# Label words


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("kind", ["causal", "masked"])
@pytest.mark.parametrize("prompt", ["{{ text }} It was {{ answer }}", "{{ text }} {{ answer }}"])
def test_label_words_are_found_as_they_stand_in_the_prompt(tokenizer: str, kind: Kind, prompt: str) -> None:
    made = encoder(kind, tokenizer, prompt=prompt)
    ids = made.label_ids({"text": "the film", "label": 0})
    expected = [SPACE[tokenizer] + "terrible", SPACE[tokenizer] + "great"]
    assert made.tokenizer.convert_ids_to_tokens(ids) == expected


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_the_label_token_continues_the_prompt_as_the_filled_in_text_does(tokenizer: str) -> None:
    made = encoder(tokenizer=tokenizer)
    row = {"text": "the film", "label": 1}
    for word, token in zip(("terrible", "great"), made.label_ids(row), strict=True):
        assert [*one(made, **row).ids, token] == made.tokenizer(f"the film It was {word}")["input_ids"]


def test_a_label_word_without_space_before_it_is_another_token() -> None:
    made = encoder(
        tokenizer="byte-level", prompt="{{ text }} It was:{{ answer }}", labels=(Label(0, "t"), Label(1, "g"))
    )
    assert made.tokenizer.convert_ids_to_tokens(made.label_ids({"text": "a", "label": 0})) == ["t", "g"]


def test_label_words_are_found_even_if_the_text_fills_the_window() -> None:
    made = encoder(tokenizer="byte-level", window=8)
    assert made.label_ids({"text": "the film was great " * 9, "label": 0}) == encoder(tokenizer="byte-level").label_ids(
        {"text": "the film", "label": 0}
    )


@pytest.mark.parametrize("kind", ["causal", "masked"])
@pytest.mark.parametrize(
    ("tokenizer", "words", "expected"),
    [
        ("byte-level", ("terrible", "magnificent"), "task.labels: 'magnificent' is not one token after this prompt"),
        ("metaspace", ("terrible", "great film"), "task.labels: 'great film' is not one token after this prompt"),
        ("word-level", ("terrible", "magnificent"), "task.labels: 'magnificent' is not one token after this prompt"),
        ("word-level", ("terrible", "terrible "), "task.labels: 'terrible' and 'terrible ' are the same token"),
        ("word-level", ("terrible", ""), "task.labels: '' is not one token after this prompt"),
    ],
)
def test_bad_label_words(kind: Kind, tokenizer: str, words: tuple[str, str], expected: str) -> None:
    labels = tuple(Label(value, word) for value, word in enumerate(words))
    with pytest.raises(UserError) as caught:
        encoder(kind, tokenizer, labels=labels).label_ids({"text": "the film", "label": 0})
    assert str(caught.value).startswith(expected)


# Too long


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("kind", ["causal", "masked"])
@pytest.mark.parametrize("window", [12, 17, 30])
def test_a_long_text_is_cut_and_the_rest_of_the_prompt_stays(tokenizer: str, kind: Kind, window: int) -> None:
    prompt = "{{ text }} Is the {{ what }} good ? {{ answer }}"
    made = encoder(kind, tokenizer, window, prompt=prompt)
    rest = {"what": "film"}
    long, short = one(made, text="the plot  was great and " * 20, **rest), one(made, text="x", **rest)
    question = made.tokenizer(" Is the film good ?" + ("<mask>" if kind == "masked" else ""), add_special_tokens=False)
    tail = tuple(question["input_ids"])
    if tokenizer == "metaspace":  # puts a mark before a first space too
        tail = tail[1:] if made.tokenizer.convert_ids_to_tokens(tail[0]) == SPACE[tokenizer] else tail
    assert short.ids[-len(tail) :] == tail
    assert long.ids[-len(tail) :] == tail
    assert window - 3 <= len(long.ids) <= window
    head = made.tokenizer("the plot  was great and " * 20)["input_ids"][: len(long.ids) - len(tail) - 1]
    assert list(long.ids[: len(head)]) == head


def space_runs() -> Any:
    """As of the first Llamas: characters and spaces alike, and two spaces in a row are one token."""
    letters = {letter: number for number, letter in enumerate(["<unk>", "\u2581\u2581", "\u2581", *"abcIt"])}
    core = tokenizers.Tokenizer(models.BPE(letters, [("\u2581", "\u2581")], unk_token="<unk>"))
    core.normalizer = normalizers.Replace(" ", "\u2581")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


@pytest.mark.parametrize("window", range(5, 12))
def test_a_cut_text_leaves_no_space_that_would_join_what_follows(window: int) -> None:
    made = Encoder(task(prompt="{{ text }} It {{ answer }}"), space_runs(), "causal", window)
    words = made.tokenizer.convert_ids_to_tokens(one(made, text="ab c ab c ab c ab c").ids)
    assert words[-3:] == ["\u2581", "I", "t"]
    assert words[:2] == ["a", "b"]


def test_of_several_fields_the_longest_is_cut() -> None:
    made = encoder(prompt="{{ a }} . {{ b }} . It was {{ answer }}", truncate=("a", "b"), window=20)
    sample = one(made, a="film " * 40, b="plot " * 3)
    words = made.tokenizer.convert_ids_to_tokens(sample.ids)
    assert words == ["film"] * 13 + ["."] + ["plot"] * 3 + [".", "It", "was"]


def test_both_of_two_long_fields_are_cut() -> None:
    made = encoder(prompt="{{ a }} . {{ b }} . It was {{ answer }}", truncate=("a", "b"), window=12)
    words = made.tokenizer.convert_ids_to_tokens(one(made, a="film " * 30, b="plot " * 31).ids)
    assert len(words) <= 12
    assert words[-3:] == [".", "It", "was"]


def test_what_fits_exactly_is_left_alone() -> None:
    text = "film " * 30
    whole = one(encoder(window=64), text=text)
    assert one(encoder(window=len(whole.ids)), text=text) == whole
    assert len(one(encoder(window=len(whole.ids) - 1), text=text).ids) == len(whole.ids) - 1


@pytest.mark.parametrize("character", ["\U0001f600", "\u00e9", "\u4e2d"])
def test_characters_of_several_tokens_are_cut_whole(character: str) -> None:
    made = encoder(tokenizer="byte-level", window=16)
    sample = one(made, text=character * 40)
    text = made.tokenizer.decode(sample.ids)
    assert "\ufffd" not in text
    assert text.startswith(character)
    assert text.endswith(" It was")


def test_a_prompt_too_long_even_without_its_text() -> None:
    message = fault(encoder(window=4, prompt="{{ text }} Is the film good ? {{ answer }}"), text="a film")
    assert "task.prompt: it needs 5 tokens even without the text of ['text'] (task.truncate), but " in message
    assert "train.max_tokens, or else the model's window, is 4" in message
    assert "even without the text of []" in fault(encoder(window=4, truncate=()), text="a a a a")


class Slow:
    """A tokeniser without offsets, as those written in Python are."""

    is_fast = False

    def __init__(self, fast: Any) -> None:
        self.fast = fast

    def __call__(self, text: str, **options: Any) -> Any:
        assert "return_offsets_mapping" not in options
        return self.fast(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fast, name)


def test_a_long_text_is_cut_by_a_slow_tokenizer_too() -> None:
    made = Encoder(task(), Slow(TOKENIZERS["byte-level"]), "causal", 12)
    sample = one(made, text="the film was great " * 20)
    assert 9 <= len(sample.ids) <= 12
    assert made.tokenizer.decode(sample.ids).startswith("the film was")
    assert made.tokenizer.decode(sample.ids).endswith(" It was")


# Metrics, against values computed by hand from the counts: labels, then predictions
TRUTH = [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
GUESS = [0, 0, 0, 1, 1, 1, 1, 1, 0, 0]  # of class 1: 4 true, 1 false, 2 missed; of class 0: 3 true, 2 false, 1 missed


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("accuracy", 7 / 10),
        ("f1", 2 * 4 / (2 * 4 + 1 + 2)),
        ("macro-f1", (2 * 4 / (2 * 4 + 1 + 2) + 2 * 3 / (2 * 3 + 2 + 1)) / 2),
        ("matthews", (4 * 3 - 1 * 2) / (5 * 6 * 5 * 4) ** 0.5),
    ],
)
def test_metrics_of_two_classes(metric: Metric, value: float) -> None:
    assert measure(metric, torch.tensor(GUESS), torch.tensor(TRUTH), 2) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("accuracy", 4 / 6),
        ("macro-f1", (2 * 2 / (2 * 2 + 1) + 2 * 1 / (2 * 1 + 1 + 1) + 2 * 1 / (2 * 1 + 1)) / 3),
        # R_K: (N trace - sum of products of counts) / sqrt of (N^2 - sum of squares), for truth and for guesses
        ("matthews", (6 * 4 - (3 * 2 + 2 * 2 + 1 * 2)) / ((36 - (4 + 4 + 4)) * (36 - (9 + 4 + 1))) ** 0.5),
    ],
)
def test_metrics_of_three_classes(metric: Metric, value: float) -> None:
    truth, guess = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 2, 2])
    assert measure(metric, guess, truth, 3) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("metric", ["accuracy", "f1", "macro-f1", "matthews"])
def test_perfect_predictions(metric: Metric) -> None:
    assert measure(metric, torch.tensor(TRUTH), torch.tensor(TRUTH), 2) == pytest.approx(1.0)
