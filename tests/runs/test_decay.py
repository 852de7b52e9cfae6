"""Weights are multiplied where they live: the same bits whatever the shard, and nothing lost in 16 bits."""

from __future__ import annotations

import pytest
import torch

from mezo_dist.directions import law as fields
from mezo_dist.directions.law import Law
from mezo_dist.engines.engine import Engine
from mezo_dist.testing import tiny_model

FACTOR = float(torch.tensor(1 - 2.0**-9 / 3, dtype=torch.float32))


def test_trainable_weights_are_multiplied_and_frozen_ones_are_not() -> None:
    model = tiny_model("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Engine(model, Law("lowrank")).scale(FACTOR, rounding_seed=1)
    for name, parameter in model.named_parameters():
        factor = 1.0 if "embed_tokens" in name else FACTOR
        assert torch.equal(parameter, before[name] * factor), name


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
