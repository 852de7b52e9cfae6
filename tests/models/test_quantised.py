"""Quantised bases: LoRA beside them is trained, the base keeps its bits, and a run can be made again."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from mezo_dist import cli
from mezo_dist.algorithms.base import Variant
from mezo_dist.config import reader
from mezo_dist.config.schema import ModelConfig
from mezo_dist.directions.combination import Combination
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.changed import whole_weights_changed
from mezo_dist.engines.payload import parameter_parts
from mezo_dist.errors import UserError
from mezo_dist.models.load import load_model
from mezo_dist.models.quantised import quantisation, settle
from mezo_dist.runs import training
from mezo_dist.runs.model import reload_base
from mezo_dist.testing import write_tiny_config
from tests.run_folders import loaded_run, results

PACKAGES = {"int8": "torchao", "int4": "bitsandbytes"}
LORA = ["model.peft.method=lora", "model.peft.r=4"]
PAYLOAD: dict[str, dict[str, torch.dtype | None]] = {
    "int8": {"": None, ":qdata": torch.int8, ":scale": torch.float32, ":zero_point": torch.int8},
    "int4": {"": torch.uint8, ":scales:absmax": torch.float32, ":scales:code": torch.float32},
}
"""Way -> parts of a quantised weight."""
every_way = pytest.mark.parametrize(
    "way",
    [
        pytest.param(
            way,
            marks=pytest.mark.skipif(
                importlib.util.find_spec(package) is None, reason=f"{package} is not installed: the extra `quantised`"
            ),
        )
        for way, package in PACKAGES.items()
    ],
)


def train(root: Path, way: str, *more: str) -> Path:
    options = [*LORA, f"model.quantise={way}", "algorithm.lr=0.1", "algorithm.anchor_lr=0.1", *more]
    return training.train(reader.load(root / "config.yaml", options), Communicator(), quiet=True)


def payload(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parts of the weights that are not trained."""
    frozen = [(name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad]
    return {part: tensor.clone() for name, parameter in frozen for part, tensor in parameter_parts(name, parameter)}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quantised")
    write_tiny_config(root, "llama", steps=4, batch_size=5, micro_batch=3)
    return root


@every_way
def test_a_run_on_a_quantised_base(root: Path, way: str) -> None:
    folder = train(root, way, f"output.dir={root / way}", "output.snapshot_every=2")
    done, before = loaded_run(folder), loaded_run(folder, 0)
    whole = results(folder)
    assert done.engine.fingerprint() == whole["weights"] != done.loaded.base_fingerprint
    base = payload(done.pretrained.model)
    assert same(base, payload(before.pretrained.model)), "the base is never written to"
    name = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    kept = {part.removeprefix(name): base[part].dtype for part in base if part.startswith(name)}
    assert kept == {part: dtype for part, dtype in PAYLOAD[way].items() if dtype is not None}
    whole_bytes = sum(p.numel() * 4 for p in done.pretrained.model.parameters() if not p.requires_grad)
    assert way == "int4" or sum(part.nbytes for part in base.values()) < 0.6 * whole_bytes

    assert cli.main(["replay", str(folder)]) == 0, "every fingerprint is that of the trajectory"
    reload_base(done.loaded)
    assert same(base, payload(done.pretrained.model)), "quantising again gives the same bits"

    lines = (folder / "trajectory.jsonl").read_bytes().splitlines(keepends=True)
    for snapshots in (True, False):
        (folder / "trajectory.jsonl").write_bytes(b"".join(lines[:4]))
        if not snapshots:
            for file in (folder / "snapshots").rglob("*.safetensors"):
                file.unlink()
        train(root, way, f"output.dir={folder}", "output.snapshot_every=2", "output.if_exists=resume")
        assert results(folder)["weights"] == whole["weights"]


@every_way
def test_losses_are_those_of_really_changed_adapters(root: Path, way: str) -> None:
    folder = root / way
    run = loaded_run(folder if folder.exists() else train(root, way, f"output.dir={folder}"))
    batch = run.split("test")[:2]
    shifts = [Combination.single(seed, 0.1) for seed in (3, 4)]
    rows = run.engine.evaluate([Variant(), *map(Variant, shifts)], batch, run.evaluator.forward)
    for item, (_, *actual) in zip(batch, rows, strict=True):
        for shift, scores in zip(shifts, actual, strict=True):
            with torch.no_grad(), whole_weights_changed(run.engine, shift, run.engine.trainable):
                wanted = run.evaluator.forward(run.pretrained.model, item)
            assert torch.equal(scores.loss, wanted.loss)
    assert not torch.equal(rows[0][0].loss, rows[0][1].loss)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
@every_way
def test_peft_loads_the_adapters_on_the_whole_and_on_the_quantised_base(root: Path, way: str) -> None:
    folder = root / way
    run = loaded_run(folder if folder.exists() else train(root, way, f"output.dir={folder}"))
    batch = run.split("test")[0]
    run.evaluator.forward._head_slice.detach()  # type: ignore[attr-defined]
    with torch.no_grad():
        wanted = run.pretrained.model(**batch.inputs).logits
        for how, tolerance in ((None, 0.5), (quantisation(run.config.model), 1e-6)):
            options: dict[str, Any] = {} if how is None else {"quantization_config": how}
            loaded = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, **options)
            settle(run.config.model if how else ModelConfig("whole"), loaded)
            logits = loaded.eval()(**batch.inputs).logits
            error = (logits - wanted).norm() / wanted.norm()
            assert error < tolerance
            assert how is not None or error > 1e-4, "the base was quantised"


@every_way
def test_a_model_without_linear_layers_is_refused(tmp_path: Path, way: str) -> None:
    config = write_tiny_config(tmp_path, "gpt2")
    settings = reader.load(config, [*LORA, f"model.quantise={way}"]).model
    if way == "int8":  # torchao leaves transformers' Conv1D as it is
        with pytest.raises(UserError, match=r"model\.quantise: no layer of .* was quantised"):
            load_model(settings, num_labels=2, seed=0)
    else:
        load_model(settings, num_labels=2, seed=0)


@every_way
def test_a_checkpoint_that_was_saved_quantised(root: Path, tmp_path: Path, way: str) -> None:
    given = reader.load(root / "config.yaml", [*LORA, f"model.quantise={way}"]).model
    whole = transformers.AutoModelForCausalLM.from_pretrained(
        given.name, dtype=torch.float32, quantization_config=quantisation(given)
    )
    whole.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(given.name).save_pretrained(tmp_path)
    loaded = load_model(
        reader.load(root / "config.yaml", [*LORA, f"model.name={tmp_path}"]).model, num_labels=2, seed=0
    )
    wanted = load_model(given, num_labels=2, seed=0)
    assert same(payload(loaded.model), payload(wanted.model))
    for options, message in (
        ([], f"model.name: .* quantised by {PACKAGES[way]}, and quantised weights cannot be trained"),
        ([*LORA, f"model.quantise={way}"], "model.quantise: .* is quantised already"),
        ([*LORA, "model.compute=bfloat16"], "leave model.compute out"),
    ):
        settings = reader.load(root / "config.yaml", [*options, f"model.name={tmp_path}"]).model
        with pytest.raises(UserError, match=message):
            load_model(settings, num_labels=2, seed=0)
    settings = reader.load(root / "config.yaml", [*LORA, f"model.name={tmp_path}"]).model
    with pytest.raises(UserError, match=r"set layout\.name: replicated"):
        load_model(settings, num_labels=2, seed=0, whole=False)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "is quantised by gptq; torchao and bitsandbytes .4 bits. are supported"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "in 8 bits, which rounds activations as well"),
    ],
)
def test_other_ways_are_refused_by_name(root: Path, tmp_path: Path, saved: dict[str, Any], message: str) -> None:
    folder = shutil.copytree(root / "model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": saved}))
    settings = reader.load(root / "config.yaml", [*LORA, f"model.name={folder}"]).model
    with pytest.raises(UserError, match=message):
        load_model(settings, num_labels=2, seed=0)


@pytest.mark.parametrize(("way", "package"), PACKAGES.items())
def test_without_the_package_the_extra_is_named(
    root: Path, way: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (package, f"{package}.quantization"):
        monkeypatch.setitem(sys.modules, module, None)
    settings = reader.load(root / "config.yaml", [*LORA, f"model.quantise={way}"]).model
    with pytest.raises(
        UserError, match=rf"model.quantise: {way} needs {package}: pip install 'mezo_dist\[quantised\]'"
    ):
        load_model(settings, num_labels=2, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "model.quantise: quantised weights cannot be trained; set model.peft.method: lora"),
        (["model.peft.method=prefix"], "model.quantise: quantised weights cannot be trained"),
        ([*LORA, "model.head=classifier"], "model.quantise: is not for model.head: classifier"),
        ([*LORA, "model.compute=bfloat16"], "model.compute: the layers of model.quantise compute in the dtype of"),
        ([*LORA, "layout.name=fsdp"], "layout.name: fsdp cannot cut quantised weights"),
        ([*LORA, "layout.name=zero"], "layout.name: zero cannot cut quantised weights"),
        ([*LORA, "model.name=random:config.json"], "model.quantise: random weights are not quantised"),
    ],
)
def test_contradictions_name_the_setting(root: Path, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        reader.load(root / "config.yaml", ["model.quantise=int8", *options])


def test_a_plain_parameter_is_its_own_part() -> None:
    assert ModelConfig("some/model").quantise is None
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    ((name, part),) = parameter_parts("w", parameter)
    assert name == "w"
    assert part.data_ptr() == parameter.data_ptr()
