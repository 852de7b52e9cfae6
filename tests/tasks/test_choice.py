"""Choices: how options become tokens, scores and losses, held against plain calls; and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from mezo_dist.config.kinds.choice import ChoiceTask
from mezo_dist.errors import UserError
from mezo_dist.models.frozen_cache import run_whole
from mezo_dist.tasks.batches import MicroBatch, cut
from mezo_dist.tasks.choice.kind import Choice
from mezo_dist.tasks.choice.options import Sample
from mezo_dist.tasks.kind import Bench, Scores, TextModel
from mezo_dist.testing import tiny_model
from tests.tasks.encoders import TOKENIZERS

TASK = ChoiceTask(name="t", data="nowhere", prompt="{{ text }} It was {{ answer }}", options_field="options")
ROWS: list[dict[str, Any]] = [
    {"text": "the film", "options": ["great", "terrible film"], "label": 1},
    {"text": "the plot was great", "options": ["a dull film", "a dull plot and", "great"], "label": "great"},
    {"text": "film", "options": ["terrible", "great"], "label": "0"},
]


def kind(tokenizer: str = "word-level", window: int = 64, **changes: Any) -> Choice:
    model = TextModel(TOKENIZERS[tokenizer], "causal", window, None)
    return Choice.of(dataclasses.replace(TASK, **changes), model, ROWS[0])


def encode(rows: list[dict[str, Any]], **changes: Any) -> list[Sample]:
    return list(kind(**changes).encode(rows, "train"))


def fault(row: dict[str, Any], **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        encode([{**ROWS[0], **row}], **changes)
    return str(caught.value)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_the_tokens_of_an_option_are_those_after_the_prompt(tokenizer: str) -> None:
    read = TOKENIZERS[tokenizer]
    for sample, row in zip(encode(ROWS, tokenizer=tokenizer), ROWS, strict=True):
        prompt = read(f"{row['text']} It was")["input_ids"]
        for ids, start, option in zip(sample.options, sample.starts, row["options"], strict=True):
            assert list(ids) == read(f"{row['text']} It was {option}")["input_ids"]
            assert (start, list(ids[:start])) == (len(prompt), prompt)
    assert [sample.label for sample in encode(ROWS, tokenizer=tokenizer)] == [1, 2, 0]
    assert encode(ROWS)[0].sizes == (5, 13)


def test_options_that_start_alike_are_scored_whole() -> None:
    """What options share belongs to each of them: it is not the prompt's."""
    sample = encode(ROWS)[1]
    assert [len(ids) - start for ids, start in zip(sample.options, sample.starts, strict=True)] == [3, 4, 1]


def scores(model: Any, task: Choice, size: int) -> tuple[list[MicroBatch], list[Scores]]:
    batches = cut(list(task.encode(ROWS, "train")), size, 0, task.collate)
    bench = Bench(model, ROWS[0], batches[0], lambda _: run_whole, lambda forward: forward(model, batches[0]))
    forward = task.forward(bench)
    return batches, [forward(model, batch) for batch in batches]


def by_hand(model: Any, sample: Sample, normalise: str) -> Tensor:
    values = []
    for ids, start, size in zip(sample.options, sample.starts, sample.sizes, strict=True):
        logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        chosen = torch.stack([logits[place - 1, ids[place]] for place in range(start, len(ids))])
        values.append(chosen.sum() / {"sum": 1, "mean": len(ids) - start, "bytes": size}[normalise])
    return torch.stack(values)


@pytest.mark.parametrize("normalise", ["mean", "sum", "bytes"])
@pytest.mark.parametrize("loss", ["choice", "lm"])
@torch.no_grad()
def test_scores_are_those_of_plain_calls(normalise: Any, loss: Any) -> None:
    task, plain, model = kind(normalise=normalise, loss=loss), tiny_model("llama"), tiny_model("llama")
    samples = list(task.encode(ROWS, "train"))
    batches, found = scores(model, task, 2)
    assert [batch.columns for batch in batches] == [2, 3]
    assert [batch.row_slots for batch in batches] == [(2, 2, 0, 0), (1, 1, 1)]
    for batch, result in zip(batches, found, strict=True):
        for place, slot in enumerate(batch.slots):
            sample = samples[slot]
            wanted = by_hand(plain, sample, normalise)
            torch.testing.assert_close(result.payload[place, : len(wanted)], wanted)
            assert not result.payload[place, len(wanted) :].any()
            tokens = len(sample.options[sample.label]) - sample.starts[sample.label]
            right = by_hand(plain, sample, "sum")[sample.label]
            expected = -wanted.log_softmax(0)[sample.label] if loss == "choice" else -right
            torch.testing.assert_close(result.loss[place], expected)
            assert int(result.weight[place]) == (1 if loss == "choice" else tokens)


@torch.no_grad()
def test_the_best_option_counts_and_padding_is_none() -> None:
    """Scores are negative, so that zeros after the options would win."""
    task, model = kind(), tiny_model("llama")
    samples = list(task.encode(ROWS, "train"))
    (batch,), (result,) = scores(model, task, 3)
    payload = result.payload[torch.tensor(batch.slots).argsort()]
    right = [int(by_hand(model, s, "mean").argmax()) == s.label for s in samples]
    assert task.merits(payload, [batch]).tolist() == [float(r) for r in right]
    assert task.summarise(0.0, payload, [batch]) == {"accuracy": pytest.approx(sum(right) / 3)}


def test_the_text_is_shortened_and_options_are_not() -> None:
    (sample,) = encode([{**ROWS[1], "text": "film " * 40}], window=12)
    assert max(map(len, sample.options)) == 12
    assert [len(ids) - start for ids, start in zip(sample.options, sample.starts, strict=True)] == [3, 4, 1]


def test_labels_may_have_other_names() -> None:
    letters = {"labels": ("A", "B", "C")}
    assert [s.label for s in encode([{**ROWS[1], "label": "B"}], **letters)] == [1]
    keys = {"labels_field": "keys"}
    assert [s.label for s in encode([{**ROWS[0], "keys": ["x", "y"], "label": "y"}], **keys)] == [1]
    fixed = {"options_field": None, "options": ("great", "{{ text }}")}
    assert [s.label for s in encode([{**ROWS[0], "label": 0}], **fixed)] == [0]


CLOZE: dict[str, Any] = {
    "prompt": "{{ text }} . {{ answer }}",
    "option": "{{ query | replace('@placeholder', option) }}",
    "labels_field": "options",
    "label": "answers",
}
GAP: dict[str, Any] = {
    "text": "the film",
    "query": "@placeholder was great",
    "options": ["film", "1", "plot", "acting"],
    "answers": ["plot", "1", "music"],
}


def test_options_may_be_put_into_a_template_and_several_may_be_right() -> None:
    task, tokenizer = kind(**CLOZE), TOKENIZERS["word-level"]
    (sample,) = task.encode([GAP], "train")
    assert tokenizer.decode(sample.options[2]) == "the film . plot was great"
    assert (sample.label, sample.right) == (2, (2, 1)), "by what the list holds, not by its number; the first counts"
    (batch,) = cut([sample], 1, 0, task.collate)
    for best, is_right in ((1, 1.0), (2, 1.0), (3, 0.0), (0, 0.0)):
        payload = torch.full((1, 4), -2.0)
        payload[0, best] = -1.0
        assert task.merits(payload, [batch]).tolist() == [is_right]
        assert task.summarise(0.0, payload, [batch]) == {"accuracy": is_right}


def test_a_list_of_labels_none_of_which_is_an_option() -> None:
    assert "task.label: the label is 'music', which names none of them: ['film', '1'" in fault(
        {**GAP, "answers": ["music"]}, **CLOZE
    )


@pytest.mark.parametrize(
    ("row", "changes", "expected"),
    [
        ({"label": 2}, {}, "task.label: the label is 2, which names none of them: ['0', '1']"),
        ({"label": "C"}, {"labels": ("A", "B", "C")}, "task.label: the label is 'C', which names none of them"),
        ({"label": "1", "options": ["1", "0"]}, {}, "task.label: the label is '1', which stands for several of them"),
        (
            {"label": [1], "options": ["2", "3", "1"]},
            {},
            "task.label: the label is 1, which stands for several of them",
        ),
        ({"options": "great"}, {}, "task.options_field: the field 'options' must be a list of at least two texts"),
        ({"options": ["great"]}, {}, "task.options_field: the field 'options' must be a list of at least two texts"),
        ({"options": ["great", ""]}, {}, "task.options: the option '' has no tokens after this prompt"),
        ({}, {"prompt": "{{ answer }} was it"}, "task.prompt: {{ answer }} must come last, not before ' was it'"),
        ({}, {"prompt": "{{ answer }}"}, "task.prompt: no token stands before {{ answer }}"),
        ({}, {"options_field": "choices"}, "task.options_field: there is no field 'choices', only ['label', "),
        ({}, {"window": 2}, "task.prompt: it needs 4 tokens even without the text of ['text']"),
    ],
)
def test_what_is_refused(row: dict[str, Any], changes: dict[str, Any], expected: str) -> None:
    assert expected in fault(row, **changes)


def test_masked_models_are_refused() -> None:
    with pytest.raises(UserError, match=r"task\.kind: choice needs a causal language model.* this one is masked"):
        Choice.of(TASK, TextModel(TOKENIZERS["word-level"], "masked", 64, None), ROWS[0])
