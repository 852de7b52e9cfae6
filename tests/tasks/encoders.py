"""A task, tokenisers of three kinds, and what an encoder makes of them; for the tests of mezo_dist/tasks/."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mezo_dist.config.kinds.classification import ClassificationTask, Label
from mezo_dist.config.schema import ModelKind
from mezo_dist.config.task import Split, Splits
from mezo_dist.errors import UserError
from mezo_dist.tasks.classification.prompts import Encoder, Sample
from mezo_dist.testing import tiny_tokenizer

MASK = "<mask>"
LABELS = (Label(0, "terrible"), Label(1, "great"))


def task(**changes: Any) -> ClassificationTask:
    splits = Splits(Split("train", 5), Split("train", 3), Split("train", 4))
    base = ClassificationTask(
        name="reviews", data="nowhere", prompt="{{ text }} It was {{ answer }}", labels=LABELS, splits=splits
    )
    return dataclasses.replace(base, **changes)


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


def tokenizer_for(*texts: str) -> Any:
    """A token for each word, with the space before it, and for each other character."""
    pattern = tokenizers.Regex(r" ?[A-Za-z0-9]+|\s|[^A-Za-z0-9\s]")
    split = pre_tokenizers.Split(pattern, "isolated")
    pieces = sorted({piece for text in texts for piece, _ in split.pre_tokenize_str(text)} - {MASK})
    core = tokenizers.Tokenizer(models.WordLevel({p: i for i, p in enumerate(["<unk>", MASK, *pieces])}, "<unk>"))
    core.pre_tokenizer = split
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", mask_token=MASK)


def encoder(kind: ModelKind = "causal", tokenizer: str = "word-level", window: int = 64, **changes: Any) -> Encoder:
    return Encoder(task(**changes), TOKENIZERS[tokenizer], kind, window)


def one(encoder: Encoder, **fields: Any) -> Sample:
    (sample,) = encoder.encode([{"label": 0, **fields}], "train")
    return sample


def fault(encoder: Encoder, **fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        one(encoder, **fields)
    return str(caught.value)
