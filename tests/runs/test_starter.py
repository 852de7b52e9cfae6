"""What `mezo-dist init` writes is a run that starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForSequenceClassification

from mezo_dist import cli
from mezo_dist.config import reader
from mezo_dist.runs.starter import write_starter
from mezo_dist.testing import WORDS, tiny_model, tiny_tokenizer, write_tiny_config

MANY = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    tiny_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sentence(number: int) -> str:
    return " ".join(WORDS[(number * step) % len(WORDS)] for step in (1, 3, 7, 11))


def write(path: Path, **fields: list[object]) -> None:
    rows = [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


TEXTS: list[object] = [sentence(i) for i in range(MANY)]
LONG: list[object] = [
    " ".join(sentence(i + j) for j in range(20)) for i in range(MANY)
]  # longer than the model's window
SHAPES: dict[str, dict[str, list[object]]] = {
    "classes": {"review": TEXTS, "verdict": ["great", "terrible"] * (MANY // 2)},
    "odd names": {"Review Text": TEXTS, "the verdict": ["great", "terrible", None] * (MANY // 3), "if": TEXTS},
    "names with dots": {
        "review.text": TEXTS,
        "in": [{"a.b": text} for text in TEXTS],
        "x.y": ["great", "terrible"] * (MANY // 2),
    },
    "completions": {"prompt": TEXTS, "completion": TEXTS[::-1]},
    "documents": {"text": LONG},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_written_trains(shape: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / f"{shape}.jsonl", **SHAPES[shape])
    assert cli.main(["init", str(tmp_path / f"{shape}.jsonl"), f"--model={model}", f"--to={tmp_path / 'here'}"]) == 0
    config = tmp_path / "here" / f"{shape}.yaml"
    assert f"mezo-dist train {config}" in capsys.readouterr().out
    run = ["--train.steps=1", "--train.batch_size=2", "--train.micro_batch=2", f"--output.dir={tmp_path / 'run'}"]
    small = ["--task.splits.train.size=4", "--task.splits.validation.size=2", "--task.splits.test.size=2"]
    assert cli.main(["train", str(config), *run, *small]) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 1


def test_splits_of_the_data_are_kept_and_missing_ones_cut(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.jsonl", text=TEXTS, label=[0, 1] * (MANY // 2))
    write(folder / "test.jsonl", text=TEXTS[:10], label=[0, 1] * 5)
    assert cli.main(["init", str(folder), f"--model={model}", f"--to={tmp_path}", "--name=two"]) == 0
    task = (tmp_path / "two-task.yaml").read_text()
    assert 'train: {source: "train", size: 48}' in task
    assert 'validation: {source: "train", size: 12}' in task
    assert 'test: {source: "test", size: 10}' in task


def test_what_cannot_be_is_said(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "few.jsonl", text=TEXTS[:4])
    assert cli.main(["init", str(tmp_path / "few.jsonl"), f"--model={model}", f"--to={tmp_path}"]) == 2
    assert "4 rows are too few to cut train, validation and test" in capsys.readouterr().err
    (tmp_path / "x.yaml").write_text("mine")
    write(tmp_path / "x.jsonl", text=TEXTS)
    assert cli.main(["init", str(tmp_path / "x.jsonl"), f"--model={model}", f"--to={tmp_path}"]) == 2
    assert "x.yaml exists; choose another --name or --to" in capsys.readouterr().err
    assert (tmp_path / "x.yaml").read_text() == "mine"
    assert cli.main(["init", str(tmp_path / "x.jsonl"), f"--model={tmp_path}", f"--to={tmp_path / 'y'}"]) == 2
    assert "model.name" in capsys.readouterr().err
    assert not (tmp_path / "y").exists()
    classifier = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(model))
    classifier.save_pretrained(tmp_path / "classifier")
    tiny_tokenizer().save_pretrained(tmp_path / "classifier")
    assert cli.main(["init", str(tmp_path / "x.jsonl"), f"--model={tmp_path / 'classifier'}", f"--to={tmp_path / 'y'}"])
    assert "is neither a causal nor a masked language model" in capsys.readouterr().err
    assert not (tmp_path / "y").exists()


def test_norms_and_relative_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is named from the current folder, and whose norms are not called so."""
    monkeypatch.chdir(tmp_path)
    write_tiny_config(tmp_path / "here", "gpt2")
    write_starter("here/data.jsonl", "here/model", Path("there"), name="it")
    config = reader.load(Path("there/it.yaml"), [])
    assert config.located().model.name == str(tmp_path / "here" / "model")
    assert config.model.trainable == ("*ln_1.*", "*ln_2.*", "*ln_f.*")
