"""Regression: squared errors and correlations against numbers computed by hand; and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torchmetrics.functional import regression as tm

from mezo_dist.algorithms.base import Evaluation, Variant
from mezo_dist.config import reader
from mezo_dist.config.kinds.regression import RegressionTask
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.errors import UserError
from mezo_dist.models.frozen_cache import run_whole
from mezo_dist.runs.build import build_run
from mezo_dist.tasks.batches import cut
from mezo_dist.tasks.kind import Bench, TextModel
from mezo_dist.tasks.regression.kind import Regression
from mezo_dist.tasks.regression.metrics import pearson, spearman
from mezo_dist.testing import tiny_tokenizer
from tests.tasks.kind_configs import write_kind_config
from tests.tasks.test_prompts import bert_like

TASK = RegressionTask(name="t", data="nowhere", plain=("{{ text }}",), label="score")
ROWS: list[dict[str, Any]] = [
    {"text": "the film was great", "score": 5},
    {"text": "a very dull plot", "score": "0.5"},
    {"text": "film", "score": 2.25},
]


def kind(**changes: Any) -> Regression:
    return Regression(dataclasses.replace(TASK, **changes), TextModel(tiny_tokenizer(), "classifier", 64, None))


@torch.no_grad()
def test_losses_are_squared_errors_of_the_heads_output() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, num_labels=1
    )
    model, task = transformers.BertForSequenceClassification(config).eval(), kind()
    batches = cut(list(task.encode(ROWS, "train")), 2, 0, task.collate)
    forward = task.forward(Bench(model, ROWS[0], batches[0], lambda _: run_whole, lambda f: f(model, batches[0])))
    for batch in batches:
        scores = forward(model, batch)
        for place, slot in enumerate(batch.slots):
            ids = tiny_tokenizer()(ROWS[slot]["text"])["input_ids"]
            output = float(model(input_ids=torch.tensor([ids])).logits[0, 0])
            assert float(scores.payload[place, 0]) == pytest.approx(output, rel=1e-4)
            assert float(scores.loss[place]) == pytest.approx((output - float(ROWS[slot]["score"])) ** 2, rel=1e-4)
            assert int(scores.weight[place]) == 1


def test_correlations() -> None:
    task = kind()
    batches = cut(list(task.encode(ROWS, "train")), 2, 0, task.collate)
    figures = task.summarise(0.0, torch.tensor([[3.0], [1.0], [4.0]]), batches)  # for 5, 0.5 and 2.25
    assert figures == {"pearson": pytest.approx(0.553134, abs=1e-6), "spearman": pytest.approx(0.5)}


@pytest.mark.parametrize("seed", range(3))
def test_correlations_are_those_of_torchmetrics(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    one, other = (torch.randint(0, 12, (40,), generator=generator).double() for _ in range(2))  # many are equal
    assert pearson(one, other) == pytest.approx(float(tm.pearson_corrcoef(one, other)), abs=1e-6)
    assert spearman(one, other) == pytest.approx(float(tm.spearman_corrcoef(one, other)), abs=1e-6)
    assert pearson(one, torch.ones(40)) == spearman(torch.ones(40), one) == 0.0


def test_a_pair_of_texts() -> None:
    read = bert_like()
    task = dataclasses.replace(TASK, plain=("{{ text }}", "{{ other }}"))
    encoder = Regression(task, TextModel(read, "classifier", 64, None))
    (sample,) = encoder.encode([{**ROWS[0], "other": "dull"}], "train")
    wanted = read("the film was great", "dull")
    assert (list(sample.ids), list(sample.types)) == (wanted["input_ids"], wanted["token_type_ids"])


@pytest.mark.parametrize("score", ["many", None, float("nan"), True])
def test_what_is_no_number_is_refused(score: Any) -> None:
    with pytest.raises(UserError, match=r"train sample 0.*task\.label: .* is no finite number.*task\.where: {drop: "):
        list(kind().encode([{**ROWS[0], "score": score}], "train"))


def test_the_curvature_of_squared_errors_is_that_of_the_loss_on_average(tmp_path: Path) -> None:
    """``lr: auto`` reads it off slopes; of the head, in which predictions are linear, it is the second difference."""
    options = ['model.trainable=["classifier.*"]', "algorithm.lr=auto", "algorithm.eps=0.1", "train.batch_size=20"]
    path = write_kind_config(tmp_path, "regression")
    run = build_run(reader.load(path, [*options, "algorithm.directions=100"]), Communicator())
    losses = run.evaluator.losses(run.algorithm.plan(run.algorithm.init(), 0), run.batch("minibatch", 0), ())
    here = run.evaluator.losses(Evaluation((Variant(),)), run.batch("minibatch", 0), ())
    assert losses is not None
    assert losses.curvature is not None
    assert here is not None
    ahead, behind = losses.mean[0::2], losses.mean[1::2]
    second = [(plus + minus - 2 * here.mean[0]) / 0.1**2 for plus, minus in zip(ahead, behind, strict=True)]
    assert losses.curvature == pytest.approx(sum(second) / len(second), rel=0.4)
