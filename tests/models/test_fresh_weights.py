"""Fresh weights are drawn by name: the same ones wherever and however the other weights are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as t

from mezo_dist.config.schema import ModelConfig
from mezo_dist.models import fresh_weights
from mezo_dist.models.load import load_model
from mezo_dist.models.sliced_checkpoint import materialise
from mezo_dist.testing import tiny_tokenizer, write_tiny_model


def qwen3_next(folder: Path) -> Path:
    """Some of its modules draw weights whether they are wanted or not."""
    config = t.Qwen3NextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        max_position_embeddings=64,
    )
    t.Qwen3NextForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def classifier(folder: Path, *, whole: bool, seed: int = 0) -> dict[str, torch.Tensor]:
    loaded = load_model(ModelConfig(str(folder), head="classifier"), num_labels=3, seed=seed, whole=whole)
    if loaded.source is not None:
        materialise(loaded.model, loaded.source)
    return dict(loaded.model.named_parameters())


@pytest.mark.parametrize("kind", ["qwen3-next", "bert", "t5"])
def test_a_fresh_head_does_not_depend_on_what_else_has_data(tmp_path: Path, kind: str) -> None:
    folder = qwen3_next(tmp_path) if kind == "qwen3-next" else write_tiny_model(tmp_path, kind)
    whole, sliced = classifier(folder, whole=True), classifier(folder, whole=False)
    assert whole.keys() == sliced.keys()
    assert [name for name, tensor in whole.items() if not torch.equal(tensor, sliced[name])] == []
    other = classifier(folder, whole=True, seed=1)
    changed = [name for name, tensor in whole.items() if not torch.equal(tensor, other[name])]
    assert changed, "they follow the seed"
    assert all(whole[name].std() > 0.005 for name in changed)


def test_only_the_named_weights_are_drawn() -> None:
    model = t.BertForSequenceClassification(
        t.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stream = torch.get_rng_state()
    fresh_weights.draw(model, ["classifier.weight", "bert.pooler.dense.bias", "no.such.weight"], 5)
    assert torch.equal(torch.get_rng_state(), stream)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == ["classifier.weight"], "fresh biases are zero, as this one was"
    assert 0.01 < model.classifier.weight.std() < 0.03
