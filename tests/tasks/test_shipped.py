"""Every classification that ships: one example of its data's schema, as a causal and as a masked model read it.

No hub is needed: the rows are made up, in the fields that the data sets have. The tokenizer keeps every character, and
knows each word with the space before it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mezo_dist.config.kinds.classification import ClassificationTask
from mezo_dist.config.reader import load
from mezo_dist.config.schema import ModelKind
from mezo_dist.config.values import ClassIndex
from mezo_dist.tasks.classification.prompts import Encoder
from tests.tasks.encoders import MASK, tokenizer_for

ROOT = Path(__file__).resolve().parents[2]


class Example(NamedTuple):
    row: dict[str, Any]
    prompt: str
    """What a causal model reads; of a task for masked models, what those read."""
    words: list[str]
    """The tokens of the label words."""
    label: int
    plain: list[str]


YES_NO, NO_YES, NLI = ["Yes", "No"], ["No", "Yes"], ["Yes", "Maybe", "No"]
RAIN = {"premise": "It rains.", "hypothesis": "The street is wet."}
RAIN_CB = 'Suppose It rains. Can we infer that "The street is wet."? Yes, No, or Maybe?\n'
RAIN_MASKED = "It rains?<mask>, the street is wet."  # the mask stands for the space, too
RAIN_PLAIN = ["It rains.", "The street is wet."]
GRADES = [" terrible", " bad", " okay", " good", " great"]
SIDES = [" terrible", " great"]
KINDS = ["Description", "Entity", "Expression", "Human", "Location", "Number"]
DENVER: dict[str, Any] = {
    "text": "How far is it from Denver to Aspen ?",
    "coarse_label": ClassIndex(5, "NUM"),
    "fine_label": 40,
}
BANK = {"word": "bank", "sentence1": "By the bank.", "sentence2": "In a bank.", "start1": 7, "label": 0}
FRED = {"text": "Fred saw Bill as he left.", "span1_text": "Fred", "span2_text": "He", "span2_index": 4, "label": 1}

EXAMPLES = {
    "movie-sentences": Example({"text": "A film.", "label": 1}, "A film. It was", SIDES, 1, ["A film."]),
    "tweets": Example({"text": "Yay!", "rating": 2.1, "label": 1}, "Yay! It was", SIDES, 1, ["Yay!"]),
    "product-sentences": Example({"text": "Fine.", "label": 1}, "Fine. It was", SIDES, 1, ["Fine."]),
    "editorial-sentences": Example({"text": "A scandal.", "label": 0}, "A scandal. It was", SIDES, 0, ["A scandal."]),
    "bbc-news": Example(
        {"text": "Sales rose.", "label": "business"},
        "Sales rose.\nTopic:",
        [" business", " entertainment", " politics", " sports", " tech"],
        0,
        ["Sales rose."],
    ),
    "r8": Example(
        {"text": "wheat fell", "label": "money-fx"},
        "wheat fell\nTopic:",
        [" acquisition", " oil", " earnings", " grain", " interest", " currency", " shipping", " trade"],
        5,
        ["wheat fell"],
    ),
    "boolq-demo": Example(
        {"passage": "All cats purr.", "question": "do lions purr", "label": 0},
        "All cats purr. Do lions purr?\n",
        YES_NO,
        1,
        ["All cats purr.", "do lions purr"],
    ),
    "sst2": Example(
        {"sentence": "hide new secretions ", "label": 0},
        "hide new secretions It was",
        SIDES,
        0,
        ["hide new secretions"],
    ),
    "sst2-masked": Example({"sentence": "a charm ", "label": 1}, "a charm It was<mask>.", SIDES, 1, ["a charm"]),
    "sst5": Example({"text": "a film", "label": 2, "label_text": "neutral"}, "a film It was", GRADES, 2, ["a film"]),
    "sst5-masked": Example({"text": "a film", "label": 4}, "a film It was<mask>.", GRADES, 4, ["a film"]),
    "mnli": Example(RAIN | {"label": ClassIndex(1, "neutral"), "idx": 0}, RAIN_CB, NLI, 1, RAIN_PLAIN),
    "mnli-masked": Example(RAIN | {"label": 2}, RAIN_MASKED, [" Yes", " Maybe", " No"], 2, RAIN_PLAIN),
    "snli": Example(RAIN | {"label": 0}, RAIN_CB, NLI, 0, RAIN_PLAIN),
    "snli-masked": Example(RAIN | {"label": 1}, RAIN_MASKED, [" Yes", " Maybe", " No"], 1, RAIN_PLAIN),
    "rte": Example(
        RAIN | {"label": 0},
        'It rains.\nDoes this mean that "The street is wet." is true? Yes or No?\n',
        YES_NO,
        0,
        RAIN_PLAIN,
    ),
    "rte-masked": Example(RAIN | {"label": 1}, RAIN_MASKED, [" Yes", " No"], 1, RAIN_PLAIN),
    "cb": Example(RAIN | {"label": 2}, RAIN_CB, ["Yes", "No", "Maybe"], 2, RAIN_PLAIN),
    "boolq": Example(
        {"passage": "All cats purr.", "question": "do lions purr", "answer": False},
        "All cats purr. Do lions purr?\n",
        YES_NO,
        1,
        ["All cats purr.", "do lions purr"],
    ),
    "wsc": Example(
        FRED,
        'Fred saw Bill as he left.\nIn the previous sentence, does the pronoun "he" refer to Fred? Yes or No?\n',
        NO_YES,
        1,
        ["Fred saw Bill as he left.", "He: Fred"],
    ),
    "wic": Example(
        BANK,
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\nBy the bank.\nIn a bank.\n',
        NO_YES,
        0,
        ["bank: By the bank.", "In a bank."],
    ),
    "multirc": Example(
        {"paragraph": "Ann ran.", "question": "Who ran?", "answer": "Ann", "idx": {"answer": 0}, "label": 1},
        'Ann ran.\nQuestion: Who ran?\nI found this answer "Ann". Is that correct? Yes or No?\n',
        NO_YES,
        1,
        ["Ann ran.", "Who ran? Ann"],
    ),
    "qnli": Example(
        {"question": "Who ran?", "sentence": "Ann ran.", "label": 0},
        "Question: Who ran?\nAnn ran.\nDoes this answer the question? Yes or No?\n",
        YES_NO,
        0,
        ["Who ran?", "Ann ran."],
    ),
    "cola": Example(
        {"sentence": "Ann runned.", "label": 0},
        "Ann runned. This sentence is",
        [" wrong", " right"],
        0,
        ["Ann runned."],
    ),
    "trec": Example(
        DENVER,
        f"Question: {DENVER['text']}\nWhat it asks for:",
        [f" {kind}" for kind in KINDS],
        5,
        [DENVER["text"]],
    ),
    "trec-masked": Example(DENVER, f"<mask>: {DENVER['text']}", [f" {kind}" for kind in KINDS], 5, [DENVER["text"]]),
}


def encoder(name: str, kind: ModelKind) -> Encoder:
    example = EXAMPLES[name]
    task = load(ROOT / "configs" / "quickstart.yaml", [f"--task={ROOT / 'configs' / 'tasks' / name}.yaml"]).task
    assert isinstance(task, ClassificationTask)
    texts = [example.prompt, *example.plain, *example.words]
    return Encoder(task, tokenizer_for(*texts), kind, 128)


READ = [(name, "masked") for name in EXAMPLES] + [(name, "causal") for name in EXAMPLES if "-masked" not in name]


@pytest.mark.parametrize(("name", "kind"), READ)
def test_what_a_model_reads(name: str, kind: ModelKind) -> None:
    example = EXAMPLES[name]
    the_encoder = encoder(name, kind)
    (sample,) = the_encoder.encode([example.row], "train")
    tokens = the_encoder.tokenizer.convert_ids_to_tokens(list(sample.ids))
    expected = example.prompt + (MASK if kind == "masked" and MASK not in example.prompt else "")
    assert "".join(tokens) == expected
    assert sample.label == example.label
    assert sample.position == (len(tokens) - 1 if kind == "causal" else tokens.index(MASK))
    assert the_encoder.tokenizer.convert_ids_to_tokens(the_encoder.label_ids(example.row)) == example.words


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_a_classification_head_reads(name: str) -> None:
    example = EXAMPLES[name]
    the_encoder = encoder(name, "classifier")
    (sample,) = the_encoder.encode([example.row], "train")
    assert "".join(the_encoder.tokenizer.convert_ids_to_tokens(list(sample.ids))) == "".join(example.plain)
    assert sample.label == example.label
