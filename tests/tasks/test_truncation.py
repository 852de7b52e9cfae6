"""A text too long for the model is cut, and the rest of the prompt stays."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import tokenizers
from tokenizers import models, normalizers
from transformers import PreTrainedTokenizerFast

from mezo_dist.config.kinds.classification import Label
from mezo_dist.config.schema import ModelKind
from mezo_dist.config.task import TruncateSide
from mezo_dist.tasks import encoding
from mezo_dist.tasks.classification.prompts import Encoder
from tests.tasks.encoders import SPACE, TOKENIZERS, encoder, fault, one, task


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("kind", ["causal", "masked"])
@pytest.mark.parametrize("window", [12, 17, 30])
def test_a_long_text_is_cut_and_the_rest_of_the_prompt_stays(tokenizer: str, kind: ModelKind, window: int) -> None:
    prompt = "{{ text }} Is the {{ what }} good ? {{ answer }}"
    the_encoder = encoder(kind, tokenizer, window, prompt=prompt)
    rest = {"what": "film"}
    long, short = one(the_encoder, text="the plot  was great and " * 20, **rest), one(the_encoder, text="x", **rest)
    question = the_encoder.tokenizer(
        " Is the film good ?" + ("<mask>" if kind == "masked" else ""), add_special_tokens=False
    )
    tail = tuple(question["input_ids"])
    if tokenizer == "metaspace":  # puts a mark before a first space too
        tail = tail[1:] if the_encoder.tokenizer.convert_ids_to_tokens(tail[0]) == SPACE[tokenizer] else tail
    assert short.ids[-len(tail) :] == tail
    assert long.ids[-len(tail) :] == tail
    assert window - 3 <= len(long.ids) <= window
    head = the_encoder.tokenizer("the plot  was great and " * 20)["input_ids"][: len(long.ids) - len(tail) - 1]
    assert list(long.ids[: len(head)]) == head


def space_runs() -> Any:
    """As of the first Llamas: characters and spaces alike, and two spaces in a row are one token."""
    letters = {letter: number for number, letter in enumerate(["<unk>", "\u2581\u2581", "\u2581", *"abcIt"])}
    core = tokenizers.Tokenizer(models.BPE(letters, [("\u2581", "\u2581")], unk_token="<unk>"))
    core.normalizer = normalizers.Replace(" ", "\u2581")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


@pytest.mark.parametrize("window", range(6, 13))
def test_a_cut_text_leaves_no_space_that_would_join_what_follows(window: int) -> None:
    labels = (Label(0, "a"), Label(1, "b"))
    the_encoder = Encoder(task(prompt="{{ text }} It {{ answer }}", labels=labels), space_runs(), "causal", window)
    words = the_encoder.tokenizer.convert_ids_to_tokens(one(the_encoder, text="ab c ab c ab c ab c").ids)
    assert words[-4:] == ["\u2581", "I", "t", "\u2581"]
    assert words[:2] == ["a", "b"]


def test_of_several_fields_the_longest_is_cut() -> None:
    the_encoder = encoder(prompt="{{ a }} . {{ b }} . It was {{ answer }}", truncate=("a", "b"), window=20)
    sample = one(the_encoder, a="film " * 40, b="plot " * 3)
    words = the_encoder.tokenizer.convert_ids_to_tokens(sample.ids)
    assert words == ["film"] * 13 + ["."] + ["plot"] * 3 + [".", "It", "was"]


def test_both_of_two_long_fields_are_cut() -> None:
    the_encoder = encoder(prompt="{{ a }} . {{ b }} . It was {{ answer }}", truncate=("a", "b"), window=12)
    words = the_encoder.tokenizer.convert_ids_to_tokens(one(the_encoder, a="film " * 30, b="plot " * 31).ids)
    assert len(words) <= 12
    assert words[-3:] == [".", "It", "was"]


def test_what_fits_exactly_is_left_alone() -> None:
    text = "film " * 30
    whole = one(encoder(window=64), text=text)
    assert one(encoder(window=len(whole.ids)), text=text) == whole
    assert len(one(encoder(window=len(whole.ids) - 1), text=text).ids) == len(whole.ids) - 1


@pytest.mark.parametrize("character", ["\U0001f600", "\u00e9", "\u4e2d"])
def test_characters_of_several_tokens_are_cut_whole(character: str) -> None:
    the_encoder = encoder(tokenizer="byte-level", window=16)
    sample = one(the_encoder, text=character * 40)
    text = the_encoder.tokenizer.decode(sample.ids)
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
    the_encoder = Encoder(task(), Slow(TOKENIZERS["byte-level"]), "causal", 12)
    sample = one(the_encoder, text="the film was great " * 20)
    assert 9 <= len(sample.ids) <= 12
    assert the_encoder.tokenizer.decode(sample.ids).startswith("the film was")
    assert the_encoder.tokenizer.decode(sample.ids).endswith(" It was")


@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_a_very_long_text_is_cut_before_it_is_tokenised(kind: ModelKind) -> None:
    """A million characters; the sample is the one of the whole text."""
    longest = [0]

    class Counting(Slow):
        is_fast = True

        def __call__(self, text: str, **options: Any) -> Any:
            longest[0] = max(longest[0], len(text))
            return self.fast(text, **options)

    text = "the film was great " * 53_000
    counting = Encoder(task(plain=("{{ text }}",)), Counting(TOKENIZERS["word-level"]), kind, 64)
    whole = Encoder(task(plain=("{{ text }}",)), TOKENIZERS["word-level"], kind, 64)
    assert one(counting, text=text) == one(whole, text=text[:40_000])
    assert longest[0] < 60_000
    assert len(one(counting, text="." + " " * 200_000 + text).ids) == 64, "what is no token takes no place"


def test_encoding_that_takes_long_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(encoding, "SILENT_S", -1.0)
    caplog.set_level("INFO")
    list(encoder().encode([{"label": 0, "text": "a film"}] * 3, "test"))
    assert "encoding the test split: 3 of 3 rows, " in caplog.text


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("window", [12, 17])
@pytest.mark.parametrize("slow", [False, True])
def test_the_start_of_a_text_is_cut_off(tokenizer: str, window: int, slow: bool) -> None:
    text = "the plot was great and " * 20 + "the film was good"
    used = Slow(TOKENIZERS[tokenizer]) if slow else TOKENIZERS[tokenizer]
    the_encoder = Encoder(
        task(prompt="It is {{ text }} . It was {{ answer }}", truncate_side="left"), used, "causal", window
    )
    sample = one(the_encoder, text=text)
    assert window - 4 <= len(sample.ids) <= window
    # What is left are the last words of the whole prompt, and before them its first ones.
    whole = one(dataclasses.replace(the_encoder, max_tokens=10_000), text=text)
    kept = next(n for n in range(len(sample.ids) - 1, -1, -1) if sample.ids[-n:] == whole.ids[-n:])
    assert kept >= window - 6
    assert sample.ids[:2] == whole.ids[:2]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_classifier_cuts_the_end_that_is_asked_for(side: TruncateSide) -> None:
    tokenizer = TOKENIZERS["word-level"]
    the_encoder = Encoder(task(plain=("{{ text }}",), truncate_side=side), tokenizer, "classifier", 4)
    words = tokenizer.convert_ids_to_tokens(one(the_encoder, text="the film was great and the plot was terrible").ids)
    assert words == (["the", "film", "was", "great"] if side == "right" else ["the", "plot", "was", "terrible"])
    assert tokenizer.truncation_side == "right", "what is exported with the model is the tokenizer as it was"


def test_the_last_part_of_a_very_long_text() -> None:
    the_encoder = encoder(truncate_side="left", window=8)
    sample = one(the_encoder, text="film " * 40_000 + "the plot")
    assert the_encoder.tokenizer.convert_ids_to_tokens(sample.ids)[-4:] == ["the", "plot", "It", "was"]


def test_a_field_inside_another_is_cut() -> None:
    the_encoder = encoder(prompt="{{ passage.text }} . It was {{ answer }}", truncate=("passage.text",), window=8)
    row = {"passage": {"text": "film " * 40, "id": 3}}
    sample = one(the_encoder, **row)
    assert the_encoder.tokenizer.convert_ids_to_tokens(sample.ids) == ["film"] * 5 + [".", "It", "was"]
    assert row["passage"]["text"] == "film " * 40


@pytest.mark.parametrize("kind", ["causal", "masked", "classifier"])
@pytest.mark.parametrize(
    ("truncate", "expected"),
    [
        (("txet",), "task.truncate: there is no field 'txet', only ['label', 'passage.text', 'tags', 'text']"),
        (("text", "passage.txet"), "task.truncate: there is no field 'passage.txet', only "),
        (("passage",), "task.truncate: the field 'passage' is no text but a dict; name a text in it: ['passage.text']"),
        (("tags",), "task.truncate: the field 'tags' is no text but a list"),
    ],
)
def test_a_wrong_name_is_refused_even_if_all_is_short(
    kind: ModelKind, truncate: tuple[str, ...], expected: str
) -> None:
    the_encoder = encoder(kind, truncate=truncate, plain=("{{ text }}",))
    assert expected in fault(the_encoder, text="a film", passage={"text": "a plot"}, tags=["a"])


def test_unless_told_otherwise_the_text_is_cut_where_there_is_one() -> None:
    assert len(one(encoder(window=8), text="film " * 40).ids) == 8
    the_encoder = encoder(window=8, prompt="{{ sentence }} It was {{ answer }}")
    assert "even without the text of [] (task.truncate)" in fault(the_encoder, sentence="film " * 40)


def test_a_field_without_a_value_is_nothing_to_cut() -> None:
    the_encoder = encoder(
        prompt="{% if title %}{{ title }}{% endif %}{{ text }} It was {{ answer }}", truncate=("title", "text")
    )
    assert one(the_encoder, text="a film", title=None) == one(encoder(), text="a film")
