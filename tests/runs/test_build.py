"""What is refused before training starts, whatever the command: a probe of the model is part of building a run."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import transformers
import yaml
from tokenizers import processors

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


def classifier(folder: Path, *, appends: bool, pad_token: str = "<pad>") -> str:
    """A run of a T5 with a classification head, whose tokenizer appends its end-of-text token or not."""
    path = write_tiny_config(folder, steps=1)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    ids = {"decoder_start_token_id": 0, "eos_token_id": 3, "num_labels": 2}
    transformers.T5ForSequenceClassification(transformers.T5Config(**sizes, **ids)).save_pretrained(folder / "t5")
    tokenizer = copy.deepcopy(tiny_tokenizer())
    if appends:
        end = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 3)])
        tokenizer.backend_tokenizer.post_processor = end
    tokenizer.pad_token = pad_token
    tokenizer.save_pretrained(folder / "t5")
    config = yaml.safe_load(path.read_text())
    config["model"] = {"name": str(folder / "t5"), "head": "classifier"}
    config["output"] |= {"test": False, "export": False}
    path.write_text(yaml.safe_dump(config))
    return str(path)


def test_a_classifier_that_reads_its_answer_at_the_end_of_the_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reads = "error: model.head: this model's classifier reads its answer at token 3, the end of the text (eos_token_id)"
    assert cli.main(["train", classifier(tmp_path / "a", appends=False)]) == 2
    assert f"{reads}, which the tokenizer does not append to a text" in capsys.readouterr().err
    assert cli.main(["train", classifier(tmp_path / "b", appends=True, pad_token="<eos>")]) == 2
    assert f"{reads}, which the tokenizer pads with, too; give it another pad_token" in capsys.readouterr().err
    path = classifier(tmp_path / "c", appends=True)
    assert cli.main(["train", path]) == 0
    data = tmp_path / "c" / "data.jsonl"
    data.write_text(data.read_text().replace("the", "the <eos>"))  # in some
    assert cli.main(["train", path, "--output.dir=" + str(tmp_path / "d")]) == 2
    assert f"{reads}, and " in (said := capsys.readouterr().err)
    assert "leave out rows whose text holds it" in said
