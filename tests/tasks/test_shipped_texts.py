"""Every task that ships and is no classification: one example of its data's schema, as a model reads and learns it.

The rows are made up, in the fields that the data sets have, and come through the loader twice: as the hub gives them,
and from local files.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest
from datasets import ClassLabel, List, Value

from mezo_dist.config.kinds import Task
from mezo_dist.config.kinds.generation import GenerationTask
from mezo_dist.config.kinds.regression import RegressionTask
from mezo_dist.config.reader import load
from mezo_dist.config.task import Split, Splits
from mezo_dist.tasks.kind import TextModel
from mezo_dist.tasks.kinds import kind_of
from mezo_dist.tasks.rows import load_rows
from tests.tasks import test_shipped
from tests.tasks.encoders import tokenizer_for

ROOT = Path(__file__).resolve().parents[2]
TEXT, TEXTS, NUMBER = Value("string"), List(Value("string")), Value("int32")
END = "<eos>"


class Example(NamedTuple):
    row: dict[str, Any]
    features: dict[str, Any]
    """The types that the hub has of the row's fields."""
    read: str
    """What the model is given."""
    learnt: list[str]
    """What it is to write; the options, if there are several."""
    right: Any
    """Options that are right, reference texts, or the number."""


ALPACA = {"instruction": "Name a colour.", "input": "", "output": "Red.", "text": "..."}
ALPACA_INPUT = {"instruction": "Add them.", "input": "2 and 3", "output": "5", "text": "..."}
ALPACA_TYPES = {"instruction": TEXT, "input": TEXT, "output": TEXT, "text": TEXT}
BEGIN = "Below is an instruction that describes a task"
BEGIN_INPUT = f"{BEGIN}, paired with an input that provides further context"
REQUEST = "Write a response that appropriately completes the request.\n\n### Instruction:\n"

EXAMPLES = {
    "copa": Example(
        {
            "premise": "Ann ran home.",
            "choice1": "The rain began.",
            "choice2": "I TV ate.",
            "question": "cause",
            "idx": 3,
            "label": 0,
        },
        {
            **dict.fromkeys(("premise", "choice1", "choice2", "question"), TEXT),
            "idx": NUMBER,
            "label": ClassLabel(names=["choice1", "choice2"]),
        },
        "Ann ran home because",
        [" the rain began.", " I TV ate."],
        (0,),
    ),
    "copa, effect": Example(
        {
            "premise": "It rained!",
            "choice1": "In fact it dried.",
            "choice2": "We stayed.",
            "question": "effect",
            "idx": 4,
            "label": 1,
        },
        {
            **dict.fromkeys(("premise", "choice1", "choice2", "question"), TEXT),
            "idx": NUMBER,
            "label": ClassLabel(names=["choice1", "choice2"]),
        },
        "It rained! so",
        [" in fact it dried.", " we stayed."],
        (1,),
    ),
    "record": Example(
        {
            "passage": "Ann met Bob in Rome.\n@highlight\nBob went home\n@highlight\nAnn stayed",
            "query": "@placeholder was left by Bob in Rome",
            "entities": ["Bob", "Ann", "Rome", "Ann Lee"],
            "entity_spans": {"text": ["Ann", "Bob", "Rome"], "start": [0, 8, 15], "end": [3, 11, 19]},
            "answers": ["Ann Lee", "Ann"],
            "idx": {"passage": 0, "query": 1},
        },
        {
            "passage": TEXT,
            "query": TEXT,
            "entities": TEXTS,
            "entity_spans": {"text": TEXTS, "start": List(NUMBER), "end": List(NUMBER)},
            "answers": TEXTS,
            "idx": {"passage": NUMBER, "query": NUMBER},
        },
        "Ann met Bob in Rome.\n- Bob went home\n- Ann stayed\n-",
        [f" {name} was left by Bob in Rome" for name in ("Bob", "Ann", "Rome", "Ann Lee")],
        (3, 1),
    ),
    "squad": Example(
        {
            "id": "5",
            "title": "Cats",
            "context": "All cats purr.",
            "question": "What do cats do? ",
            "answers": {"text": ["purr", "they purr"], "answer_start": [9, 9]},
        },
        {
            **dict.fromkeys(("id", "title", "context", "question"), TEXT),
            "answers": {"text": TEXTS, "answer_start": List(NUMBER)},
        },
        "Title: Cats\nContext: All cats purr.\nQuestion: What do cats do?\nAnswer:",
        [" purr\n"],
        ("purr", "they purr"),
    ),
    "drop": Example(
        {
            "section_id": "a",
            "query_id": "b",
            "passage": "Ann ran 3 miles, then 4.",
            "question": "How many miles?",
            "answers_spans": {"spans": ["7", "seven"], "types": ["number", "span"]},
        },
        {
            **dict.fromkeys(("section_id", "query_id", "passage", "question"), TEXT),
            "answers_spans": {"spans": TEXTS, "types": TEXTS},
        },
        "Passage: Ann ran 3 miles, then 4.\nQuestion: How many miles?\nAnswer:",
        [" 7\n"],
        ("7", "seven"),
    ),
    "stsb": Example(
        {"sentence1": "A cat sits.", "sentence2": "A dog sits.", "label": 2.5, "idx": 0},
        {"sentence1": TEXT, "sentence2": TEXT, "label": Value("float32"), "idx": NUMBER},
        "A cat sits.A dog sits.",
        [],
        2.5,
    ),
    "gsm8k": Example(
        {"question": "Ann has 2 pens and buys 3. How many?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
        {"question": TEXT, "answer": TEXT},
        "Question: Ann has 2 pens and buys 3. How many?\nAnswer:",
        [f" 2 + 3 = <<2+3=5>>5\n#### 5{END}"],
        None,
    ),
    "alpaca": Example(
        ALPACA, ALPACA_TYPES, f"{BEGIN}. {REQUEST}Name a colour.\n\n### Response:\n", [f"Red.{END}"], None
    ),
    "alpaca, with an input": Example(
        ALPACA_INPUT,
        ALPACA_TYPES,
        f"{BEGIN_INPUT}. {REQUEST}Add them.\n\n### Input:\n2 and 3\n\n### Response:\n",
        [f"5{END}"],
        None,
    ),
    "alpaca-chat": Example(ALPACA, ALPACA_TYPES, f"user:Name a colour.{END}\nassistant:", [f"Red.{END}"], None),
    "alpaca-chat, with an input": Example(
        ALPACA_INPUT, ALPACA_TYPES, f"user:Add them.\n\n2 and 3{END}\nassistant:", [f"5{END}"], None
    ),
}
CHAT = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def shipped(name: str) -> Task:
    file = ROOT / "configs" / "tasks" / f"{name.partition(',')[0]}.yaml"
    head = ["--model.head=classifier", "--algorithm.lr=1"] if name == "stsb" else []
    return load(ROOT / "configs" / "quickstart.yaml", [f"--task={file}", "--train.calibrate=false", *head]).task


def test_there_is_an_example_of_each() -> None:
    names = {name.partition(",")[0] for name in EXAMPLES} | set(test_shipped.EXAMPLES)
    assert names == {path.stem for path in (ROOT / "configs" / "tasks").glob("*.yaml")}


def as_the_hub_gives_it(name: str, task: Task, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The row of an example through `datasets`, with the types of the hub."""
    row, features, *_ = EXAMPLES[name]

    def load_dataset(data: str, subset: str | None, revision: str | None) -> Any:
        assert (data, subset, revision) == (task.data, task.subset, task.revision)
        made = datasets.Dataset.from_list([row] * 3, features=datasets.Features(features))
        return {split.source: made for split in (task.splits.train, task.splits.validation, task.splits.test)}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (loaded,) = load_rows(dataclasses.replace(task, splits=ones(task))).train
    return dict(loaded)


def from_local_files(name: str, task: Task, folder: Path) -> dict[str, Any]:
    """The row of an example from files named after their splits."""
    for split in (task.splits.train, task.splits.validation, task.splits.test):
        (folder / f"{split.source}.jsonl").write_text((json.dumps(EXAMPLES[name].row) + "\n") * 3)
    (loaded,) = load_rows(dataclasses.replace(task, data=str(folder), splits=ones(task))).train
    return dict(loaded)


def ones(task: Task) -> Splits:
    """The splits of a task, of one sample each."""
    train, validation, test = (
        Split(s.source, 1) for s in (task.splits.train, task.splits.validation, task.splits.test)
    )
    return Splits(train, validation, test)


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_a_model_reads_and_learns(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example, task = EXAMPLES[name], shipped(name)
    rows = [from_local_files(name, task, tmp_path), as_the_hub_gives_it(name, task, monkeypatch)]
    tokenizer = tokenizer_for(example.read, *example.learnt, "user:", "assistant:\n")
    tokenizer.add_special_tokens({"eos_token": END})
    tokenizer.chat_template = CHAT
    kind = kind_of(task, TextModel(tokenizer, "causal", 512, None), rows[0])

    def text(ids: Any) -> str:
        return "".join(tokenizer.convert_ids_to_tokens(list(ids)))

    for row, sample in zip(rows, kind.encode(rows, "train"), strict=True):
        item = kind.collate([sample], (0,), 0)
        if isinstance(task, RegressionTask):
            assert (text(sample.ids), sample.value) == (example.read, example.right)
            continue
        targets = zip(item.targets["token"], item.targets["is_target"], strict=True)
        assert [text(tokens[on.bool()]) for tokens, on in targets] == example.learnt
        whole = item.inputs["input_ids"][0][item.inputs["attention_mask"][0].bool()]
        assert text(whole).startswith(example.read + example.learnt[0])
        if isinstance(task, GenerationTask):
            assert text(sample.prompt) == example.read
            assert sample.references == example.right
            assert json.loads(sample.row) == row
        elif example.right is not None:
            assert item.facts == (example.right,)


def test_alpaca_leaves_out_what_has_no_answer(tmp_path: Path) -> None:
    rows = [ALPACA, ALPACA | {"output": ""}] * 5
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = Splits(Split("train", 3), Split("train", 1), Split("train", 1))
    loaded = load_rows(dataclasses.replace(shipped("alpaca"), data=str(tmp_path), splits=splits))
    assert [row["output"] for row in loaded.train] == ["Red."] * 3
