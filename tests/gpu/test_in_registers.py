"""Linear layers that perturb in registers, on a GPU that is not there: what is launched, sent and waited for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from mezo_dist.algorithms.base import Variant
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.kernels import fused_linear, reference
from mezo_dist.directions.law import Law
from mezo_dist.engines.engine import Engine
from tests.gpu.played_gpu import Counts, DeviceTensor, PlayedGpu, _on_host, played_gpu

NUM_LAYERS = 2


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedGpu]:
    """After a launch was counted, the reference computes what the kernel would give."""
    launching = fused_linear.linear

    def linear(
        weight: Tensor, sums: Sequence[Combination], inputs: Sequence[Tensor], biases: Any, **options: Any
    ) -> list[Tensor]:
        launching(weight, sums, inputs, biases, **options)
        here = None if biases is None else [_on_host(bias) for bias in biases]
        outputs = reference.linear(_on_host(weight), sums, [_on_host(x) for x in inputs], here, **options)
        return [DeviceTensor.of(y) for y in outputs]

    monkeypatch.setattr(fused_linear, "linear", linear)
    with played_gpu(monkeypatch) as there:
        yield there


def test_a_launch_for_both_signs_of_a_layer_and_nothing_to_wait_for(gpu: PlayedGpu) -> None:
    size = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2}
    config = transformers.OPTConfig(
        **size, num_hidden_layers=NUM_LAYERS, ffn_dim=16, word_embed_proj_dim=16, max_position_embeddings=16
    )
    model = transformers.OPTForCausalLM(config).eval()
    gpu.move(model)
    ids = DeviceTensor.of(torch.arange(16).view(2, 8))
    results = {}
    for linear in ("materialised", "registers"):
        engine = Engine(model, Law("rademacher"), linear=linear)
        for seed in (3, 4):
            shift = Combination.single(seed, 1e-2)
            with gpu:
                gpu.counts = Counts()
                (losses,) = engine.evaluate(
                    [Variant(shift), Variant(-shift)], [ids], lambda model, ids: model(ids, use_cache=False).logits
                )
        results[linear] = [_on_host(loss) for loss in losses]
    num_linear, num_biases, num_others = NUM_LAYERS * 6 + 1, NUM_LAYERS * 6, NUM_LAYERS * 2 + 1 + 2
    assert gpu.counts.launches["triton linear_kernel"] == num_linear
    assert gpu.counts.launches["triton add_kernel"] == num_biases + num_others
    assert gpu.counts.reads == 0
    assert gpu.counts.uploads <= 2  # seeds and coefficients
    for usual, ours in zip(results["materialised"], results["registers"], strict=True):
        torch.testing.assert_close(ours, usual, rtol=1e-4, atol=1e-6)
