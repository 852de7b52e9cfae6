"""``mezo-dist plan`` as people call it."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mezo_dist.cli import main
from mezo_dist.planning import calibration, command
from mezo_dist.planning.named import NAMED
from mezo_dist.testing import tiny_model, write_tiny_config

RATES = {"bandwidth": 1e10, "generate": 1e-9, "write": 1e-9, "call": 1e-4, "latency": 1e-4, "host_link": 1e9}
MEASURED = {"host": "here", "date": "2026-11-26", "device": "CPU", "threads": 2, "load": 0.1,
            "flops": dict.fromkeys(("float32", "bfloat16", "float16"), 1e11), "rates": RATES}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEZO_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


def answered(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == 0
    data: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])  # the lines before are DeepSpeed's
    return data


def test_all_layouts_of_both_algorithms(capsys: pytest.CaptureFixture[str]) -> None:
    data = answered(capsys, "llama-3-70b", "--hosts", "2", "--ranks-per-host", "2", "--link", "100gbit")
    names = [one["name"] for one in data["plans"]]
    assert names[:5] == [f"{layout}, mezo" for layout in ("replicated", "fsdp 1 x 4", "fsdp 2 x 2", "zero")] + [
        "replicated, mezo-svrg, anchor stored"
    ]
    assert data["recommended"]["mezo"]["layout"] == "fsdp 2 x 2"
    for one in data["plans"]:
        assert one["memory"]["total"] == sum(one["memory"]["parts"].values())
        assert all(step["seconds"] == pytest.approx(sum(step["parts"].values())) for step in one["steps"])
    assert {option["stage"] for option in data["first_order"]} == {"whole (DDP)", "ZeRO-1", "ZeRO-2", "ZeRO-3 / FSDP"}


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "mixtral-8x7b", "--hosts", "2", "--ranks-per-host", "4", "--memory", "80GiB"]) == 0
    text = capsys.readouterr().out
    assert "46.70 B weights, 12.75 B multiplied with each token" in text
    assert "\n >  fsdp 2 x 4" in text
    assert "AdamW" in text
    assert max(map(len, text.splitlines())) <= 118


def test_framing_is_shown_apart_from_contents(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["opt-125m", "--hosts", "2", "--algorithm", "mezo", "--layout", "replicated"]
    (one,) = answered(capsys, *asked)["plans"]
    traffic = one["steps"][0]["traffic"]
    assert (traffic["between_hosts"], traffic["framed_gathers"], traffic["framed_scalars"]) == (256, 0, 1434)
    assert main(["plan", *asked]) == 0
    assert "256 bytes of scalars, 1,434 of framing beside 256 between hosts" in " ".join(
        capsys.readouterr().out.split()
    )


def test_ranks_without_work_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert "12 of the 16 ranks only gather" in " ".join(
        answered(capsys, "opt-125m", "--ranks-per-host", "16", "--algorithm", "mezo")["notes"]
    )
    assert not answered(capsys, "opt-125m", "--ranks-per-host", "4", "--algorithm", "mezo")["notes"]


def test_when_nothing_fits_the_answer_says_what_would_help(capsys: pytest.CaptureFixture[str]) -> None:
    data = answered(capsys, "opt-175b", "--algorithm", "mezo")
    assert data["recommended"] == {"mezo": None}
    assert "More ranks" in data["reasons"]["mezo"]


def test_a_config_of_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = write_tiny_config(tmp_path, "llama-tied", full_size=20)
    data = answered(capsys, str(config), "--tokens", "16")
    assert data["model"]["size"] == sum(p.numel() for p in tiny_model("llama-tied").parameters())
    (one,) = data["plans"]
    assert one["algorithm"] == "mezo-svrg"
    assert [step["what"] for step in one["steps"]] == ["anchor step", "inner step"]
    assert one["steps"][0]["passes"] == 2 * 5  # 20 samples in micro-batches of 4


def test_tokens_that_nobody_gave_are_told_and_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = write_tiny_config(tmp_path, "llama-tied", max_tokens=None)  # type: ignore[arg-type]
    window = tiny_model("llama-tied").config.max_position_embeddings
    assert window < 512
    (assumed,) = (note for note in answered(capsys, str(config))["notes"] if "are assumed" in note)
    assert f"samples of {window} tokens are assumed, which fill the window" in assumed
    assert "assumed" not in " ".join(answered(capsys, "opt-125m")["notes"])
    assert main(["plan", str(config), "--tokens", "512"]) == 2
    assert "--tokens: 512 tokens are more than the window of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("algorithm", "overrides", "is_told"),
    [
        ("mezo", {"lr": "auto"}, True),
        ("mezo", {"lr": 0.1}, False),
        ("mezo", {"lr": "auto", "eta": 0.1}, False),
        ("mezo-svrg", {"lr": "auto", "anchor_lr": "auto"}, True),
        ("mezo-svrg", {}, True),
        ("mezo-svrg", {"lr": 0.1}, False),
    ],
)
def test_it_is_told_where_looks_are_left_out(
    algorithm: str, overrides: dict[str, Any], is_told: bool, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write_tiny_config(tmp_path, "llama-tied", algorithm)
    data = yaml.safe_load(path.read_text())
    for objective in ("loss", "metric"):
        data |= {"algorithm": {"name": algorithm, **overrides}, "train": {**data["train"], "objective": objective}}
        path.write_text(yaml.safe_dump(data))
        notes = answered(capsys, str(path), "--tokens", "16")["notes"]
        assert any("lr: auto looks back" in note for note in notes) is (is_told and objective == "loss")
    others = answered(capsys, str(path), "--tokens", "16", "--algorithm", "mezo")["notes"]
    assert "looks back" not in " ".join(others), "what is planned has a rate"


def test_a_config_of_adamw_is_answered_with_what_forward_passes_would_need(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = write_tiny_config(tmp_path, "llama-tied", "adamw")
    data = answered(capsys, str(config), "--tokens", "16")
    assert [one["algorithm"] for one in data["plans"]] == ["mezo", "mezo-svrg"]
    assert any("adamw itself stands in the table" in note for note in data["notes"])
    assert "AdamW" in {option["name"] for option in data["first_order"]}
    assert len(answered(capsys, str(config), "--tokens", "16", "--algorithm", "mezo")["plans"]) == 1


def test_any_architecture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.config.save_pretrained(tmp_path)
    data = answered(capsys, str(tmp_path / "config.json"), "--tokens", "16")
    assert data["model"]["size"] == sum(p.numel() for p in model.parameters())
    assert "upper estimate" in data["notes"][0]


def test_written_texts_need_a_cache_of_keys(capsys: pytest.CaptureFixture[str]) -> None:
    data = answered(capsys, "llama-3-8b", "--reads", "texts", "--targets", "4000", "--algorithm", "mezo")
    parts = data["plans"][0]["memory"]["parts"]
    assert parts["kv cache"] == 8 * (512 + 4000) * 2 * 8 * 128 * 32 * 2
    assert parts["copy"] == parts["weights"]


def test_find(capsys: pytest.CaptureFixture[str]) -> None:
    assert answered(capsys, "--find", "model", "--memory", "24GB")["largest"] == "qwen3-8b"
    assert int(answered(capsys, "llama-3-8b", "--find", "micro-batch", "--memory", "24GB")["largest"]) > 8
    assert answered(capsys, "opt-1.3b", "--find", "context")["largest"] == "2048"
    assert answered(capsys, "opt-175b", "--find", "context")["largest"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["opt-13"], ["MODEL", "did you mean opt-13b"]),
        ([], ["MODEL"]),
        (["opt-13b", "--memory", "3q"], ["--memory", "3q"]),
        (["opt-13b", "--memory", "1MB"], ["--memory"]),
        (["opt-13b", "--hosts", "0"], ["--hosts"]),
        (["opt-13b", "--hosts", "1000000000"], ["--hosts", "at most 100,000"]),
        (["opt-13b", "--link", "10gbit"], ["--link", "--hosts"]),
        (["opt-13b", "--hosts", "2", "--host-link", "10gbit"], ["--host-link", "--ranks-per-host"]),
        (["opt-13b", "--tokens", "4096"], ["--tokens", "2048"]),
        (["opt-13b", "--layout", "fsdp"], ["--layout"]),
        (["opt-13b", "--micro-batch", "32"], ["--micro-batch", "--batch"]),
        (["opt-13b", "--full", "4"], ["--full"]),
        (["opt-13b", "--trainable", "nothing"], ["--trainable"]),
        (["opt-13b", "--algorithm", "mezo", "--anchor", "stored"], ["--anchor"]),
        (["opt-13b", "--rates", "here"], ["--rates", "--calibrate"]),
        (["."], ["MODEL", "config.json"]),
        (["a b/c d/e"], ["MODEL"]),
        (["missing.yaml"], ["missing.yaml"]),
        (["opt-13b", "--reads", "labels", "--targets", "5"], ["--targets", "--reads"]),
    ],
)
def test_errors_name_the_option(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str],
                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["plan", *arguments]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("changes", "word"), [({"num_hidden_layers": 100_000}, "num_hidden_layers"), ({"num_key_value_heads": 3}, "divide")]
)
def test_a_config_json_of_no_model(
    changes: dict[str, int], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**NAMED["llama-3-8b"], **changes}))
    assert main(["plan", str(tmp_path)]) == 2
    assert word in capsys.readouterr().err


def test_quantised_weights_are_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**NAMED["opt-125m"], "quantization_config": {"bits": 4}}))
    assert any("quantised" in note for note in answered(capsys, str(tmp_path))["notes"])


def test_a_model_with_a_scalar_weight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    assert answered(capsys, str(tmp_path), "--tokens", "32")["model"]["size"] > 10**8


def test_back_propagation_is_that_of_the_weights_that_are_trained(capsys: pytest.CaptureFixture[str]) -> None:
    few, every = (
        {one["name"]: one["memory"] for one in answered(capsys, "opt-1.3b", *which)["first_order"]}
        for which in (["--trainable", "*norm*"], [])
    )
    size = 1.3e9 * 2**-30
    assert (every["AdamW"] - few["AdamW"]) * 2**-30 > 13 * size, "gradients, two moments and a copy"
    assert every["LoRA"] == few["LoRA"]


@pytest.mark.parametrize("content", ["[1]", "{", '{"model_type": "nobody"}', '{"model_type": "llama"}', "{}"])
def test_a_config_json_that_is_none(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(content)
    assert main(["plan", str(tmp_path)]) == 2
    assert "MODEL" in capsys.readouterr().err


@pytest.mark.parametrize(("shape", "measured"), [("opt-1.3b", 0.0508), ("opt-6.7b", 0.0794), ("opt-13b", 0.1203)])
def test_steps_of_an_h200(shape: str, measured: float, capsys: pytest.CaptureFixture[str]) -> None:
    """Seconds that `examples/gpu/first_run.sh` measured on one; its rates come from other measurements."""
    tokens = ["--batch", "16", "--micro-batch", "16", "--tokens", "40"]
    plan = answered(capsys, shape, "--rates", "h200", "--layout", "replicated", "--algorithm", "mezo", *tokens)
    assert plan["plans"][0]["seconds_per_step"] == pytest.approx(measured, rel=0.3)


def test_measured_rates_are_remembered(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "measure", lambda: MEASURED)
    assert main(["plan", "--calibrate"]) == 0
    assert "100.0 GFLOPS" in capsys.readouterr().out
    assert answered(capsys, "opt-125m")["machine"]["flops"] == 1e11
    assert answered(capsys, "opt-125m", "--rates", "h100")["machine"]["flops"] == 4e14
    assert answered(capsys, "opt-125m", "--flops", "5tflops")["machine"]["flops"] == 5e12
    calibration.remembered_at().write_text('{"rates": {}}')
    assert main(["plan", "opt-125m"]) == 2
    assert "--calibrate" in capsys.readouterr().err


def test_a_real_calibration(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "REPEATS", 1)
    monkeypatch.setattr(calibration, "_reduce", lambda: {"latency": 1e-4, "host_link": 1e9})
    assert main(["plan", "--calibrate", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data == calibration.remembered()
    assert set(data["rates"]) == set(calibration.RATES)


def test_an_answer_takes_less_than_three_seconds() -> None:
    """Of a processor; how long that takes depends on what else it does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    arguments = [sys.executable, "-m", "mezo_dist", "plan", "llama-3-405b", "--hosts", "16", "--ranks-per-host", "8"]
    subprocess.run(arguments, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3


@pytest.mark.parametrize("option", [["--offload"], ["--gather", "float32"], ["--prefetch"]])
def test_options_of_sharded_layouts(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for machine in (["--ranks-per-host", "2", "--layout", "replicated"], []):
        assert main(["plan", "opt-125m", *machine, *option]) == 2
        assert f"error: {option[0]}: is an option of layout fsdp" in capsys.readouterr().err
    notes = answered(capsys, "opt-125m", "--ranks-per-host", "2", *option)["notes"]
    assert any(f"{option[0]} goes with fsdp" in note and "not with replicated" in note for note in notes)
    assert answered(capsys, "opt-125m", "--ranks-per-host", "2", "--layout", "fsdp", *option)["notes"] == []
