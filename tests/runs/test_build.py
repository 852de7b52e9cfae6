"""What is refused before training starts, whatever the command: a probe of the model is part of building a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mezo_dist import cli
from mezo_dist.testing import tiny_tokenizer, write_tiny_config
from tests.engines import zoo


def config_of(folder: Path, name: str) -> str:
    """A run of one step on an architecture of `tests.engines.zoo`."""
    path = write_tiny_config(folder, steps=1)
    zoo.build(name).save_pretrained(folder / name)
    tiny_tokenizer().save_pretrained(folder / name)
    config = yaml.safe_load(path.read_text())
    config["model"]["name"] = str(folder / name)
    config["output"] |= {"test": False, "export": False}
    path.write_text(yaml.safe_dump(config))
    return str(path)


def test_a_prefix_that_the_model_ignores_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training would end with status 0, and both sides of every step would have the same loss."""
    options = ["--model.peft.method=prefix", "--model.peft.num_virtual_tokens=2"]
    assert cli.main(["train", config_of(tmp_path, "mamba2"), *options]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "error: model.peft.method: a Mamba2ForCausalLM takes a prefix and ignores it" in said


def test_a_prefix_that_does_not_fit_into_the_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model.peft.method=prefix", "--model.peft.num_virtual_tokens=2"]
    assert cli.main(["train", config_of(tmp_path, "lfm2"), *options]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "error: model.peft.method: a Lfm2ForCausalLM has layers that keep something else" in said
    assert "use model.peft.method: lora" in said


def test_another_dtype_that_the_models_code_cannot_compute_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, "openai-gpt")
    assert cli.main(["train", config, "--model.compute=bfloat16"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "error: model.compute: the model's code fails on weights that are cast to bfloat16" in said


def test_a_model_that_reads_weights_without_calling_their_modules_trains(tmp_path: Path) -> None:
    config = config_of(tmp_path, "lfm2")
    assert cli.main(["train", config, "--model.compute=bfloat16", "--law=lowrank"]) == 0
