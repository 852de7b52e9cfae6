"""LoRA and prefixes: only what peft added is trained, on any layout, and peft loads what is exported."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from mezo_dist.algorithms.base import Variant
from mezo_dist.config import reader
from mezo_dist.config.schema import PeftConfig
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.law import Law
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.probe import check_model
from mezo_dist.errors import UserError
from mezo_dist.models import adapters, load
from mezo_dist.runs import training
from mezo_dist.runs.model import load_base
from mezo_dist.tasks.classification.label_words import LabelWords
from mezo_dist.testing import spawn, tiny_model, write_tiny_config
from tests.engines import zoo
from tests.engines.test_persample import PER_SAMPLE, losses, micro_batches
from tests.run_folders import loaded_run, results

LORA, PREFIX = ["model.peft.method=lora", "model.peft.r=4"], ["model.peft.method=prefix"]
RUNS: dict[str, tuple[str, list[str]]] = {
    "lora": ("llama", LORA),
    "lora, transposed weights": ("gpt2", [*LORA, "model.weights=bfloat16"]),
    "lora, masked": ("bert", [*LORA, "law=lowrank", "algorithm.per_sample=true"]),
    "lora, classifier": ("bert", [*LORA, "model.head=classifier"]),
    "lora, other classifier": ("distilbert", [*LORA, "model.head=classifier", "model.peft.target_modules=[q_lin]"]),
    "lora, a head of layers": ("roberta", [*LORA, "model.head=classifier"]),
    "lora, last block": ("llama-tied", [*LORA, "model.peft.target_modules=[layers.1.mlp.up_proj]"]),
    "prefix": ("opt", [*PREFIX, "law=lowrank", "algorithm.per_sample=true"]),
    "prefix, tied": ("llama-tied", [*PREFIX, "model.peft.num_virtual_tokens=3"]),
}
SHARDED = ["lora", "lora, classifier", "prefix"]
LAYOUTS = ["fsdp", "zero"]
OPTIONS = ["algorithm.lr=0.1", "algorithm.anchor_lr=0.1", "train.frozen_cache_gib=0"]


def train(comm: Communicator, root: Path, name: str, to: str, *more: str) -> None:
    options = [*RUNS[name][1], *OPTIONS, f"output.dir={root / name / to}", *more]
    training.train(reader.load(root / name / "config.yaml", options), comm)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for name, (kind, _) in RUNS.items():
        write_tiny_config(root / name, kind, steps=3, batch_size=5, micro_batch=3)
        train(Communicator(), root, name, "run")
    return root


every_run = pytest.mark.parametrize("name", RUNS)


@every_run
def test_only_what_was_added_is_trained_and_a_run_can_be_made_again(root: Path, name: str) -> None:
    run = loaded_run(root / name / "run")
    assert run.engine.fingerprint() == results(root / name / "run")["weights"] != run.loaded.base_fingerprint
    base = loaded_run(root / name / "run", 0)
    changed = {
        weight: not torch.equal(tensor, base.pretrained.model.get_parameter(weight))
        for weight, tensor in run.pretrained.model.named_parameters()
    }
    added = {weight for weight in changed if any(p in weight for p in ("lora_", "prompt_encoder", "modules_to_save"))}
    assert {weight for weight, is_changed in changed.items() if is_changed} == added != set()
    run.engine.evaluate([Variant()], run.split("test")[:1], run.evaluator.forward)
    assert not run.engine.never_used()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
@every_run
def test_peft_loads_what_is_exported(root: Path, name: str) -> None:
    run = loaded_run(root / name / "run")
    batch = run.split("test")[0]
    folder = root / name / "run" / "model"
    assert {path.name for path in folder.iterdir()} >= {"adapter_config.json", "tokenizer.json"}
    package, loader_name = run.pretrained.loader
    assert package == "peft"
    loader: Any = getattr(peft, loader_name)
    options: dict[str, Any] = {"num_labels": 2} if run.pretrained.kind == "classifier" else {}
    model = run.pretrained.model
    weight = next(model.parameters())
    dtype, device = weight.dtype, weight.device
    loaded = loader.from_pretrained(folder, dtype=dtype, **options).eval().to(device)
    if run.pretrained.kind != "classifier":
        run.evaluator.forward._head_slice.detach()  # type: ignore[attr-defined]
    with torch.no_grad():
        inputs = {name: values.to(device) for name, values in batch.inputs.items()}
        logits, wanted = (m(**inputs).logits for m in (loaded, model))
    if dtype == torch.float32:
        assert torch.equal(logits, wanted)
    torch.testing.assert_close(logits, wanted, rtol=2e-2, atol=2e-3)  # peft computes adapters in fp32
    if "lora" in name and dtype == torch.float32:
        with torch.no_grad():
            merged = loaded.merge_and_unload()(**inputs).logits
        torch.testing.assert_close(merged, wanted, rtol=1e-4, atol=1e-5)


def sharded(comm: Communicator, root: Path) -> None:
    for name in SHARDED:
        for layout in LAYOUTS:
            train(comm, root, name, layout, f"layout.name={layout}")


@pytest.mark.distributed
def test_a_run_is_the_same_on_sharded_layouts(root: Path) -> None:
    spawn(sharded, 2, root, timeout_s=200)
    for name in SHARDED:
        alone = root / name / "run"
        for layout in LAYOUTS:
            folder = root / name / layout
            assert results(folder) == results(alone), (name, layout)
            for file in ("adapter_model.safetensors", "adapter_config.json"):
                assert (folder / "model" / file).read_bytes() == (alone / "model" / file).read_bytes()


def test_a_run_goes_on(root: Path) -> None:
    folder = root / "lora" / "run"
    lines = (folder / "trajectory.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "trajectory.jsonl").write_bytes(b"".join(lines[:3]))
    whole = results(folder)
    train(Communicator(), root, "lora", "run", "output.if_exists=resume")
    assert results(folder)["weights"] == whole["weights"]


@pytest.mark.parametrize("name", ["lora", "prefix"])
def test_a_direction_per_sample_is_that_of_really_changed_adapters(root: Path, name: str) -> None:
    config = reader.load(root / name / "config.yaml", RUNS[name][1])
    model = load.load_model(config.model, num_labels=2, seed=1).model
    law = Law("lowrank")
    Engine(model, law).add(Combination.single(4, 0.1), rounding_seed=0)  # B of LoRA is not zero any more
    objective = LabelWords(model, [40, 7, 22], micro_batches()[0])
    actual = losses(model, law, [Variant(per_sample=PER_SAMPLE), Variant()], objective)
    for i, shift in enumerate(PER_SAMPLE):
        changed = copy.deepcopy(model)
        Engine(changed, law).add(shift, rounding_seed=0)
        wanted = losses(changed, law, [Variant()], objective)[0, i]
        torch.testing.assert_close(actual[0, i], wanted, rtol=2e-5, atol=2e-6)
    assert ((actual[0] - actual[1]).abs() > 1e-5).all()


def test_fresh_adapters_are_pefts_and_follow_from_seed_and_name(root: Path) -> None:
    config = reader.load(root / "lora" / "config.yaml", LORA)
    first, again, other = (load.load_model(config.model, num_labels=2, seed=seed).model for seed in (1, 1, 2))
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight"
    a = first.get_parameter(name)
    assert torch.equal(a, again.get_parameter(name))
    assert not torch.equal(a, other.get_parameter(name))
    assert a.shape == (4, 32)
    assert 0.9 * 32**-0.5 < a.abs().max() <= 32**-0.5
    assert not first.get_parameter(name.replace("lora_A", "lora_B")).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model.peft.target_modules=[embed_tokens]"], "model.peft.target_modules: embeddings cannot have adapters"),
        (["model.peft.target_modules=[nothing]"], "model.peft.target_modules: peft cannot do this to a LlamaForCausal"),
        (["model.freeze=['*lora*']"], "model.freeze: .* freezes every weight"),
        ([*PREFIX, "model.peft.r=8", "model.peft.num_virtual_tokens=64"], "num_virtual_tokens: 64 fill the model's"),
        ([*PREFIX, "model.peft.r=8", "model.head=classifier"], "model.peft.method: prefix needs a causal"),
    ],
)
def test_what_cannot_be_is_said(root: Path, options: list[str], message: str) -> None:
    config = reader.load(root / "lora" / "config.yaml", [*LORA, *options])
    with pytest.raises(UserError, match=message):
        load_base(config, Communicator())


NO_PREFIX = {
    **dict.fromkeys(
        ("jamba", "bamba", "zamba2", "granite-hybrid", "nemotron-h", "falcon-h1"), "does not fit in .*state"
    ),
    **dict.fromkeys(("lfm2", "qwen3-next"), "does not fit in .*state"),
    **dict.fromkeys(("deepseek-v2", "deepseek-v3"), "does not fit in .*Sizes of tensors must match"),
    **dict.fromkeys(("mamba", "falcon-mamba", "xglm", "rwkv"), "peft cannot do this"),
    **dict.fromkeys(("xlnet", "openai-gpt", "bart"), "does not fit in "),
    "mamba2": "takes a prefix and ignores it",
}


def with_prefix(name: str) -> Engine:
    """An architecture of `tests.engines.zoo` with a prefix, as a run builds and probes it."""
    model, _ = adapters.attach(zoo.build(name), PeftConfig("prefix", num_virtual_tokens=2), "causal", None, 0)
    engine = Engine(model, Law("gaussian"))
    with adapters.prefix_failures_explained(model):
        check_model(engine, zoo.ids(), zoo.forward)
    return engine


@pytest.mark.parametrize("name", NO_PREFIX)
def test_a_prefix_that_a_model_cannot_use_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"^model.peft.method: .*{NO_PREFIX[name]}.*; use model.peft.method: lora"):
        with_prefix(name)


def test_a_prefix_reaches_the_attention_of_a_recurrent_model() -> None:
    assert with_prefix("recurrent-gemma").one_by_one


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "mixtral"])
def test_a_prefix_is_keys_and_values_of_tokens_before_the_text(kind: str) -> None:
    """Those of real tokens give the logits that these tokens give."""
    model, ids = tiny_model(kind), zoo.ids((3, 9))
    ids[:, :4] = ids[0, :4]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits[:, 4:]
        layers = model(input_ids=ids[:1, :4], use_cache=True).past_key_values.layers
        prefix = torch.stack([tensor for layer in layers for tensor in (layer.keys[0], layer.values[0])])
        adapted, _ = adapters.attach(model, PeftConfig("prefix", num_virtual_tokens=4), "causal", None, 0)
        (weight,) = (parameter for parameter in adapted.parameters() if parameter.requires_grad)
        weight.copy_(prefix.permute(2, 0, 1, 3).flatten(1))  # [2 layers, heads, tokens, size of a head] before
        (found,), *_ = Engine(adapted, Law("gaussian")).evaluate([Variant()], [ids[:, 4:]], zoo.forward)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_without_peft_the_extra_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    config = reader.load(root / "lora" / "config.yaml", LORA)
    with pytest.raises(UserError, match=r"model.peft: needs peft: pip install 'mezo_dist\[peft\]'"):
        load_base(config, Communicator())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 4}, "model.peft.r: is a setting of model.peft.method: lora"),
        ({"method": "prefix", "alpha": 2.0}, "model.peft.alpha: is a setting of model.peft.method: lora"),
        ({"method": "lora", "num_virtual_tokens": 3}, "model.peft.num_virtual_tokens: is a setting of .*: prefix"),
        ({"method": "lora", "r": 0}, "model.peft.r: must be at least 1"),
    ],
)
def test_contradictions_name_the_setting(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PeftConfig(**settings)


def test_the_settings_name_the_base_model(root: Path) -> None:
    settings = json.loads((root / "lora" / "run" / "model" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(root / "lora" / "model")
    assert (settings["r"], settings["lora_alpha"], settings["inference_mode"]) == (4, 16.0, True)


def test_adapters_of_a_tied_head_are_refused(tmp_path: Path) -> None:
    """Merged, they would change the embeddings, too."""
    config = write_tiny_config(tmp_path, "llama-tied")
    settings = reader.load(config, [*LORA, "model.peft.target_modules=[q_proj,lm_head]"]).model
    for whole in (True, False):
        with pytest.raises(UserError, match="target_modules: lm_head shares its weight with another module"):
            load.load_model(settings, num_labels=2, seed=0, whole=whole)
