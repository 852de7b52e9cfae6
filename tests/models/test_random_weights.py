"""Random models: the same whatever the layout, shaped and scaled as their config says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as t

from mezo_dist.config import reader
from mezo_dist.config.schema import ModelConfig
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.errors import UserError
from mezo_dist.models.load import Pretrained, load_model
from mezo_dist.models.random_weights import open_random
from mezo_dist.models.sliced_checkpoint import materialise
from mezo_dist.runs import training
from mezo_dist.testing import tiny_model, write_tiny_config, write_tiny_model


def load(path: Path, seed: int = 0, *, whole: bool = True) -> Pretrained:
    return load_model(ModelConfig(f"random:{path}"), num_labels=2, seed=seed, whole=whole)


@pytest.mark.parametrize("kind", ["llama-tied", "opt", "bert", "mixtral"])
def test_any_piece_alone_is_the_same_as_in_the_whole(tmp_path: Path, kind: str) -> None:
    folder = write_tiny_model(tmp_path, kind)
    whole, sliced = load(folder), load(folder, whole=False)
    assert sliced.source is not None
    assert all(parameter.is_meta for parameter in sliced.model.parameters())
    names = [name for name, _ in whole.model.named_parameters()]
    assert names == [name for name, _ in tiny_model(kind).named_parameters()]
    for name, parameter in whole.model.named_parameters():
        flat = parameter.detach().view(-1)
        piece = torch.full((max(1, len(flat) // 3),), 9.0)
        sliced.source.read(name, piece, len(flat) // 2)
        assert torch.equal(piece, flat[len(flat) // 2 :][: len(piece)])
    expected = dict(tiny_model(kind).named_buffers())
    for name, buffer in sliced.model.named_buffers():
        assert torch.equal(buffer, expected[name])


def test_the_law_of_the_weights(tmp_path: Path) -> None:
    config = t.OPTConfig(vocab_size=512, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, ffn_dim=128,
                         word_embed_proj_dim=64, init_std=0.05)  # fmt: skip
    models = []
    for seed in (0, 0, 1):
        model, _, source = open_random(t.AutoModelForCausalLM, config, torch.bfloat16, seed)
        materialise(model, source)
        models.append(dict(model.named_parameters()))
    first, again, other = models
    for name, tensor in first.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, again[name])
        if tensor.dim() == 2:
            assert tensor.float().std().item() == pytest.approx(0.05, rel=0.1)
            assert not torch.equal(tensor, other[name])
        else:
            assert torch.equal(tensor, torch.full_like(tensor, 0.0 if name.endswith("bias") else 1.0))


def test_a_config_alone_is_enough(tmp_path: Path) -> None:
    config = tiny_model("opt").config
    config.vocab_size, config.architectures = 400, ["OPTForCausalLM"]
    path = tmp_path / "some-shape.json"
    path.write_text(config.to_json_string())
    loaded = load(path)
    assert loaded.tokenizer("ab")["input_ids"] == loaded.tokenizer("ab")["input_ids"]
    assert max(loaded.tokenizer("\xff")["input_ids"]) < 400
    with pytest.raises(UserError, match=r"model.name: 'random:.*gone.json' could not be loaded"):
        load(tmp_path / "gone.json")


def test_a_run_from_random_weights(tmp_path: Path) -> None:
    path = write_tiny_config(tmp_path, "llama-tied", "mezo", steps=2)
    config = reader.load(path, [f"model.name=random:{tmp_path / 'model'}", f"output.dir={tmp_path / 'out'}"])
    folder = training.train(config, Communicator())
    t.AutoModelForCausalLM.from_pretrained(folder / "model")
