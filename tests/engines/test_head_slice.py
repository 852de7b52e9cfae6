"""The read-out computes what gathering from whole logits would give, inside a fan-out too, or is not used."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mezo_dist.algorithms.base import Variant
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.law import Law
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.lockstep.head_slice import HeadSlice
from mezo_dist.tasks.batches import MicroBatch, cut
from mezo_dist.tasks.classification.kind import collate
from mezo_dist.tasks.classification.label_words import LabelWords
from mezo_dist.tasks.classification.prompts import Sample
from mezo_dist.testing import tiny_model

LABELS = [40, 7, 22]
# Answers are read at different places, never the last one of the longest sample alone.
SAMPLES = [
    Sample(tuple(range(5, 5 + n)), n % 3, place) for n, place in ((9, 8), (4, 3), (9, 2), (6, 5), (3, 0), (7, 4))
]

every_head = pytest.mark.parametrize("kind", ["llama", "llama-tied", "opt", "gpt2", "bert", "roberta", "distilbert"])


def micro_batches() -> list[MicroBatch]:
    return cut(SAMPLES, 2, 0, collate)


def gathered(model: nn.Module, batch: MicroBatch) -> Tensor:
    """[n, labels] from the logits of all positions and words."""
    with torch.no_grad():
        logits = model(**batch.inputs).logits
    return logits[torch.arange(len(batch.slots)), batch.targets["position"]][:, LABELS]


def cross_entropy(model: nn.Module, batch: MicroBatch) -> Tensor:
    return nn.functional.cross_entropy(gathered(model, batch), batch.targets["label"], reduction="none")


def close(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


@every_head
def test_only_wanted_rows_and_positions_are_computed(kind: str) -> None:
    model = tiny_model(kind)
    batch = micro_batches()[0]
    wanted = gathered(model, batch)
    head_slice = HeadSlice(model.get_output_embeddings(), torch.tensor(LABELS))
    with torch.no_grad():
        everywhere = model(**batch.inputs).logits
        token = HeadSlice.at(batch.targets["position"])
        here = model(**batch.inputs).logits
        HeadSlice.reset(token)
        again = model(**batch.inputs).logits
    head_slice.detach()
    assert here.shape == (2, 1, len(LABELS))
    assert everywhere.shape == again.shape == (2, batch.inputs["input_ids"].shape[1], len(LABELS))
    close(here[:, 0], wanted)
    close(everywhere[torch.arange(2), batch.targets["position"]], wanted)
    assert torch.equal(everywhere, again)


@every_head
def test_losses_in_a_fan_out_are_those_of_whole_logits(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Every pass of a fan-out reads at the positions of its own micro-batch."""
    caplog.set_level(logging.INFO, "mezo_dist")
    model = tiny_model(kind)
    wanted = [cross_entropy(model, batch) for batch in micro_batches()]
    engine = Engine(model, Law("gaussian"))
    objective = LabelWords(model, LABELS, micro_batches()[0])
    assert caplog.messages == []  # no fall-back: the read-out is what is tested
    variants = [Variant(), Variant(Combination.single(3, 1e-2))]
    results = engine.evaluate(variants, micro_batches(), objective)
    engine.add(variants[1].shift, rounding_seed=0)
    moved = [objective(model, batch) for batch in micro_batches()]
    for row, loss, after in zip(results, wanted, moved, strict=True):
        close(row[0].loss, loss)
        assert row[0].loss.dtype == torch.float32
        assert torch.equal(row[1].loss, after.loss)
        assert torch.equal(row[1].payload, after.payload)


@every_head
def test_detaches_without_a_trace(kind: str) -> None:
    model = tiny_model(kind)
    batch = micro_batches()[0]
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    wanted = gathered(model, batch)
    head_slice = HeadSlice(model.get_output_embeddings(), torch.tensor(LABELS))
    head_slice.detach()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not model.get_output_embeddings()._forward_pre_hooks
    assert torch.equal(gathered(model, batch), wanted)


class Headed(nn.Module):
    """The head is part of a module that owns a weight too, so both are served together."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 2, 32))
        self.linear = nn.Linear(32, 64)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden * self.scale)


def test_a_head_inside_another_module_reads_at_the_places_of_its_own_pass() -> None:
    model = tiny_model("llama")
    model.lm_head = Headed()
    model.get_output_embeddings = lambda: model.lm_head.linear
    wanted = [cross_entropy(model, batch) for batch in micro_batches()]
    objective = LabelWords(model, LABELS, micro_batches()[0])
    results = Engine(model, Law("gaussian")).evaluate([Variant()], micro_batches(), objective)
    for row, loss in zip(results, wanted, strict=True):
        close(row[0].loss, loss)


class Wrapped(nn.Module):
    """A model that does something to its logits."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how = tiny_model("llama"), how
        self.bias = nn.Parameter(torch.linspace(-1, 1, 64))
        if how == "another head":
            self.inner.lm_head = nn.Sequential(self.inner.lm_head)

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.inner.lm_head
        return head

    def forward(self, **inputs: Tensor) -> Any:
        result = self.inner(**inputs)
        logits = result.logits
        if self.how == "adds a bias per word":
            logits = logits + self.bias
        elif self.how == "compares with all words":
            logits = logits * logits.abs().amax(dim=-1, keepdim=True)
        elif self.how == "keeps the last position":
            logits = logits[:, -1:].expand_as(logits)
        elif self.how == "caps them":
            logits = torch.tanh(logits / 2) * 2
        result.logits = logits
        return result


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("adds a bias per word", "changes its logits after the head"),
        ("keeps the last position", "changes its logits after the head"),
        ("compares with all words", "changes its logits after the head"),
        ("another head", "the output head is a Sequential"),
    ],
)
def test_falls_back_with_a_line_in_the_log(how: str, line: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mezo_dist")
    model = Wrapped(how)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    engine = Engine(model, Law("gaussian"))
    objective = LabelWords(model, LABELS, micro_batches()[0])
    assert [line in message and "whole vocabulary" in message for message in caplog.messages] == [True]
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    results = engine.evaluate([Variant()], micro_batches(), objective)
    for row, batch in zip(results, micro_batches(), strict=True):
        assert torch.equal(row[0].loss, cross_entropy(model, batch))


def test_survives_what_works_word_by_word(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mezo_dist")
    model = Wrapped("caps them")
    wanted = cross_entropy(model, micro_batches()[0])
    objective = LabelWords(model, LABELS, micro_batches()[0])
    assert caplog.messages == []
    with torch.no_grad():
        close(objective(model, micro_batches()[0]).loss, wanted)
