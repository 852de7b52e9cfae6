"""Texts have the tokens that they have as a whole, and what most of them are of is tokenised once."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mezo_dist.errors import UserError
from mezo_dist.tasks import pieces as pieces_module
from mezo_dist.tasks.encoding import encode_rows
from mezo_dist.tasks.fields import Row
from mezo_dist.tasks.pieces import PATTERNS, Pieces, cuts_at_spaces, pieces_of
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
    core.train_from_iterator([*SENTENCES, *PIECES, "| | 1|"] * 9, trainer)
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


def whole_tokens(tokenizer: Any, some: Sequence[str], calls: list[str]) -> list[list[int]]:
    calls += some
    return [one.ids for one in tokenizer.backend_tokenizer.encode_batch_fast(list(some))]


def joined(start: list[int], ends: Sequence[tuple[int, ...]]) -> list[list[int]]:
    return [[*start, *end] for end in ends]


@pytest.mark.parametrize("name", CUT)
def test_tokens_are_those_of_whole_texts(name: str) -> None:
    tokenizer, calls = CUT[name], list[str]()
    assert cuts_at_spaces(tokenizer.backend_tokenizer)
    pieces = Pieces(tokenizer, lambda some: whole_tokens(tokenizer, some, calls))
    for before, ends in texts(600):
        whole = [tokenizer(before + end)["input_ids"] for end in ends]
        assert joined(*pieces.with_endings(before, ends)) == whole, (before, ends)
        assert pieces.tokenised(before + ends[0]) == whole[0], (before, ends)
        assert pieces.largest >= max(max(ids, default=0) for ids in whole)
    calls.clear()
    pieces = Pieces(tokenizer, lambda some: whole_tokens(tokenizer, some, calls))
    for number in range(50):
        pieces.with_endings(f"film {number % 5}. It was ", ["great", "terrible"])
    assert " ".join(calls).count("film") <= 2, "the second time in a text, to see whether they agree"
    assert " ".join(calls).count("It") <= 2
    assert len(calls) <= 12


@pytest.mark.parametrize(
    "text", ["", " ", "a", " a b", "a  b", "a b ", "a\n b", "é b c", "a\tb c", "a\x7f b", "a b\u00a0 c d"]
)
def test_texts_are_cut_behind_visible_ascii(text: str) -> None:
    expected = [""]
    for place, letter in enumerate(text):
        if place and letter == " " and "!" <= text[place - 1] <= "~":
            expected.append("")
        else:
            expected[-1] += letter
    assert pieces_of(text) == expected


@pytest.mark.parametrize("name", [*CUT, *WHOLE])
def test_many_rows_have_the_tokens_of_whole_texts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are forgotten and learnt again, and some are not worth it."""
    monkeypatch.setattr(pieces_module, "MOST_KNOWN", 40)
    monkeypatch.setattr(pieces_module, "LONGEST", 7)
    monkeypatch.setattr(pieces_module, "LEAST_USES", len(name) % 2)
    tokenizer = {**CUT, **WHOLE}[name]
    rows: list[dict[str, Any]] = [{"before": before, "ends": ends} for before, ends in texts(300)]
    encoder = TextEncoder(tokenizer, 64, None)
    whole = [[tokenizer(row["before"] + end)["input_ids"] for end in row["ends"]] for row in rows]
    ends = encode_rows(rows, "train", lambda row: joined(*encoder.tokenize_endings(row["before"], row["ends"])))
    assert list(ends) == whole
    all_of_them = encode_rows(
        rows, "train", lambda row: encoder.tokenize_all([row["before"] + end for end in row["ends"]])
    )
    assert list(all_of_them) == whole


def test_what_the_next_piece_might_join_is_looked_at_by_itself() -> None:
    tokenizer, calls = CUT["GPT-2"], list[str]()
    pieces = Pieces(tokenizer, lambda some: whole_tokens(tokenizer, some, calls))
    for end in ("é", "film\n", "", "film\u00a0"):
        calls.clear()
        pieces.tokenised(f"film 12 345 {end}")
        assert f"| {end}" in calls
        assert not any(f"| {end} |" in call for call in calls)


def test_pieces_that_are_of_no_use_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces_module, "MOST_KNOWN", 40)
    tokenizer, calls = CUT["GPT-2"], list[str]()
    for vocabulary, is_of_use in ((10**6, False), (30, True)):
        pieces = Pieces(tokenizer, lambda some: whole_tokens(tokenizer, some, calls))
        draw = random.Random(0)
        for _ in range(100):
            pieces.tokenised(f"{draw.randrange(vocabulary)} {draw.randrange(vocabulary)} film film film film")
        assert pieces.is_of_use is is_of_use


def test_texts_that_differ_from_their_pieces_are_not_taken() -> None:
    tokenizer, calls = CUT["RoBERTa"], list[str]()

    def joining(some: Sequence[str]) -> list[list[int]]:
        return whole_tokens(tokenizer, [text.replace("very good", "great") for text in some], calls)

    pieces = Pieces(tokenizer, joining)
    with pytest.raises(RuntimeError, match="makes other tokens of 'a very good film' than of its pieces"):
        pieces.tokenised("a very good film")
    assert not Pieces(tokenizer, lambda some: [ids[:-1] for ids in joining(some)]).is_of_use
    with pytest.raises(RuntimeError, match="makes other tokens of 'film' than of its pieces"):
        Pieces(tokenizer, lambda some: [ids[: len(ids) - ("film" in some)] for ids in joining(some)]).tokenised("film")


@pytest.mark.parametrize("name", WHOLE)
def test_other_tokenizers_see_whole_texts(name: str) -> None:
    assert not cuts_at_spaces(WHOLE[name].backend_tokenizer)
    assert not Pieces(WHOLE[name], lambda _: []).is_of_use


@pytest.mark.parametrize(("vocabulary", "limit"), [(SAID, None), ({**SAID, "a": 50}, 50)])
def test_texts_do_not_need_the_letter_that_pieces_are_looked_at_behind(
    vocabulary: dict[str, int], limit: int | None
) -> None:
    core = tokenizers.Tokenizer(models.WordLevel(vocabulary))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=core), 64, None, num_tokens=limit)
    rows = [{"text": "the film It was "}] * 3
    expected = [[0, 1, 2, 3, 4], [0, 1, 2, 3, 5]]
    samples = encode_rows(
        rows, "train", lambda row: joined(*encoder.tokenize_endings(row["text"], ["great", "terrible"]))
    )
    assert list(samples) == [expected] * 3


def test_unknown_tokens_are_named_as_in_whole_texts() -> None:
    before, ends = "the film was great . It was ", ["great", "terrible"]
    most = max(map(max, TextEncoder(CUT["RoBERTa"], 64, None).tokenize_all([before + end for end in ends])))
    refused = set()
    for limit in range(most + 2):
        limited = TextEncoder(CUT["RoBERTa"], 64, None, num_tokens=limit)
        said = {
            _refusal(lambda _: limited.tokenize_all([before + end for end in ends]), 0),  # noqa: B023 (called here)
            _refusal(lambda _: limited.tokenize_endings(before, ends), 1),  # noqa: B023
            _refusal(lambda _: limited.tokenize_endings(before, ends), 3),  # noqa: B023
            _refusal(lambda _: limited.tokenize_all([before + end for end in ends]), 3),  # noqa: B023
        }
        assert len(said) == 1, said
        refused |= said
    assert "" in refused
    assert len(refused) > 2


def _refusal(encode: Callable[[Row], object], num_rows: int) -> str:
    """What is said of texts, among so many rows, or by themselves (0); empty if they are taken."""
    try:
        if num_rows:
            list(encode_rows([{}] * num_rows, "train", encode))
        else:
            encode({})
    except UserError as error:
        return str(error).removeprefix("train sample 0, {}: ")
    return ""
