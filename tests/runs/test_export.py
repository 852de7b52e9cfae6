"""Exports are what ``save_pretrained`` would write, weight for weight, without ever holding the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import safetensors.torch
import torch
import transformers as t
from torch import Tensor

from mezo_dist.config import reader
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.law import Law
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.engine import Engine
from mezo_dist.errors import UserError
from mezo_dist.models.sliced_checkpoint import materialise, open_checkpoint
from mezo_dist.runs import training
from mezo_dist.runs.export import export_model
from mezo_dist.storage import safetensors_io
from mezo_dist.testing import spawn, tiny_model, tiny_tokenizer, write_tiny_config
from tests.run_folders import loaded_run

KINDS = "llama llama-tied opt gpt2 bert roberta distilbert t5 mixtral".split()
DEEPSEEK: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
}  # fmt: skip


def model_of(kind: str) -> Any:
    if kind == "deepseek-v3":  # buffers that are saved, experts that are converted
        torch.manual_seed(0)
        return t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**DEEPSEEK)).eval()
    return tiny_model(kind)


def contents(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(path)
    return tensors


@pytest.mark.parametrize("kind", [*KINDS, "deepseek-v3"])
def test_the_same_files_as_save_pretrained(tmp_path: Path, kind: str) -> None:
    model = model_of(kind)
    model.save_pretrained(tmp_path / "theirs")
    engine = Engine(model, Law("gaussian"))
    engine.add(Combination.single(1, 1e-3), 0)
    model.save_pretrained(tmp_path / "theirs after")
    export_model(engine, tiny_tokenizer(), tmp_path / "ours", Communicator())
    ours, theirs = contents(tmp_path / "ours"), contents(tmp_path / "theirs after")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(not torch.equal(tensor, ours[name]) for name, tensor in contents(tmp_path / "theirs").items())
    for name in ("config.json", "generation_config.json"):
        if (tmp_path / "theirs" / name).exists():
            assert json.loads((tmp_path / "ours" / name).read_text()) == json.loads(
                (tmp_path / "theirs" / name).read_text()
            )
    same_after_loading(type(model), tmp_path / "ours", model)
    assert t.AutoTokenizer.from_pretrained(tmp_path / "ours")("film")["input_ids"]


def same_after_loading(model_class: Any, folder: Path, model: Any) -> None:
    loaded, report = model_class.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(report.values())
    live = model.state_dict()
    assert all(torch.equal(tensor, live[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "deepseek-v3"])
def test_several_files(tmp_path: Path, kind: str) -> None:
    model = model_of(kind)
    export_model(Engine(model, Law("gaussian")), tiny_tokenizer(), tmp_path / "ours", Communicator(), file_bytes=30_000)
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 2
    assert all(path.stat().st_size < 36_000 or len(safetensors_io.read_header(path)) == 1 for path in files)
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in contents(tmp_path / "ours").values())
    same_after_loading(type(model), tmp_path / "ours", model)


@pytest.mark.parametrize("kind", ["llama-tied", "mixtral"])
def test_there_and_back_by_the_slice(tmp_path: Path, kind: str) -> None:
    """A model that was read by the slice and exported is the checkpoint that it came from."""
    folder = tmp_path / "base"
    tiny_model(kind).save_pretrained(folder)
    config = t.AutoConfig.from_pretrained(folder)
    model, _, reader = open_checkpoint(t.AutoModelForCausalLM, str(folder), config, torch.bfloat16)
    materialise(model, reader)
    export_model(Engine(model, Law("gaussian")), tiny_tokenizer(), tmp_path / "ours", Communicator())
    base, ours = contents(folder), contents(tmp_path / "ours")
    assert base.keys() == ours.keys()
    assert all(torch.equal(ours[name], tensor.bfloat16()) for name, tensor in base.items())
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_one_unit_at_a_time(tmp_path: Path, kind: str) -> None:
    """Each weight is gone when the next one comes, as on a sharded layout; few are copied."""
    engine, held, most = Engine(tiny_model(kind), Law("gaussian")), 0, 0
    expected = {name: tensor.clone() for name, tensor in tiny_model(kind).state_dict().items()}
    named_weights, clone = engine.layout.named_weights, Tensor.clone

    def lent() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in named_weights():
            copy = torch.empty_like(tensor).copy_(tensor)
            yield name, copy
            copy.fill_(torch.nan)

    def count(tensor: Tensor) -> Tensor:
        nonlocal held, most
        held += tensor.nbytes
        most = max(most, held)
        return clone(tensor)

    with (
        mock.patch.object(type(engine), "named_weights", return_value=lent()),
        mock.patch.object(Tensor, "clone", count),
    ):
        export_model(engine, tiny_tokenizer(), tmp_path / "ours", Communicator())
    loaded = t.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())
    experts = sum(p.nbytes for name, p in expected.items() if ".experts." in name)
    assert most <= experts  # all that is ever copied, in all layers together


def test_an_export_replaces_an_older_one(tmp_path: Path) -> None:
    engine = Engine(tiny_model("llama"), Law("gaussian"))
    for scale in (1e-3, 1e-2):
        engine.add(Combination.single(2, scale), 0)
        export_model(engine, tiny_tokenizer(), tmp_path / "model", Communicator())
    same_after_loading(t.LlamaForCausalLM, tmp_path / "model", engine.model)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def fail(comm: Communicator, folder: Path) -> tuple[str, int]:
    """Rank 0 cannot write; the other rank goes through all the gathers that it has to take part in."""
    engine, seen = Engine(tiny_model("llama"), Law("gaussian")), 0
    named_weights = engine.layout.named_weights

    def counted() -> Iterator[tuple[str, Tensor]]:
        nonlocal seen
        for pair in named_weights():
            seen += 1
            yield pair

    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    with mock.patch.object(type(engine), "named_weights", return_value=counted()), mock.patch("os.fsync", full):
        try:
            export_model(engine, cast(Any, None), folder / "model", comm)
        except UserError as error:
            return str(error), seen
    return "", seen


@pytest.mark.distributed
def test_a_failure_is_told_on_all_ranks(tmp_path: Path) -> None:
    messages, seen = zip(*spawn(fail, 2, tmp_path), strict=True)
    assert messages[0] == messages[1]
    assert "failed: rank(s) [0]: [Errno 28] No space left on device; the run folder is as it was" in messages[0]
    assert seen[0] == seen[1] == len(list(tiny_model("llama").parameters()))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_adapters_of_a_model_with_added_tokens_and_tied_embeddings_merge(tmp_path: Path) -> None:
    """Through peft alone, the merged model gives the logits of the run."""
    import peft

    config = write_tiny_config(tmp_path, "llama-tied", "mezo", steps=2)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["new1", "new2"])
    tokenizer.save_pretrained(tmp_path / "model")
    base = tiny_model("llama-tied")
    base.resize_token_embeddings(70)
    base.save_pretrained(tmp_path / "model")
    options = ["output.test=false", "algorithm.lr=1e-2", "model.peft.method=lora"]
    training.train(reader.load(config, options), Communicator())
    run = loaded_run(tmp_path / "run")
    device = run.pretrained.model.device
    ids = tokenizer("a dull slow film . It was new1", return_tensors="pt")["input_ids"].to(device)
    run.evaluator.forward._head_slice.detach()  # type: ignore[attr-defined]
    with torch.no_grad():
        live = run.pretrained.model(input_ids=ids).logits
        adapted = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "model").to(device)
        assert torch.equal(adapted(input_ids=ids).logits, live)
        assert not torch.equal(base.to(device)(input_ids=ids).logits, live)
        adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = t.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").to(device)
        assert torch.allclose(merged(input_ids=ids).logits, live, atol=1e-6)
