"""Weights are multiplied where they live: the same bits whatever the shard, and nothing lost in 16 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Trainer

from mezo_dist.algorithms.decay import decays
from mezo_dist.config.reader import load
from mezo_dist.directions import law as fields
from mezo_dist.directions.law import Law
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.engine import Engine
from mezo_dist.errors import UserError
from mezo_dist.runs.build import build_run
from mezo_dist.testing import tiny_model, write_tiny_config

FACTOR = float(torch.tensor(1 - 2.0**-9 / 3, dtype=torch.float32))


def test_trainable_weights_are_multiplied_and_frozen_ones_are_not() -> None:
    model = tiny_model("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Engine(model, Law("lowrank")).scale(FACTOR, rounding_seed=1, exempt_vectors=False)
    for name, parameter in model.named_parameters():
        factor = 1.0 if "embed_tokens" in name else FACTOR
        assert torch.equal(parameter, before[name] * factor), name


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "bert", "t5"])
def test_exempt_are_the_weights_that_hugging_faces_trainer_exempts(kind: str) -> None:
    model = tiny_model(kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Engine(model, Law("gaussian")).scale(0.5, rounding_seed=1, exempt_vectors=True)
    scaled = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    rest = {name for name, tensor in before.items() if not tensor.any()}  # of zeros: nobody can tell
    theirs = set(Trainer.get_decay_parameter_names(None, model)) & before.keys()
    vectors = {name for name, tensor in before.items() if tensor.dim() < 2}  # theirs knows no T5LayerNorm, no ln_1
    assert scaled - rest == theirs - vectors - rest
    assert scaled
    assert before.keys() - scaled - rest >= vectors - rest


def test_matrices_of_lora_decay() -> None:
    assert decays("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight", 2)


def test_weight_decay_that_falls_on_nothing_is_refused(tmp_path: Path) -> None:
    config = write_tiny_config(tmp_path, algorithm="mezo")
    overrides = ["algorithm.weight_decay=0.1", "model.trainable=['*norm*']"]
    with pytest.raises(UserError, match=r"algorithm\.weight_decay: all trainable weights are vectors"):
        build_run(load(config, overrides), Communicator())
    build_run(load(config, [*overrides, "algorithm.weight_decay_all=true"]), Communicator())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_get_the_bits_of_the_whole(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    whole = torch.randn(50, 60, generator=draw).to(dtype)
    parts, seed = whole.flatten().clone(), 5 if dtype == torch.bfloat16 else None
    before = whole.clone()
    Law("gaussian").scale(whole, FACTOR, param_id=3, rounding_seed=seed)
    monkeypatch.setattr(fields, "SCALED_AT_ONCE", 700)
    for start, stop in ((0, 1), (1, 1500), (1500, 3000)):
        Law("gaussian").scale(parts[start:stop], FACTOR, param_id=3, offset=start, rounding_seed=seed)
    assert torch.equal(parts.view(50, 60), whole)
    assert not torch.equal(whole, before)


def test_in_16_bits_what_is_less_than_a_last_place_is_taken_off_on_average() -> None:
    """A third of half a unit in the last place, or a sixth, according to the number: to nearest, nothing would go."""
    weight = torch.full((200_000,), 1.5, dtype=torch.bfloat16)
    assert (weight * FACTOR == weight).all()
    Law("gaussian").scale(weight, FACTOR, param_id=3, rounding_seed=5)
    deviation = 2.0**-7 * 200_000**-0.5 / 2  # of the mean, at most
    assert weight.double().mean().item() == pytest.approx(1.5 * FACTOR, abs=5 * deviation)
