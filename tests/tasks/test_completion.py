"""Completions: which tokens are learnt, their losses against plain calls, conversations, windows; what is refused."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch

from mezo_dist.config.kinds.completion import CompletionTask
from mezo_dist.errors import UserError
from mezo_dist.models.frozen_cache import run_whole
from mezo_dist.tasks.batches import cut
from mezo_dist.tasks.completion.kind import Completion, Sample
from mezo_dist.tasks.kind import Bench, TextModel
from mezo_dist.testing import tiny_model, tiny_tokenizer
from tests.tasks.encoders import TOKENIZERS, byte_level

TASK = CompletionTask(name="t", data="nowhere", prompt="{{ text }} It", completion=" was {{ answer }}")
DOCUMENT = dataclasses.replace(TASK, prompt="", completion="{{ text }}")
ROWS: list[dict[str, Any]] = [
    {"text": "the film", "answer": "great"},
    {"text": "the plot was great", "answer": "a dull film and a great plot"},
    {"text": "film", "answer": "terrible"},
]
EOS = 3


def kind(task: CompletionTask = TASK, tokenizer: Any = None, window: int = 64) -> Completion:
    model = TextModel(tokenizer or tiny_tokenizer(), "causal", window, None)
    return Completion.of(task, model, ROWS[0])


def targets(sample: Sample, tokenizer: Any = None) -> str:
    tokenizer = tokenizer or tiny_tokenizer()
    return " ".join(tokenizer.convert_ids_to_tokens([sample.ids[place] for place in sample.targets]))


def fault(task: CompletionTask, tokenizer: Any = None, window: int = 64, **fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        list(kind(task, tokenizer, window).encode([{**ROWS[0], **fields}], "train"))
    return str(caught.value)


def test_the_completion_is_learnt_and_the_prompt_is_not() -> None:
    samples = list(kind().encode(ROWS, "train"))
    assert targets(samples[1]) == "was a dull film and a great plot <eos>"
    (without_end,) = list(kind(dataclasses.replace(TASK, end=False)).encode(ROWS[:1], "train"))
    assert targets(without_end) == "was great"
    (document,) = list(kind(DOCUMENT).encode(ROWS[1:2], "train"))
    assert targets(document) == "plot was great <eos>", "nothing predicts the first token"


@pytest.mark.parametrize("tokenizer", ["byte-level", "metaspace"])
def test_space_between_prompt_and_completion(tokenizer: str) -> None:
    read = TOKENIZERS[tokenizer]
    task = dataclasses.replace(TASK, prompt="{{ text }} It", completion=" was {{ answer }}", end=False)
    (sample,) = kind(task, read).encode(ROWS[:1], "train")
    assert list(sample.ids) == read("the film It was great")["input_ids"]
    assert sample.spans == ((len(read("the film It")["input_ids"]), len(sample.ids)),)


def test_a_completion_that_sticks_to_its_prompt_is_told(caplog: pytest.LogCaptureFixture) -> None:
    kind()
    kind(DOCUMENT)
    assert not caplog.text
    kind(dataclasses.replace(TASK, completion="{{ answer }}"))
    assert "task.completion: its first token and the last one of the prompt are one: 'It' and 'great'" in caplog.text


def test_a_document_is_cut_into_windows() -> None:
    text = "the film was very dull but the ending"
    samples = list(kind(dataclasses.replace(DOCUMENT, window=4)).encode([{"text": text}, {"text": "film"}], "train"))
    ids = (*tiny_tokenizer()(text)["input_ids"], EOS)
    assert [sample.ids for sample in samples] == [ids[:4], ids[4:8], (*tiny_tokenizer()("film")["input_ids"], EOS)]
    assert [sample.spans for sample in samples] == [((1, 4),), ((1, 4),), ((1, 2),)]


def forward_of(task: Completion, model: Any, batches: Any) -> Any:
    return task.forward(
        Bench(model, ROWS[0], batches[0], lambda _: run_whole, lambda forward: forward(model, batches[0]))
    )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_losses_are_those_of_plain_calls(name: str) -> None:
    task, model, plain = kind(), tiny_model(name), tiny_model(name)
    samples = list(task.encode(ROWS, "train"))
    batches = cut(samples, 2, 0, task.collate)
    forward = forward_of(task, model, batches)
    total, right, number = 0.0, 0, 0
    for batch in batches:
        scores = forward(model, batch)
        for place, slot in enumerate(batch.slots):
            sample = samples[slot]
            logits = plain(input_ids=torch.tensor([sample.ids])).logits[0]
            chosen = logits.log_softmax(-1)
            loss = -sum(float(chosen[at - 1, sample.ids[at]]) for at in sample.targets)
            hits = sum(int(logits[at - 1].argmax()) == sample.ids[at] for at in sample.targets)
            assert float(scores.loss[place]) == pytest.approx(loss, rel=1e-5)
            assert int(scores.weight[place]) == len(sample.targets)
            assert scores.payload[place].tolist() == [hits, len(sample.targets)]
            total, right, number = total + loss, right + hits, number + len(sample.targets)
    payload = torch.cat([forward(model, batch).payload for batch in batches])
    figures = task.summarise(total / number, payload, batches)
    assert figures == {"perplexity": pytest.approx(math.exp(total / number)), "token-accuracy": right / number}


def test_perplexity_of_losses_that_are_no_numbers() -> None:
    payload = torch.tensor([[1.0, 2.0]])
    assert math.isnan(kind().summarise(math.nan, payload, [])["perplexity"])
    assert kind().summarise(1e6, payload, [])["perplexity"] == math.inf


# Conversations

MARKED = (
    "{% for m in messages %}{{ m.role }} : {% if m.role == 'assistant' %}{% generation %}{{ m.content }} <eos>"
    "{% endgeneration %}{% else %}{{ m.content }} <eos>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
FORGETFUL = "{{ messages | length }} " + PLAIN
TURNS = [
    {"role": "user", "content": "the film"},
    {"role": "assistant", "content": "It was great"},
    {"role": "user", "content": "the plot"},
    {"role": "assistant", "content": "dull"},
]


def talking(template: str | None) -> Any:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_tokens(["user", "assistant", ":", "2", "4"])
    tokenizer.chat_template = template
    return tokenizer


CONVERSATION = CompletionTask(name="t", data="nowhere", messages="turns")


@pytest.mark.parametrize("template", [MARKED, PLAIN])
def test_the_assistants_turns_are_learnt(template: str) -> None:
    tokenizer = talking(template)
    (sample,) = kind(CONVERSATION, tokenizer).encode([{"turns": TURNS}], "train")
    assert tokenizer.decode(sample.ids).split() == (
        "user : the film <eos> assistant : It was great <eos> user : the plot <eos> assistant : dull <eos>".split()
    )
    assert targets(sample, tokenizer) == "It was great <eos> dull <eos>"
    assert len(sample.spans) == 2


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END_TWICE = CHATML.replace("<|im_end|>", "<|im_end|><s>")
NO_END = CHATML.replace("<|im_end|>", "")


@pytest.mark.parametrize(
    ("template", "learnt"),
    [
        (CHATML, "It was great<|im_end|>dull<|im_end|>"),
        (END_TWICE, "It was great<|im_end|><s>dull<|im_end|><s>"),
        (NO_END, "It was great\ndull\n"),
    ],
)
def test_the_new_line_after_the_end_of_a_turn_is_not_learnt(template: str, learnt: str) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    (sample,) = kind(CONVERSATION, tokenizer, 200).encode([{"turns": TURNS}], "train")
    assert tokenizer.decode([sample.ids[place] for place in sample.targets]) == learnt


CHAT = CompletionTask(name="t", data="nowhere", prompt=" {{ text }} ", completion="{{ answer }}", chat=True)


def test_templates_may_be_turns_of_a_conversation() -> None:
    tokenizer = talking(PLAIN)
    samples = list(kind(CHAT, tokenizer, 11).encode([ROWS[0], {**ROWS[0], "text": "the film " * 9}], "train"))
    assert tokenizer.decode(samples[0].ids) == "user : the film <eos> assistant : great <eos>"
    assert targets(samples[0], tokenizer) == targets(samples[1], tokenizer) == "great <eos>"
    assert len(samples[1].ids) == 11, "prompts are shortened here, too"


@pytest.mark.parametrize(
    ("template", "fields", "expected"),
    [
        (None, {}, "task.chat: the tokenizer of this model has no chat template"),
        (PLAIN, {"answer": " "}, "task.completion: the text is empty; leave the row out"),
        (PLAIN, {"text": ""}, "task.prompt: the text is empty; leave the row out"),
    ],
)
def test_turns_that_are_refused(template: str | None, fields: dict[str, Any], expected: str) -> None:
    assert expected in fault(CHAT, talking(template), **fields)


@pytest.mark.parametrize(
    ("template", "turns", "expected"),
    [
        (None, TURNS, "task.messages: the tokenizer of this model has no chat template"),
        (PLAIN, "hello", "task.messages: the field must hold a list of {role, content}, not 'hello'"),
        (PLAIN, TURNS[:1], "task.messages: the assistant has no turn"),
        (FORGETFUL, TURNS, "task.messages: the chat template changes earlier turns when turn 2 is added"),
        ("{{ raise_exception('no such role') }}", TURNS, "the chat template refuses the conversation: no such role"),
        (PLAIN, TURNS * 9, "task.messages: the conversation has"),
    ],
)
def test_conversations_that_are_refused(template: str | None, turns: Any, expected: str) -> None:
    assert expected in fault(CONVERSATION, talking(template), turns=turns)


@pytest.mark.parametrize(
    ("changes", "window", "expected"),
    [
        ({"completion": "{{ nothing }}"}, 64, "task template"),
        ({"completion": "{{ text if false else '' }}", "end": False}, 64, "task.completion: the text is empty"),
        ({"prompt": "", "completion": "film", "end": False}, 64, "task.completion: the text is empty"),
        ({"window": 65, "prompt": ""}, 64, "task.window: 65 tokens are more than train.max_tokens"),
        ({"completion": " film film film film"}, 4, "task.prompt: it needs 6 tokens even without the text of ['text']"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], window: int, expected: str) -> None:
    assert expected in fault(dataclasses.replace(TASK, **changes), window=window)


def test_models_that_cannot_do_it_are_refused() -> None:
    with pytest.raises(UserError, match=r"task\.kind: completion needs a causal language model.* this one is masked"):
        Completion.of(TASK, TextModel(tiny_tokenizer(), "masked", 64, None), ROWS[0])
    endless = copy.deepcopy(tiny_tokenizer())
    endless.eos_token = None
    with pytest.raises(UserError, match=r"task\.end: the tokenizer has no end-of-text token"):
        kind(tokenizer=endless)
