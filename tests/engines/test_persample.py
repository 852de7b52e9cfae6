"""A direction per sample: every sample's loss is that of a model whose weights were really changed, for it alone."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mezo_dist import cli
from mezo_dist.algorithms.base import Variant
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.law import Law
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.lockstep import persample
from mezo_dist.engines.probe import check_model
from mezo_dist.errors import UserError
from mezo_dist.tasks.batches import MicroBatch, cut
from mezo_dist.tasks.classification.kind import collate
from mezo_dist.tasks.classification.label_words import LabelWords, classifier
from mezo_dist.tasks.classification.prompts import Sample
from mezo_dist.tasks.kind import Forward
from mezo_dist.testing import tiny_model, write_tiny_config
from tests.engines.models import sequence_classifier

# Lengths that pad and places that are not the last; five samples in micro-batches of two: the last one is alone.
SAMPLES = [
    Sample(tuple(range(5 + n, 5 + 2 * n)), n % 3, place) for n, place in ((9, 8), (4, 1), (6, 5), (3, 2), (7, 4))
]
PER_SAMPLE = tuple(Combination.single(100 + i, 0.05 * (-1) ** i) for i in range(len(SAMPLES)))
BASE = Combination.of([(3, 0.03), (9, -0.02)])
KINDS = ("llama", "llama-tied", "opt", "gpt2", "bert", "roberta", "distilbert", "mixtral")


def micro_batches() -> list[MicroBatch]:
    return cut(SAMPLES, 2, 0, collate)


def losses(model: nn.Module, law: Law, variants: list[Variant], objective: Forward) -> Tensor:
    """[variants, samples]"""
    batch = micro_batches()
    table = torch.empty(len(variants), len(SAMPLES))
    for item, row in zip(batch, Engine(model, law).evaluate(variants, batch, objective), strict=True):
        for v, scores in enumerate(row):
            table[v, list(item.slots)] = scores.loss
    return table


@pytest.mark.parametrize(("kind", "rank"), [*((k, 1) for k in (*KINDS, "classifier")), ("llama-tied", 3), ("gpt2", 3)])
def test_each_sample_sees_weights_of_its_own(kind: str, rank: int) -> None:
    model = sequence_classifier() if kind == "classifier" else tiny_model(kind)
    law = Law("lowrank", rank)
    objective: Forward = classifier if kind == "classifier" else LabelWords(model, [40, 7, 22], micro_batches()[0])
    before = {name: p.clone() for name, p in model.named_parameters()}
    minus = tuple(-shift for shift in PER_SAMPLE)
    variants = [Variant(BASE, PER_SAMPLE), Variant(Combination(), minus), Variant(BASE)]
    actual = losses(model, law, variants, objective)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    wanted = torch.empty_like(actual)
    for v, variant in enumerate(variants):
        for i in range(len(SAMPLES)):
            changed = copy.deepcopy(model)
            shift = variant.shift + (variant.per_sample[i] if variant.per_sample else Combination())
            Engine(changed, law).add(shift, rounding_seed=0)
            wanted[v, i] = losses(changed, law, [Variant()], objective)[0, i]
    torch.testing.assert_close(actual, wanted, rtol=2e-5, atol=2e-6)
    assert ((actual[0] - actual[2]).abs() > 1e-4).all()  # the directions do matter, to every sample


class Prefixed(nn.Module):
    """Owns a weight beside its blocks, which no single layer applies."""

    def __init__(self) -> None:
        super().__init__()
        self.prefix = nn.Parameter(torch.randn(1, 2, 8))
        self.blocks = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](torch.cat([self.prefix.expand(len(x), -1, -1), x], dim=1))


def refused(model: nn.Module, what: str) -> None:
    with pytest.raises(
        UserError, match=rf"^algorithm\.per_sample: {what}.* cannot be applied.*; set it to false, or .*"
    ):
        Engine(model, Law("lowrank")).evaluate(
            [Variant(Combination(), PER_SAMPLE)], micro_batches(), lambda m, b: m(torch.ones(len(b.slots), 3, 8))
        )


def test_weights_that_no_layer_applies_are_refused_not_left_out() -> None:
    refused(Prefixed(), "prefix belong to a module around the model's blocks")


def test_a_layer_that_mixes_samples_is_refused() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.cat([x.flatten(0, 1), x[0, :1]]))

    refused(Mixing(), r"module linear gets a tensor \(7, 8\) whose rows are not 2 samples")


def test_the_command_line_says_what_to_set_and_that_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def mixing(mlp: Any, x: Tensor) -> Tensor:
        inner = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        return mlp.down_proj(torch.cat([inner, inner[:1]]))[:-1]

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", mixing)
    config = str(write_tiny_config(tmp_path, steps=1))
    options = [
        "--law=lowrank",
        "--algorithm.per_sample=true",
        "--output.test=false",
        "--output.export=false",
        "--output.if_exists=new",
    ]
    assert cli.main(["train", config, *options]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "error: algorithm.per_sample: module model.layers.0.mlp.down_proj gets a tensor (" in said
    assert (
        "applied to model.layers.0.mlp.down_proj.weight; set it to false, or leave them out with model.freeze" in said
    )
    assert cli.main(["train", config, *options, "--algorithm.per_sample=false"]) == 0
    assert cli.main(["train", config, *options, '--model.freeze=["*.down_proj.*"]']) == 0


def test_frozen_weights_beside_the_blocks_are_no_obstacle() -> None:
    model = Prefixed()
    model.prefix.requires_grad_(False)
    engine = Engine(model, Law("lowrank"))
    results = engine.evaluate(
        [Variant(Combination(), PER_SAMPLE)], micro_batches(), lambda m, b: m(torch.ones(len(b.slots), 3, 8))
    )
    assert [row[0].shape[0] for row in results] == [2, 2, 1]


def test_other_laws_have_no_direction_per_sample() -> None:
    engine = Engine(tiny_model("llama"), Law("gaussian"))
    with pytest.raises(NotImplementedError, match="needs law lowrank, not gaussian"):
        engine.evaluate([Variant(Combination(), PER_SAMPLE)], micro_batches(), classifier)


def test_a_module_that_gives_none_beside_a_tensor() -> None:
    """Attention without its weights, say: DeBERTa, RWKV and XLNet have such modules."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            output, nothing = self.attention(x, x, x, need_weights=False)
            assert nothing is None
            return output

    class Item:
        slots = (0, 1, 2)

    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(2))
    check_model(Engine(Attending(), Law("lowrank")), Item(), lambda m, _: m(x), per_sample=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", ["", "weight", "bias"])
@pytest.mark.parametrize("shape", [(4, 3, 8), (4, 8), (8, 8)])
def test_a_layer_norm_has_the_bits_of_vmap(
    dtype: torch.dtype, frozen: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.LayerNorm(8)).to(dtype), torch.randn(shape).to(dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name != f"0.{frozen}")
    variant = Variant(per_sample=tuple(Combination.of([(seed, 0.3), (seed + 10, 0.1)]) for seed in range(4)))
    item = SimpleNamespace(slots=(0, 1, 2, 3))

    def output() -> Tensor:
        ((result,),) = Engine(model, Law("lowrank")).evaluate([variant], [item], lambda model, _: model(x))
        return result

    fast = output()
    monkeypatch.setattr(persample, "_is_layer_norm", lambda *_: False)
    assert torch.equal(fast, output())
    assert not torch.equal(fast, model(x))
