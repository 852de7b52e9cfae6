"""Texts with a start in common have the tokens that they have as a whole, and their start is tokenised once."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mezo_dist.errors import UserError
from mezo_dist.tasks.endings import PATTERNS, Endings, cuts_at_spaces
from mezo_dist.tasks.text import TextEncoder
from tests.tasks.encoders import SENTENCES, TOKENIZERS

ADDED = [AddedToken("<mask>", lstrip=True, special=True), AddedToken("<one>", single_word=True), AddedToken("Great")]
PIECES = ["film", "great", "Great", "was", " ", " ", "  ", ".", ",", "'s", "12", "345", "\n", "é", "e\u0301", "\u0308"]
PIECES += ["<mask>", "<one>", "\u00a0", "\u2000", "\x07", "\ufdd0", "電", "\t", "ﬁ", "?!", "-", "\u1fef"]


def built(pre: Any, normalizer: Any = None, around: str | None = None, added: Sequence[AddedToken] = ADDED) -> Any:
    core = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    core.pre_tokenizer, core.normalizer = pre, normalizer
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    core.train_from_iterator([*SENTENCES, *PIECES] * 9, trainer)
    core.add_tokens(list(added))
    if around is not None:
        core.post_processor = processors.TemplateProcessing(single=around, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def split(pattern: str, behavior: str = "isolated") -> Any:
    return pre_tokenizers.Split(tokenizers.Regex(pattern), behavior)


def byte_level(*, cuts: bool, prefix: bool = False) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=cuts)


CUT = {
    "GPT-2": built(byte_level(cuts=True)),
    "RoBERTa": built(byte_level(cuts=True), None, "<s> $A </s>"),
    "a space first": built(byte_level(cuts=True, prefix=True)),
    "SmolLM": built(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level(cuts=True)])),
    "BERT": built(pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer(), "<s> $A </s>"),
    "words": built(pre_tokenizers.Whitespace(), normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])),
    "spaces": built(pre_tokenizers.WhitespaceSplit(), normalizers.NFC(), "<s> $A"),
    "Llama 3": built(pre_tokenizers.Sequence([split(PATTERNS[0]), byte_level(cuts=False)]), None, "<s> $A"),
    "Qwen": built(pre_tokenizers.Sequence([split(PATTERNS[1]), byte_level(cuts=False)]), normalizers.NFC()),
}


SAID = {word: number for number, word in enumerate("the film It was great terrible".split())}


class Custom:
    """Code of somebody's own."""

    def pre_tokenize(self, text: Any) -> None:
        """Cuts nowhere."""


WHOLE = {
    "code of its own": built(None),
    "one piece": built(None),
    "sentencepiece": TOKENIZERS["metaspace"],
    "spaces are letters": built(byte_level(cuts=False)),
    "spaces are letters first": built(pre_tokenizers.Sequence([byte_level(cuts=False), pre_tokenizers.Whitespace()])),
    "another pattern": built(split(r"was great|\s+")),
    "a pattern that merges": built(split(PATTERNS[0], "merged_with_next")),
    "letters that are composed with spaces": built(pre_tokenizers.Whitespace(), normalizers.NFKC()),
    "a token that takes the space after it": built(
        pre_tokenizers.Whitespace(), added=[AddedToken("<mask>", rstrip=True)]
    ),
    "a token of two words": built(pre_tokenizers.Whitespace(), added=[AddedToken("was great")]),
}


WHOLE["code of its own"].backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Custom())


def texts(number: int) -> list[tuple[str, list[str]]]:
    """Starts, with two or three endings each."""
    draw = random.Random(number)
    ends = ["great", "terrible", "Great", "<mask>", "'s", "great film .", "é", "\u0308", "<one>", " great", "12", "\n"]
    some = []
    for _ in range(number):
        start = "".join(draw.choices(PIECES, k=draw.randint(0, 9)))
        some.append((start + draw.choice([" It was ", " was", "", " "]), draw.sample(ends, draw.randint(2, 3))))
    return some


@pytest.mark.parametrize("name", CUT)
def test_tokens_are_those_of_whole_texts(name: str) -> None:
    tokenizer, calls = CUT[name], []

    def tokenise(some: Sequence[str]) -> list[list[int]]:
        calls.append(len(some))
        return [tokenizer(text)["input_ids"] for text in some]

    assert cuts_at_spaces(tokenizer.backend_tokenizer)
    endings = Endings(tokenizer, tokenise)
    for before, ends in texts(600):
        assert endings.tokenised(before, ends) == [tokenizer(before + end)["input_ids"] for end in ends], (before, ends)
    calls.clear()
    for number in range(50):
        endings.tokenised(f"film {number}. It was ", ["great", "terrible"])
    assert sum(calls) <= 52, "a start is tokenised once, and the ends once for all of them"


@pytest.mark.parametrize("name", WHOLE)
def test_other_tokenizers_see_whole_texts(name: str) -> None:
    assert not cuts_at_spaces(WHOLE[name].backend_tokenizer)
    encoder = TextEncoder(WHOLE[name], 64, None)
    for before, ends in texts(20):
        assert encoder.tokenize_endings(before, ends) == encoder.tokenize_all([before + end for end in ends])


@pytest.mark.parametrize(("vocabulary", "limit"), [(SAID, None), ({**SAID, "a": 50}, 50)])
def test_texts_do_not_need_the_letter_that_ends_are_looked_at_behind(
    vocabulary: dict[str, int], limit: int | None
) -> None:
    core = tokenizers.Tokenizer(models.WordLevel(vocabulary))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=core), 64, None, num_tokens=limit)
    assert encoder.tokenize_endings("the film It was ", ["great", "terrible"]) == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 5]]


def test_unknown_tokens_are_named_as_in_whole_texts() -> None:
    encoder = TextEncoder(CUT["RoBERTa"], 64, None)
    before = "the film was great . It was "
    most = max(map(max, encoder.tokenize_all([before + "great", before + "terrible"])))
    for limit in range(most + 2):
        limited, messages = TextEncoder(CUT["RoBERTa"], 64, None, num_tokens=limit), []
        for tokenise in (
            lambda encoder=limited: encoder.tokenize_endings(before, ["great", "terrible"]),
            lambda encoder=limited: encoder.tokenize_all([before + "great", before + "terrible"]),
        ):
            try:
                messages.append(str(tokenise()))
            except UserError as error:
                messages.append(str(error))
        assert messages[0] == messages[1]
