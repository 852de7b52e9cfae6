"""DeepSpeed's side of layout `zero`: the user's config, parameters in host memory and on NVMe."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mezo_dist.algorithms.base import Variant
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.law import Law
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.hooked import Weight
from mezo_dist.engines.layouts.zero import Zero
from mezo_dist.engines.layouts.zero_config import check_buffers, read_config, training_config
from mezo_dist.engines.units import find_units
from mezo_dist.errors import UserError
from mezo_dist.testing import spawn


def write(folder: Path, config: Any) -> str:
    (folder / "ds.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return str(folder / "ds.json")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{stage: 3}", "is no readable JSON file"),
        ([], "must hold a DeepSpeed config"),
        ({"zero_optimization": 3}, "must hold a DeepSpeed config"),
        ({"zero_optimization": {"stage": 2}}, "stage is 2; layout.name: zero is stage 3"),
        ({"zero_optimization": {"zero_hpz_partition_size": 8}}, "copies that would miss the updates"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "rounded to 8 bits"),
        ({"zero_optimization": {"mics_shard_size": 4}}, "layout.replicate"),
        ({"bf16": {"enabled": True}}, "bf16 is on, but model.weights is float32"),
        ({"fp16": {"enabled": True}}, "fp16 is on, but model.weights is float32"),
    ],
)
def test_configs_that_contradict_the_run(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"layout.ds_config: .*{message}"):
        read_config(write(tmp_path, config), "float32")


def test_a_config_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"layout.ds_config: nowhere.json is no readable JSON file"):
        read_config("nowhere.json", "float32")


def test_what_has_no_effect_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = {
        "optimizer": {"type": "AdamW"},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 5, "offload_param": {"device": "cpu"}},
    }
    with caplog.at_level(logging.WARNING):
        assert read_config(write(tmp_path, config), "bfloat16") == config
    (record,) = caplog.records
    assert record.message.endswith("optimizer, zero_optimization.stage3_prefetch_bucket_size")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"optimizer": {"type": "AdamW"}}, "leave optimizer out: algorithm.name says which"),
        ({"scheduler": {"type": "WarmupLR"}}, "leave scheduler out: algorithm.lr and algorithm.schedule are the rate"),
        ({"gradient_clipping": 1.0}, "leave gradient_clipping out: algorithm.clip is the limit"),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme"}}},
            "offload_param.device: nvme is for runs without",
        ),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "offload_optimizer.device: nvme .* to cpu"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, "gradients would be rounded to 8 bits"),
    ],
)
def test_what_decides_about_steps_is_the_run(tmp_path: Path, config: Any, message: str) -> None:
    assert read_config(write(tmp_path, config), "float32") == config, "forward passes have no steps of DeepSpeed's"
    with pytest.raises(UserError, match=f"layout.ds_config: .*{message}"):
        read_config(write(tmp_path, config), "float32", gradients=True)


def test_what_the_engine_is_given(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    zero = {
        "offload_optimizer": {"device": "cpu", "pin_memory": True, "ratio": 0.5},
        "reduce_bucket_size": "auto",
        "sub_group_size": 1000,
        "stage3_param_persistence_threshold": 7,
    }
    theirs = {"zero_optimization": zero, "gradient_clipping": "auto", "train_batch_size": 64}
    with caplog.at_level(logging.WARNING):
        config = read_config(write(tmp_path, theirs), "bfloat16", gradients=True)
    (record,) = caplog.records
    left_out = "gradient_clipping, train_batch_size, zero_optimization.stage3_param_persistence_threshold"
    assert record.message == f"layout.ds_config: no effect here, where settings of the run decide: {left_out}"
    given = training_config(config, torch.bfloat16, 10, prefetch=False)
    assert given["gradient_clipping"] == 0, "1 is DeepSpeed's default"
    assert given["bf16"] == {"enabled": True}
    section = given["zero_optimization"]
    assert section["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert (section["reduce_bucket_size"], section["sub_group_size"]) == (10, 1000)
    assert (section["stage3_param_persistence_threshold"], section["stage3_prefetch_bucket_size"]) == (0, 0)
    assert "bf16" not in training_config({}, torch.float32, 10, prefetch=False)


def test_a_model_with_scalars_is_not_trained_by_deepspeed() -> None:
    """Before its engine is made, which fails on them."""
    layout = Zero.__new__(Zero)
    layout._weights = {"gain": Weight(nn.Module(), "gain", "gain", 1, torch.Size([]), True)}
    with pytest.raises(
        UserError, match=r"layout\.name: DeepSpeed cannot train a model that has scalar weights \(gain\)"
    ):
        layout.initialize(torch.optim.SGD([torch.zeros(1)]))


# Offloading


class Wide(nn.Module):
    """Large enough for DeepSpeed to put it on NVMe: that takes 1 MiB per weight and rank."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(768, 768) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def nvme(**settings: Any) -> dict[str, Any]:
    return {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "/nowhere"} | settings}}


@pytest.mark.parametrize(
    ("config", "ranks", "prefetch", "message"),
    [
        (
            nvme(buffer_size=294_911),
            2,
            False,
            r"buffer_size is 294,911 elements, .* layers.0.weight .* has 294,912: set",
        ),
        (nvme(buffer_size=294_912), 2, False, ""),
        (nvme(buffer_size=1e8, buffer_count=1), 1, False, ""),
        (nvme(buffer_count=1), 1, True, "buffer_count is 1, but 2 weights .*, or layout.prefetch to false"),
        (nvme(buffer_count=0), 1, True, "buffer_count is 0, but 2 weights are read .* at least that many$"),
        (nvme(buffer_size=1), 3, False, ""),  # pieces of less than 1 MiB stay in memory
        (nvme(buffer_size=1) | {"aio": {"block_size": 1 << 22}}, 1, False, ""),
        ({"zero_optimization": {"offload_param": {"device": "cpu", "buffer_size": 1}}}, 1, False, ""),
        ({}, 1, False, ""),
    ],
)
def test_buffers_for_weights_on_nvme(config: dict[str, Any], ranks: int, prefetch: bool, message: str) -> None:
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        check_buffers(config, find_units(Wide()), ranks, prefetch=prefetch)


def test_buffers_are_checked_before_weights_are_cut() -> None:
    model = Wide()
    with pytest.raises(UserError, match=r"layout.ds_config: zero_optimization.offload_param.buffer_size is 1,000"):
        Zero(model, Communicator(), nvme(buffer_size=1000))
    assert not any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def use(comm: Communicator, config: dict[str, Any] | None) -> dict[str, Any]:
    """Evaluate, update, evaluate."""
    torch.manual_seed(0)
    model, x = Wide(), torch.randn(4, 768)
    engine = Engine(model, Law("gaussian"), None if config is None else Zero(model, comm, config))
    sums = []
    for seed in (1, 2):
        variants = [Variant(Combination.single(seed, 0.01)), Variant()]
        sums += [r.sum().item() for r in engine.evaluate(variants, [x], lambda m, item: m(item))[0]]
        engine.add(Combination.single(seed, 0.1), rounding_seed=0)
    weights = [float(tensor.double().sum()) for _, tensor in engine.named_weights()]
    pieces = [p.ds_tensor for p in model.parameters() if hasattr(p, "ds_tensor")]
    away = [piece.status.name == "NOT_AVAILABLE" for piece in pieces]
    return {"bits": [*sums, *weights, engine.fingerprint()], "away": sum(away)}


def offload(comm: Communicator, configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [use(comm, config) for config in configs]


@pytest.mark.distributed
@pytest.mark.parametrize("world", [1, 2])
def test_parameters_in_host_memory(world: int) -> None:
    for ranks in spawn(offload, world, [{}, {"zero_optimization": {"offload_param": {"device": "cpu"}}}]):
        for reported in ranks:
            assert reported["bits"] == use(Communicator(), None)["bits"]


@pytest.mark.distributed
@pytest.mark.timeout(1200)
@pytest.mark.skipif(
    "MEZO_DIST_NVME" not in os.environ, reason="DeepSpeed compiles its I/O for minutes, with libaio-dev and g++"
)
def test_parameters_on_nvme(tmp_path: Path) -> None:
    where = {"device": "nvme", "nvme_path": str(tmp_path), "buffer_count": 4, "buffer_size": 400_000}
    for (reported,) in spawn(offload, 2, [{"zero_optimization": {"offload_param": where}}], timeout_s=1000):
        assert reported["bits"] == use(Communicator(), None)["bits"]
        assert reported["away"] == 3  # the matrices; the biases are too small
    assert len(list(tmp_path.rglob("*.swp"))) == 2 * 3
