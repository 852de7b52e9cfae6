"""No file is read but safetensors beside their index, whatever a model folder names."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

from mezo_dist.config.schema import ModelConfig
from mezo_dist.errors import UserError
from mezo_dist.models.load import load_model
from mezo_dist.models.sliced_checkpoint import materialise
from mezo_dist.testing import tiny_model, tiny_tokenizer

INDEX = "model.safetensors.index.json"
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in several files."""
    tiny_model("llama").save_pretrained(tmp_path / "model", max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / INDEX).exists()
    return tmp_path / "model"


def load(folder: Path, *, whole: bool) -> dict[str, torch.Tensor]:
    loaded = load_model(ModelConfig(str(folder)), num_labels=2, seed=0, whole=whole)
    if not whole:
        assert loaded.source is not None
        materialise(loaded.model, loaded.source)
    return dict(loaded.model.named_parameters())


def rename_shard(folder: Path, name: Any) -> None:
    """The index names another file in place of its last one."""
    index = json.loads((folder / INDEX).read_text())
    last = sorted(set(index["weight_map"].values()))[-1]
    index["weight_map"] = {key: name if file == last else file for key, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("whole", [True, False])
def test_several_files_are_read_and_links_to_files_too(folder: Path, whole: bool) -> None:
    first = sorted(folder.glob("*.safetensors"))[0]
    first.rename(folder.parent / "blob")
    first.symlink_to(folder.parent / "blob")
    expected = dict(tiny_model("llama").named_parameters())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load(folder, whole=whole).items())


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("weights.bin", "names the file 'weights.bin'; only names in the same folder that end in .safetensors"),
        ("/etc/passwd.safetensors", "names the file '/etc/passwd.safetensors'; only"),
        ("../x.safetensors", "names the file '../x.safetensors'; only"),
        ("a\\b.safetensors", "only names in the same folder"),
        (7, "is no index of a checkpoint"),
        (["x"], "is no index of a checkpoint"),
        ("fifo.safetensors", "fifo.safetensors is not a regular file"),
        ("zero.safetensors", "zero.safetensors is not a regular file"),
        ("gone.safetensors", "gone.safetensors is missing: the checkpoint is incomplete"),
    ],
)
def test_what_an_index_must_not_name(folder: Path, name: Any, expected: str, whole: bool) -> None:
    os.mkfifo(folder / "fifo.safetensors")
    (folder / "zero.safetensors").symlink_to("/dev/zero")
    for path in (folder / "weights.bin", folder.parent / "x.safetensors"):
        path.write_bytes(pickle.dumps({}))
    rename_shard(folder, name)
    with pytest.raises(UserError) as caught:
        load(folder, whole=whole)
    assert expected in str(caught.value)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "adapter_model.bin"])
def test_no_pickle_is_read(folder: Path, file: str, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was read")

    monkeypatch.setattr(torch, "load", refuse)
    torch.save(tiny_model("llama").state_dict(), folder / file)
    (folder / INDEX).unlink()
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(UserError, match=r"has no model\.safetensors: only safetensors are read, for other formats"):
        load(folder, whole=whole)
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": file}))
    with pytest.raises(UserError, match=f"names '{file}' as weights; remove transformers_weights"):
        load(folder, whole=whole)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "x", "peft_type": "LORA"}))
    with pytest.raises(UserError, match="holds adapters, not a model: merge them into their base first"):
        load(folder, whole=whole)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"weight_map": 3}', b"\xff", b"[" * 100_000])
def test_a_damaged_index(folder: Path, content: bytes) -> None:
    (folder / INDEX).write_bytes(content)
    with pytest.raises(UserError, match="cannot be read, or is no index of a checkpoint"):
        load(folder, whole=True)


def test_an_index_larger_than_any_memory(folder: Path) -> None:
    with (folder / INDEX).open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=r"no index of a checkpoint .*larger than 67,108,864 bytes"):
        load(folder, whole=True)


SIZE: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", ["bert", "mixtral"])
def test_a_head_of_another_shape_is_said(
    tmp_path: Path, kind: str, whole: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where only headers are read, and without reading the whole model after all."""
    if kind == "bert":
        bert = t.BertConfig(**SIZE, intermediate_size=48, num_labels=3)
        t.BertForSequenceClassification(bert).save_pretrained(tmp_path)
        settings = {"head": "classifier"}
    else:
        tiny_model("mixtral").save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 56}))
        settings = {}
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="these weights have another shape than needed: "):
        load_model(ModelConfig(str(tmp_path), **settings), num_labels=2, seed=0, whole=whole)  # type: ignore[arg-type]
    assert "is loaded whole" not in caplog.text


@pytest.mark.parametrize("case", ["said to be tied, but different", "T5 without its shared table"])
def test_checkpoints_that_say_a_weight_in_other_ways(tmp_path: Path, case: str) -> None:
    """Read by the slice or whole, the weights are the same."""
    from safetensors.torch import load_file, save_file

    settings = {}
    if case.startswith("T5"):
        tiny_model("t5").save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        table = weights.pop("shared.weight")
        weights |= {f"{part}.embed_tokens.weight": table.clone() for part in ("encoder", "decoder")}
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        settings = {"head": "classifier"}
    else:
        tiny_model("llama").save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tiny_tokenizer().save_pretrained(tmp_path)
    both = []
    for whole in (True, False):
        loaded = load_model(ModelConfig(str(tmp_path), **settings), num_labels=2, seed=0, whole=whole)  # type: ignore[arg-type]
        if loaded.source is not None:
            materialise(loaded.model, loaded.source)
        both.append(dict(loaded.model.named_parameters()))
    assert both[0].keys() == both[1].keys()
    assert all(torch.equal(tensor, both[1][name]) for name, tensor in both[0].items())
    if not settings:
        assert not torch.equal(both[0]["lm_head.weight"], both[0]["model.embed_tokens.weight"])
    else:
        assert torch.equal(both[0]["transformer.shared.weight"], tiny_model("t5").shared.weight)
