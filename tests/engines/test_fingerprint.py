"""The fingerprint sees every bit of every weight, and does not see how they are sharded."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from mezo_dist.directions.law import Law
from mezo_dist.engines import fingerprint_kernel
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.fingerprint import VIEWS, by_torch, fingerprint_shard, to_text
from tests.engines.models import make


def bits(weight: Tensor) -> Tensor:
    return weight.data.view(-1).view({4: torch.int32, 2: torch.int16}[weight.element_size()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprint_sees_every_bit(dtype: torch.dtype) -> None:
    model = make("gpt2")[0].to(dtype)
    engine = Engine(model, Law("gaussian"))
    seen = {engine.fingerprint()}
    for weight in itertools.islice(model.parameters(), 0, None, 5):
        for place, bit in itertools.product((0, weight.numel() // 2, -1), (0, 7, 14)):
            bits(weight)[place] ^= 1 << bit
            seen.add(engine.fingerprint())
            bits(weight)[place] ^= 1 << bit
    number = len(list(itertools.islice(model.parameters(), 0, None, 5)))
    assert len(seen) == 1 + number * 9
    assert engine.fingerprint() in seen


def test_fingerprint_sees_frozen_weights_of_any_dtype() -> None:
    model, _, _ = make("Blocks")
    codes = torch.arange(-8, 8, dtype=torch.int8)
    model.register_parameter("codes", nn.Parameter(codes, requires_grad=False))
    model.get_parameter("norm.weight").requires_grad_(False)
    engine = Engine(model, Law("gaussian"))
    seen = [engine.fingerprint()]
    codes[3] += 1
    seen.append(engine.fingerprint())
    model.get_parameter("norm.weight").data[0] += 1
    seen.append(engine.fingerprint())
    assert len(set(seen)) == 3


def test_fingerprint_sees_order_and_parameter() -> None:
    model, _, _ = make("gpt2")
    engine = Engine(model, Law("gaussian"))
    first, second = (model.get_parameter(f"transformer.h.{i}.attn.c_attn.weight").data for i in (0, 1))
    before = engine.fingerprint()
    first[0], first[1] = first[1].clone(), first[0].clone()
    by_row = engine.fingerprint()
    first[0], first[1] = first[1].clone(), first[0].clone()
    assert engine.fingerprint() == before
    swapped = first.clone()
    first.copy_(second)
    second.copy_(swapped)
    assert len({before, by_row, engine.fingerprint()}) == 3


def test_fingerprint_adds_up_over_shards() -> None:
    weight = torch.randn(700_001, generator=torch.Generator().manual_seed(0))  # more than two of its blocks
    whole = fingerprint_shard(weight, 12345)
    for cuts in ([0, 1, 700_001], [0, 262_143, 262_145, 700_000, 700_001]):
        parts = [fingerprint_shard(weight[a:b], 12345, a) for a, b in itertools.pairwise(cuts)]
        assert to_text(sum(parts[::-1])) == to_text(whole)
    assert fingerprint_shard(weight, 12346) != whole


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_sum_is_that_of_torch(dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint_kernel, "PIECE", 1000)
    weight = (torch.randn(5_001, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for part, offset in ((weight, 0), (weight[3:], 2**40 + 3), (weight[:0], 7)):
            bits = part.view(VIEWS[part.element_size()])
            assert fingerprint_kernel.contributions(bits, 2**64 - 3, offset) == by_torch(bits, 2**64 - 3, offset)
    finally:
        torch.set_num_threads(before)


def test_fingerprint_stays_what_it_was() -> None:
    """Trajectories of earlier versions name their weights by it."""
    weight = torch.arange(-1000, 1000).to(torch.bfloat16)
    assert to_text(fingerprint_shard(weight, 12345, 6)) == "9028972eb0a2ba42"
