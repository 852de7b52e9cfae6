"""Losses and predictions against plain transformers calls and cross-entropy by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from mezo_dist.config.kinds.classification import ClassificationTask, Label
from mezo_dist.config.schema import ModelKind
from mezo_dist.tasks.batches import MicroBatch, cut
from mezo_dist.tasks.classification.kind import collate
from mezo_dist.tasks.classification.label_words import LabelWords, classifier
from mezo_dist.tasks.classification.prompts import Encoder, Sample
from mezo_dist.tasks.kind import Forward, Scores
from mezo_dist.testing import tiny_model, tiny_tokenizer

CAUSAL = ["llama", "llama-tied", "opt", "gpt2", "mixtral"]
MASKED = ["bert", "roberta", "distilbert"]
PAD = 0
TASK = ClassificationTask(
    name="tiny",
    data="nowhere",
    prompt="{{ text }} . It was {{ answer }}",
    labels=(Label(0, "terrible"), Label(1, "great"), Label(2, "boring")),
    plain=("{{ text }}",),
)
TEXTS = [
    "film",
    "a dull film but a great plot",
    "the scene",
    "It was a very slow , very flat story . the ending was weak",
]
ROWS: list[dict[str, Any]] = [{"text": text, "label": number % 3} for number, text in enumerate(TEXTS)]


def encoder(kind: ModelKind) -> Encoder:
    return Encoder(TASK, tiny_tokenizer(), kind, max_tokens=64)


def encoded(kind: ModelKind) -> list[Sample]:
    return list(encoder(kind).encode(ROWS, "train"))


def label_words(model: nn.Module, kind: ModelKind) -> LabelWords:
    return LabelWords(model, encoder(kind).label_ids(ROWS[0]), cut(encoded(kind)[:2], 2, PAD, collate)[0])


def by_hand(logits: list[float], label: int) -> tuple[float, int]:
    """Cross-entropy and prediction from the logits of the classes."""
    highest = max(logits)
    log_sum = highest + math.log(sum(math.exp(logit - highest) for logit in logits))
    return log_sum - logits[label], logits.index(highest)


def check(scores: Scores, batch: MicroBatch, expected: list[tuple[float, int]]) -> None:
    assert scores.loss.dtype == torch.float32
    assert scores.weight.tolist() == [1] * len(batch.slots)
    assert scores.loss.tolist() == pytest.approx([expected[slot][0] for slot in batch.slots], rel=1e-4, abs=1e-5)
    assert scores.payload.argmax(dim=-1).tolist() == [expected[slot][1] for slot in batch.slots]


# Prompted models


def prompted(model: Any, kind: ModelKind) -> list[tuple[float, int]]:
    """The same with plain calls: one sample at a time, nothing padded, all logits."""
    tokenizer = tiny_tokenizer()
    words = [tokenizer.convert_tokens_to_ids(word) for word in TASK.words]
    expected = []
    for row in ROWS:
        ids = tokenizer(f"{row['text']} . It was" + (" <mask>" if kind == "masked" else ""))["input_ids"]
        place = len(ids) - 1 if kind == "causal" else ids.index(tokenizer.mask_token_id)
        logits = model(input_ids=torch.tensor([ids])).logits[0, place]
        expected.append(by_hand([float(logits[word]) for word in words], row["label"]))
    return expected


@pytest.mark.parametrize(("name", "kind"), [(n, "causal") for n in CAUSAL] + [(n, "masked") for n in MASKED])
@torch.no_grad()
def test_label_words_are_the_cross_entropy_over_their_logits(name: str, kind: ModelKind) -> None:
    model = tiny_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # fresh models hardly tell classes apart
    expected = prompted(model, kind)
    objective = label_words(model, kind)
    assert len({prediction for _, prediction in expected}) > 1
    for size in (4, 2, 1):
        for batch in cut(encoded(kind), size, PAD, collate):
            check(objective(model, batch), batch, expected)


class Scaled(nn.Module):
    """A head that is no `nn.Linear`: the read-out must not touch it."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(hidden) * 3


@torch.no_grad()
def test_a_head_of_another_type_is_read_whole() -> None:
    model = tiny_model("llama")
    model.lm_head = Scaled(model.lm_head)
    batch = cut(encoded("causal"), 4, PAD, collate)[0]
    check(label_words(model, "causal")(model, batch), batch, prompted(model, "causal"))


@torch.no_grad()
def test_a_model_that_compares_logits_with_each_other_is_read_whole() -> None:
    """Its code after the head needs all of the vocabulary, so single rows would be wrong."""
    model, plain = tiny_model("llama"), tiny_model("llama")

    def normalised(module: nn.Module, args: Any, output: Any) -> Any:
        output.logits = output.logits.float() * 40 / output.logits.float().norm(dim=-1, keepdim=True)
        return output

    for each in (model, plain):
        each.register_forward_hook(normalised)
    batch = cut(encoded("causal"), 4, PAD, collate)[0]
    check(label_words(model, "causal")(model, batch), batch, prompted(plain, "causal"))


@torch.no_grad()
def test_losses_are_fp32_whatever_the_model_computes_in() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    logits = model(input_ids=torch.tensor([encoded("causal")[0].ids])).logits[0, -1].float()
    objective = label_words(model, "causal")
    words = [float(logits[i]) for i in encoder("causal").label_ids(ROWS[0])]
    scores = objective(model, cut(encoded("causal")[:1], 1, PAD, collate)[0])
    assert scores.loss.dtype == torch.float32
    assert float(scores.loss[0]) == pytest.approx(by_hand(words, 0)[0], rel=1e-4)


# Classification heads

SIZE: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CLASSIFIERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**SIZE, intermediate_size=48, num_labels=3, pad_token_id=PAD)
    ),
    "distilbert": lambda: transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(vocab_size=64, dim=32, n_layers=2, n_heads=2, hidden_dim=48, num_labels=3)
    ),
    # The next two read the last token that is no padding: they must find it.
    "gpt2": lambda: transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, num_labels=3, pad_token_id=PAD)
    ),
    "llama": lambda: transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**SIZE, intermediate_size=48, num_labels=3, pad_token_id=PAD)
    ),
}


def classifying(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)  # one with which every model below tells the texts apart
        model = CLASSIFIERS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    return model


@pytest.mark.parametrize("name", CLASSIFIERS)
@torch.no_grad()
def test_classifier_is_the_cross_entropy_of_the_head(name: str) -> None:
    model = classifying(name)
    expected = []
    for row in ROWS:
        logits = model(input_ids=torch.tensor([tiny_tokenizer()(row["text"])["input_ids"]])).logits[0]
        expected.append(by_hand(logits.tolist(), row["label"]))
    assert len({prediction for _, prediction in expected}) > 1
    for size in (4, 2, 1):
        for batch in cut(encoded("classifier"), size, PAD, collate):
            check(classifier(model, batch), batch, expected)


# Padding


def losses_alone_and_with_company(objective: Forward, model: nn.Module, kind: ModelKind) -> tuple[float, float]:
    """The loss of the first, short sample: alone, and padded to the length of longer ones."""
    alone = cut(encoded(kind)[:1], 1, PAD, collate)[0]
    company = cut(encoded(kind), 4, PAD, collate)[0]
    assert company.cost > 4 * alone.cost
    return float(objective(model, alone).loss[0]), float(objective(model, company).loss[company.slots.index(0)])


@pytest.mark.parametrize("name", [*CAUSAL, *MASKED])
@torch.no_grad()
def test_padding_does_not_change_the_answer_of_a_prompt(name: str) -> None:
    model = tiny_model(name)
    kind: ModelKind = "causal" if name in CAUSAL else "masked"
    alone, padded = losses_alone_and_with_company(label_words(model, kind), model, kind)
    assert padded == pytest.approx(alone, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", CLASSIFIERS)
@torch.no_grad()
def test_padding_does_not_change_the_answer_of_a_classifier(name: str) -> None:
    alone, padded = losses_alone_and_with_company(classifier, classifying(name), "classifier")
    assert padded == pytest.approx(alone, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("name", "kind"), [("llama", "causal"), ("bert", "masked")])
@torch.no_grad()
def test_the_padding_token_does_not_matter_to_a_prompt(name: str, kind: ModelKind) -> None:
    model = tiny_model(name)
    objective = label_words(model, kind)
    losses = [objective(model, cut(encoded(kind), 4, pad, collate)[0]).loss for pad in (PAD, 3, 17)]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])
