"""Rows become prompts, prompts become tokens; the tokens of the label words."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mezo_dist.config.kinds.classification import Label
from mezo_dist.config.schema import ModelKind
from mezo_dist.config.values import ClassIndex
from mezo_dist.errors import UserError
from mezo_dist.tasks.classification.prompts import Encoder, Sample
from tests.tasks.encoders import SPACE, TOKENIZERS, encoder, fault, one, task


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_a_causal_prompt_stops_where_the_answer_goes(tokenizer: str) -> None:
    sample = one(encoder(tokenizer=tokenizer), text="the film", label=1)
    ids = TOKENIZERS[tokenizer]("the film It was")["input_ids"]
    assert sample == Sample(tuple(ids), label=1, position=len(ids) - 1)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_a_masked_prompt_has_its_mask_anywhere(tokenizer: str) -> None:
    the_encoder = encoder("masked", tokenizer, prompt="{{ text }} It was {{ answer }} .")
    sample = one(the_encoder, text="the film", label=1)
    mask = TOKENIZERS[tokenizer].mask_token_id
    assert sample.ids == tuple(TOKENIZERS[tokenizer]("the film It was<mask> .")["input_ids"])
    assert [i for i, token in enumerate(sample.ids) if token == mask] == [sample.position]


def test_a_classifier_reads_text_without_prompt() -> None:
    the_encoder = encoder("classifier", plain=("{{ text }}",))
    assert one(the_encoder, text="the film").ids == tuple(TOKENIZERS["word-level"]("the film")["input_ids"])
    assert one(the_encoder, text="the film").position == -1


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
    the_encoder = Encoder(task(plain=("{{ premise }}", "{{ hypothesis }}")), bert_like(), "classifier", 8)
    sample = one(the_encoder, premise="a a", hypothesis="b")
    assert sample.ids == (1, 3, 3, 2, 4, 2)
    assert sample.types == (0, 0, 0, 0, 1, 1)
    long = one(the_encoder, premise="a a a a a a a", hypothesis="b b b")
    assert len(long.ids) == 8
    assert {3, 4} <= set(long.ids)  # neither text is lost


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_template_filters_and_conditions_work(kind: ModelKind) -> None:
    prompt = "{% if title %}{{ title | lower }} : {% endif %}{{ text }} It was {{ answer }}"
    the_encoder = encoder(kind, prompt=prompt)
    words = TOKENIZERS["word-level"].convert_ids_to_tokens(one(the_encoder, text="a film", title="THE PLOT").ids)
    assert words[:2] == ["the", "plot"]
    assert one(the_encoder, text="a film", title="") == one(encoder(kind), text="a film")


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
        ({}, {"label": 2}, "task.labels: the label is 2, the task knows ['0', '1']; add it, or leave such rows out "),
        ({}, {"label": "0.0"}, "task.labels: the label is '0.0', the task knows ['0', '1']"),
    ],
)
def test_bad_rows_and_templates(changes: dict[str, Any], fields: dict[str, Any], expected: str) -> None:
    message = fault(encoder(**changes), **{"text": "a film", **fields})
    assert message.startswith("train sample 0, {'label': ")
    assert expected in message


def test_a_bad_row_is_told_apart_from_the_good_ones() -> None:
    rows: list[dict[str, Any]] = [{"text": "a film", "label": 0}, {"text": "a plot", "label": "?"}]
    with pytest.raises(UserError, match=r"^test sample 1, \{'label': '\?', 'text': 'a plot'\}: task\.labels: "):
        list(encoder().encode(rows, "test"))


def test_rows_without_a_label() -> None:
    rows = [{"text": "a film", "label": label} for label in (0, None, 1, None)]
    with pytest.raises(UserError) as caught:
        list(encoder().encode(rows, "train"))
    assert str(caught.value) == (
        "train sample 1, {'label': None, 'text': 'a film'}: "
        "task.label: the field 'label' is null in 2 of the 4 samples of the train split; leave these rows out with "
        "task.where: {drop: {label: [null]}}"
    )
    assert fault(encoder(label="stars"), text="a film") == (
        "task.label: there is no field 'stars', only ['label', 'text']"
    )


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
    the_encoder = encoder(prompt=attack + "{{ text }} {{ answer }}")
    row = {"text": "a film", "tags": ["y"]}
    message = fault(the_encoder, **row)
    assert "task template" in message
    assert row["tags"] == ["y"]


# Label words


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("kind", ["causal", "masked"])
@pytest.mark.parametrize("prompt", ["{{ text }} It was {{ answer }}", "{{ text }} {{ answer }}"])
def test_label_words_are_found_as_they_stand_in_the_prompt(tokenizer: str, kind: ModelKind, prompt: str) -> None:
    the_encoder = encoder(kind, tokenizer, prompt=prompt)
    ids = the_encoder.label_ids({"text": "the film", "label": 0})
    expected = [SPACE[tokenizer] + "terrible", SPACE[tokenizer] + "great"]
    assert the_encoder.tokenizer.convert_ids_to_tokens(ids) == expected


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_the_label_token_continues_the_prompt_as_the_filled_in_text_does(tokenizer: str) -> None:
    the_encoder = encoder(tokenizer=tokenizer)
    row = {"text": "the film", "label": 1}
    for word, token in zip(("terrible", "great"), the_encoder.label_ids(row), strict=True):
        assert [*one(the_encoder, **row).ids, token] == the_encoder.tokenizer(f"the film It was {word}")["input_ids"]


def test_a_label_word_without_space_before_it_is_another_token() -> None:
    the_encoder = encoder(
        tokenizer="byte-level", prompt="{{ text }} It was:{{ answer }}", labels=(Label(0, "t"), Label(1, "g"))
    )
    assert the_encoder.tokenizer.convert_ids_to_tokens(the_encoder.label_ids({"text": "a", "label": 0})) == ["t", "g"]


def test_label_words_are_found_even_if_the_text_fills_the_window() -> None:
    the_encoder = encoder(tokenizer="byte-level", window=8)
    assert the_encoder.label_ids({"text": "the film was great " * 9, "label": 0}) == encoder(
        tokenizer="byte-level"
    ).label_ids({"text": "the film", "label": 0})


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
def test_bad_label_words(kind: ModelKind, tokenizer: str, words: tuple[str, str], expected: str) -> None:
    labels = tuple(Label(value, word) for value, word in enumerate(words))
    with pytest.raises(UserError) as caught:
        encoder(kind, tokenizer, labels=labels).label_ids({"text": "the film", "label": 0})
    assert str(caught.value).startswith(expected)


def test_a_new_line_before_the_answer_belongs_to_the_prompt() -> None:
    labels = (Label(0, "t"), Label(1, "g"))
    the_encoder = encoder(tokenizer="byte-level", prompt="{{ text }}\nIt was :\n{{ answer }}", labels=labels)
    sample = one(the_encoder, text="the film")
    assert sample.ids == tuple(TOKENIZERS["byte-level"]("the film\nIt was :\n")["input_ids"])
    tokens = the_encoder.tokenizer.convert_ids_to_tokens(the_encoder.label_ids({"text": "the film", "label": 0}))
    assert tokens == ["t", "g"]


def test_a_tokenizer_that_appends_an_end() -> None:
    """The answer is read before the end, which the prompt of a causal model must not have."""
    core = tokenizers.Tokenizer.from_str(TOKENIZERS["word-level"].backend_tokenizer.to_str())
    core.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 3)])
    ends = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>")
    assert ends("a film")["input_ids"][-1] == 3
    the_encoder, plain = Encoder(task(), ends, "causal", 64), encoder()
    assert one(the_encoder, text="a film") == one(plain, text="a film")
    assert the_encoder.label_ids({"text": "a film", "label": 0}) == plain.label_ids({"text": "a film", "label": 0})


def test_tokens_that_the_model_does_not_know() -> None:
    the_encoder = Encoder(task(), TOKENIZERS["word-level"], "causal", 64, num_tokens=12)
    message = fault(the_encoder, text="a film")
    assert message.startswith("train sample 0, {")
    assert "}: the tokenizer makes token " in message
    assert " of it, but the model knows 12 tokens: resize its embeddings" in message
    plain = Encoder(task(plain=("{{ text }}",)), TOKENIZERS["word-level"], "classifier", 64, num_tokens=12)
    assert "the tokenizer makes token 18 of it, but the model knows 12 tokens: resize" in fault(plain, text="It was")


def test_a_prompt_of_nothing() -> None:
    assert "task.prompt: nothing stands before {{ answer }}" in fault(encoder(prompt="{{ text }}{{ answer }}"), text="")


# Labels, as data have them


@pytest.mark.parametrize(
    ("values", "cells"),
    [
        ((0, 1), [0, "1", 1.0, 0.0, ClassIndex(1, "x")]),
        ((False, True), [False, "true", True, "False", "TRUE"]),
        (("False", "true"), [False, "true", True, "False", True]),
        (("negative", "positive"), ["negative", ClassIndex(1, "positive")] * 2),
        ((0, "positive"), [ClassIndex(0, "negative"), ClassIndex(1, "positive"), 0, "positive"]),
        (("0.0", "1.0"), [0.0, 1.0, "0.0", "1.0"]),
    ],
)
def test_labels_in_all_their_shapes(values: tuple[Any, Any], cells: list[Any]) -> None:
    labels = (Label(values[0], "terrible"), Label(values[1], "great"))
    rows = [{"text": "a film", "label": cell} for cell in cells]
    samples = list(encoder(labels=labels).encode(rows, "train"))
    expected = [0, 1, 1, 0, 1] if len(cells) == 5 else [0, 1, 0, 1]
    assert [sample.label for sample in samples] == expected


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (True, "the label is True, the task knows ['0', '1']"),
        ("01", "the label is '01', the task knows"),
        (0.5, "the label is 0.5, the task knows"),
        (ClassIndex(2, "neutral"), "the label is 2 (neutral), the task knows ['0', '1']; add it, or leave such rows"),
        (ClassIndex(2, "neutral"), "task.where: {drop: {label: [neutral]}}"),
    ],
)
def test_labels_that_the_task_does_not_know(cell: Any, expected: str) -> None:
    assert expected in fault(encoder(), text="a film", label=cell)


def test_a_label_inside_another_field() -> None:
    the_encoder = encoder(label="gold.label", prompt="{{ gold.text }} It was {{ answer }}", truncate=("gold.text",))
    (sample,) = the_encoder.encode([{"gold": {"label": 1, "text": "a film"}}], "train")
    assert sample == one(encoder(), text="a film", label=1)


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_a_field_called_answer_beside_the_answer(kind: ModelKind) -> None:
    the_encoder = encoder(kind, prompt="{{ row.answer }} It was {{ answer }}", label="answer", truncate=("answer",))
    labels = (Label("the film", "terrible"), Label("the plot", "great"))
    the_encoder = dataclasses.replace(the_encoder, task=dataclasses.replace(the_encoder.task, labels=labels))
    (sample,) = the_encoder.encode([{"answer": "the plot"}], "train")
    assert sample == one(encoder(kind), text="the plot", label=1)


# Where the answer stands


def yes_no() -> Any:
    """A byte-level tokenizer with a token for each of Yes and No, with a space before it and without, and one for a
    new line."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.train_from_iterator(
        ["Is it ? Yes No\nYes\nNo :", "Yes", "No"] * 9,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<s>", "<mask>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    core.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True, special=True)])  # as RoBERTa's
    return PreTrainedTokenizerFast(tokenizer_object=core, mask_token="<mask>")


YES_NO = (Label(0, "No"), Label(1, "Yes"))


@pytest.mark.parametrize("kind", ["causal", "masked"])
@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("Is it ?\n{{ answer }}", ["No", "Yes"], "Is it ?\n"),
        ("Is it ? \n {{ answer }}", ["\u0120No", "\u0120Yes"], "Is it ? \n"),
        ("Is it ? {{ answer }}", ["\u0120No", "\u0120Yes"], "Is it ?"),
        ("Is it ?:{{ answer }}", ["No", "Yes"], "Is it ?:"),
        ("Is it ?\n\n{{ answer }}", ["No", "Yes"], "Is it ?\n\n"),
        ("Is it ?   {{ answer }}", ["\u0120No", "\u0120Yes"], "Is it ?"),
    ],
)
def test_what_stands_before_the_answer(kind: ModelKind, prompt: str, answer: list[str], expected: str) -> None:
    the_encoder = Encoder(task(prompt=prompt, labels=YES_NO), yes_no(), kind, 64)
    sample = one(the_encoder, text="")
    ids = the_encoder.tokenizer(expected)["input_ids"]
    if kind == "masked":
        ids.append(the_encoder.tokenizer.mask_token_id)
    assert list(sample.ids) == ids
    assert sample.position == len(ids) - 1
    assert the_encoder.tokenizer.convert_ids_to_tokens(the_encoder.label_ids({"label": 0})) == answer


def test_a_space_that_is_a_token_belongs_to_the_prompt() -> None:
    core = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, " ": 2, "yes": 3, "no": 4}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    the_encoder = Encoder(
        task(prompt="a {{ answer }}", labels=(Label(0, "no"), Label(1, "yes"))), tokenizer, "causal", 64
    )
    assert one(the_encoder, text="").ids == (1, 2)
    assert the_encoder.label_ids({"label": 0}) == [4, 3]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_an_answer_at_the_start_of_a_masked_prompt(tokenizer: str) -> None:
    """Label words have their space there, too (LM-BFF)."""
    the_encoder = encoder("masked", tokenizer, prompt="{{ answer }} . {{ text }}")
    sample = one(the_encoder, text="the film", label=1)
    tokens = the_encoder.tokenizer.convert_ids_to_tokens(list(sample.ids))
    assert tokens[sample.position] == "<mask>"
    assert sample.position == (1 if tokenizer == "metaspace" else 0)  # after its first token
    words = the_encoder.tokenizer.convert_ids_to_tokens(the_encoder.label_ids({"text": "the film", "label": 0}))
    assert words == [SPACE[tokenizer] + "terrible", SPACE[tokenizer] + "great"]


def test_a_word_of_several_tokens_that_ends_like_another() -> None:
    """What a causal prompt has after the answer is only what the tokenizer appends."""
    labels = (Label(0, "terrible film"), Label(1, "great film"))
    with pytest.raises(
        UserError, match=r"'terrible film' is not one token after this prompt but \['terrible', 'film'\]"
    ):
        encoder(labels=labels).label_ids({"text": "the plot", "label": 0})


def test_label_words_that_are_other_tokens_in_another_row() -> None:
    the_encoder = encoder(
        tokenizer="byte-level", prompt="{{ text }}{{ answer }}", labels=(Label(0, "t"), Label(1, "g"))
    )
    with pytest.raises(UserError, match=r"test sample 1, .*not one token after|test sample 1, .*label words are"):
        list(the_encoder.encode([{"text": "a:", "label": 0}, {"text": "grea", "label": 0}], "test"))


@pytest.mark.parametrize("declared", [{"eos_token": "<eos>"}, {}])
@pytest.mark.parametrize("words", [("terrible", "great"), ("terrible", "magnificent")])
def test_an_end_that_the_tokenizer_appends_is_not_the_label_words_fault(
    declared: dict[str, str], words: tuple[str, str]
) -> None:
    core = tokenizers.Tokenizer.from_str(TOKENIZERS["word-level"].backend_tokenizer.to_str())
    core.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 3)])
    ends = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", **declared)
    labels = (Label(0, words[0]), Label(1, words[1]))
    the_encoder = Encoder(task(labels=labels), ends, "causal", 64)
    if words[1] == "great":
        assert list(the_encoder.encode([{"text": "a film", "label": 0}], "train")) == [one(encoder(), text="a film")]
    else:
        message = fault(the_encoder, text="a film")
        assert "'magnificent' is not one token after this prompt but ['<unk>']; choose a word that is one" in message
