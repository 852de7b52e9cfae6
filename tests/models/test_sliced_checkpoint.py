"""A model that is filled slice by slice has the bits that ``from_pretrained`` gives, for every kind of checkpoint."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers as t
from torch import Tensor

from mezo_dist.config.schema import ModelConfig
from mezo_dist.directions.law import Law
from mezo_dist.engines.engine import Engine
from mezo_dist.errors import UserError
from mezo_dist.models import sliced_checkpoint
from mezo_dist.models.load import load_model
from mezo_dist.models.sliced_checkpoint import NotSliceableError, open_checkpoint
from mezo_dist.testing import tiny_model, tiny_tokenizer

SIZE: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WINDOW: dict[str, Any] = {"max_position_embeddings": 64, "intermediate_size": 48}
KV: dict[str, Any] = {"num_key_value_heads": 1, "head_dim": 16}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
}  # fmt: skip
MAKERS: dict[str, Callable[[], Any]] = {
    **{
        kind: functools.partial(tiny_model, kind)
        for kind in "llama llama-tied opt gpt2 bert roberta distilbert t5 mixtral".split()
    },
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**SIZE, **WINDOW, **KV)),
    "qwen3-moe": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**SIZE, **WINDOW, **KV, **EXPERTS)),
    "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**SIZE, **WINDOW, **KV)),
    "gpt-neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SIZE, **WINDOW)),
    "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2)),
    "bart": lambda: t.BartForConditionalGeneration(
        t.BartConfig(vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48,
                     decoder_ffn_dim=48, encoder_attention_heads=2, decoder_attention_heads=2)
    ),
    # routing biases are buffers that are saved, and experts are converted
    "deepseek-v3": lambda: t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**SIZE, **WINDOW, **DEEPSEEK)),
}  # fmt: skip
AUTO = {
    **dict.fromkeys(("bert", "roberta", "distilbert"), t.AutoModelForMaskedLM),
    **dict.fromkeys(("t5", "bart"), t.AutoModelForSeq2SeqLM),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("checkpoints")

    def folder(kind: str) -> Path:
        if not (root / kind).exists():
            torch.manual_seed(0)
            MAKERS[kind]().save_pretrained(root / kind)
        return root / kind

    return folder


def auto_class(kind: str) -> Any:
    return AUTO.get(kind, t.AutoModelForCausalLM)


def check(auto: Any, folder: Path, dtype: torch.dtype) -> Any:
    """Read the checkpoint in pieces of every size and compare with ``from_pretrained``."""
    torch.manual_seed(1)
    expected, expected_report = auto.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    torch.manual_seed(1)
    model, report, reader = open_checkpoint(auto, str(folder), t.AutoConfig.from_pretrained(folder), dtype)
    assert report == expected_report
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in expected.named_parameters()]
    same(dict(model.named_buffers()), dict(expected.named_buffers()))
    from_checkpoint = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert len(from_checkpoint) > 0.8 * len(list(model.parameters()))
    for number, (name, parameter) in enumerate(expected.named_parameters()):
        flat, step = parameter.detach().view(-1), max(1, parameter.numel() // (number % 4 + 1) + number % 3)
        for first in range(0, len(flat), step):
            piece = torch.empty_like(flat[first : first + step])
            reader.read(name, piece, first)
            assert torch.equal(piece, flat[first : first + step]), name
    sliced_checkpoint.materialise(model, reader)
    same(model.state_dict(), expected.state_dict())
    assert getattr(model, "generation_config", None) == getattr(expected, "generation_config", None)
    assert model.config.to_dict() == expected.config.to_dict()
    return model


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", MAKERS)
def test_the_same_bits(folders: Callable[[str], Path], kind: str, dtype: torch.dtype) -> None:
    check(auto_class(kind), folders(kind), dtype)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "mixtral"])
def test_a_fresh_head_is_drawn_as_from_pretrained_draws_it(folders: Callable[[str], Path], kind: str) -> None:
    check(t.AutoModelForSequenceClassification, folders(kind), torch.float32)


@pytest.mark.parametrize("kind", ["llama-tied", "t5", "mixtral"])
def test_several_files_with_an_index(tmp_path: Path, kind: str) -> None:
    tiny_model(kind).save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    check(auto_class(kind), tmp_path, torch.float32)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """The same checkpoint with other names or tensors."""
    path = folder / "model.safetensors"
    tensors = change(safetensors.torch.load_file(path))
    safetensors.torch.save_file({k: v.clone() for k, v in tensors.items()}, path, metadata={"format": "pt"})
    return folder


def saved(tmp_path: Path, kind: str) -> Path:
    tiny_model(kind).save_pretrained(tmp_path)
    return tmp_path


def test_a_base_model_loads_into_one_with_a_head_and_the_other_way_round(tmp_path: Path) -> None:
    tiny_model("bert").bert.save_pretrained(tmp_path / "base")
    check(t.AutoModelForSequenceClassification, tmp_path / "base", torch.float32)
    tiny_model("bert").save_pretrained(tmp_path / "headed")
    check(t.AutoModel, tmp_path / "headed", torch.float32)


def test_names_of_old_checkpoints(tmp_path: Path) -> None:
    def old(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k.replace("LayerNorm.weight", "LayerNorm.gamma"): v for k, v in tensors.items()}

    check(t.AutoModelForMaskedLM, rewrite(saved(tmp_path, "bert"), old), torch.float32)
    assert any("gamma" in key for key in safetensors.torch.load_file(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("factor", [1, 2], ids=["equal", "different"])
def test_tied_weights_that_are_both_in_the_checkpoint(tmp_path: Path, factor: int) -> None:
    """transformers ties them if they are equal, and only then."""

    def both(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * factor}

    model = check(t.AutoModelForCausalLM, rewrite(saved(tmp_path, "llama-tied"), both), torch.float32)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (factor == 1)


def test_tied_weights_under_their_other_name(tmp_path: Path) -> None:
    def other(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {"lm_head.weight": tensors.pop("model.embed_tokens.weight")}

    model = check(t.AutoModelForCausalLM, rewrite(saved(tmp_path, "llama-tied"), other), torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_that_the_class_keeps_in_fp32(folders: Callable[[str], Path]) -> None:
    model = check(t.AutoModelForSeq2SeqLM, folders("t5"), torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.float16, torch.float32}


def test_reading_takes_no_more_memory_than_was_asked_for(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor is ever made but the converted ones, and pieces for casts."""
    sizes, empty = [], torch.empty

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        sizes.append(0 if tensor.is_meta else tensor.nbytes)
        return tensor

    config = t.AutoConfig.from_pretrained(folders("opt"))
    monkeypatch.setattr(torch, "empty", spy)
    model, _, reader = open_checkpoint(t.AutoModelForCausalLM, str(folders("opt")), config, torch.float32)
    out = empty(3)
    for name, _ in model.named_parameters():
        reader.read(name, out, 5)
    assert max(sizes, default=0) == 0


def test_filling_an_engine(folders: Callable[[str], Path]) -> None:
    config = t.AutoConfig.from_pretrained(folders("gpt2"))
    reader = open_checkpoint(t.AutoModelForCausalLM, str(folders("gpt2")), config, torch.float32)[2]
    expected = Engine(t.AutoModelForCausalLM.from_pretrained(folders("gpt2")), Law("gaussian"))
    other = Engine(tiny_model("gpt2", seed=5), Law("gaussian"))
    assert other.fingerprint() != expected.fingerprint()
    sliced_checkpoint.fill(reader, other.shards())
    assert other.fingerprint() == expected.fingerprint()


# What cannot be read by the slice


def test_a_quantised_checkpoint(folders: Callable[[str], Path]) -> None:
    config = t.AutoConfig.from_pretrained(folders("llama"))
    config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(NotSliceableError, match="it is quantised"):
        open_checkpoint(t.AutoModelForCausalLM, str(folders("llama")), config, torch.float32)


def test_pickles_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no model\.safetensors: only safetensors are read, .*; convert"):
        open_checkpoint(t.AutoModelForCausalLM, str(tmp_path), model.config, torch.float32)


def test_what_cannot_be_sliced_is_loaded_whole_and_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_tokenizer().save_pretrained(saved(tmp_path, "llama"))

    def refuse(*_: Any, **__: Any) -> None:
        raise NotSliceableError("it is strange")

    config = ModelConfig(str(tmp_path))
    sliced = load_model(config, num_labels=2, seed=0, whole=False)
    monkeypatch.setattr("mezo_dist.models.load.open_checkpoint", refuse)
    whole = load_model(config, num_labels=2, seed=0, whole=False)
    assert whole.source is None
    assert "is loaded whole on every rank before it is cut: it is strange" in caplog.text
    assert sliced.source is not None
    sliced_checkpoint.materialise(sliced.model, sliced.source)
    same(sliced.model.state_dict(), whole.model.state_dict())


def test_damaged_files(tmp_path: Path) -> None:
    path = saved(tmp_path, "llama") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a safetensors file, or a damaged one"):
        open_checkpoint(t.AutoModelForCausalLM, str(tmp_path), t.AutoConfig.from_pretrained(tmp_path), torch.float32)


def test_a_shape_that_does_not_match_is_reported(tmp_path: Path) -> None:
    config = json.loads((saved(tmp_path, "llama") / "config.json").read_text()) | {"vocab_size": 60}
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"these weights have another shape than needed: lm_head\.weight, model\.embed"):
        load_model(ModelConfig(str(tmp_path)), num_labels=2, seed=0, whole=False)
