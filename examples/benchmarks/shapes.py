"""OPT's shapes with random weights, and random tokens: what the benchmarks of memory run on."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig

from mezo_dist.models.random_weights import open_random
from mezo_dist.models.sliced_checkpoint import WeightSource, materialise
from mezo_dist.tasks.batches import MicroBatch

VOCABULARY = 50272
SHAPES = {  # layers, hidden size, heads
    "tiny": (2, 64, 2),
    "opt-125m": (12, 768, 12),
    "opt-350m": (24, 1024, 16),
    "opt-1.3b": (24, 2048, 32),
    "opt-2.7b": (32, 2560, 32),
    "opt-6.7b": (32, 4096, 32),
    "opt-13b": (40, 5120, 40),
    "opt-30b": (48, 7168, 56),
    "opt-66b": (64, 9216, 72),
}


def config_of(shape: str) -> OPTConfig:
    """The config of an OPT model."""
    layers, hidden, heads = SHAPES[shape]
    return OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        num_hidden_layers=layers,
        ffn_dim=4 * hidden,
        num_attention_heads=heads,
        max_position_embeddings=2048,
        use_cache=False,
    )


def without_data(shape: str, dtype: torch.dtype) -> tuple[nn.Module, WeightSource]:
    """The model on device meta, and what fills its weights."""
    model, _, source = open_random(AutoModelForCausalLM, config_of(shape), dtype, seed=0)
    return model.eval(), source


def whole(shape: str, dtype: torch.dtype) -> nn.Module:
    """The model in host memory."""
    model, source = without_data(shape, dtype)
    materialise(model, source)
    return model


def make_batch(num_samples: int, length: int) -> MicroBatch:
    """Random tokens; the answer is read at the last one."""
    ids = torch.randint(10, 50000, (num_samples, length), generator=torch.Generator().manual_seed(0))
    return MicroBatch(
        tuple(range(num_samples)),
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        {"position": torch.full((num_samples,), length - 1), "label": torch.arange(num_samples) % 2},
        columns=2,
    )
