"""Runs with calibrated losses: what they report is what the exported model does, used as its calibration.json says."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as t
from torch import Tensor
from torch.nn import functional as F

from mezo_dist import cli
from mezo_dist.config import reader
from mezo_dist.config.schema import RunConfig
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.objectives.calibration import best_offsets
from mezo_dist.runs import build, training
from mezo_dist.testing import write_tiny_config
from tests.run_folders import results

CLASSIFIER = "model.head=classifier"
RUNS: dict[str, tuple[str, list[str], Any, str | None]] = {
    "label words": ("opt", [], t.AutoModelForCausalLM, None),
    "head with a bias": ("bert", [CLASSIFIER], t.AutoModelForSequenceClassification, "classifier.bias"),
    "head of layers": ("roberta", [CLASSIFIER], t.AutoModelForSequenceClassification, "classifier.out_proj.bias"),
    "head without": ("llama", [CLASSIFIER], t.AutoModelForSequenceClassification, None),
    "adapters": (
        "bert",
        [CLASSIFIER, "model.peft.method=lora"],
        peft.AutoPeftModelForSequenceClassification,
        "base_model.model.classifier.modules_to_save.default.bias",
    ),
}
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft's, on loading
every_run = pytest.mark.parametrize("name", RUNS)


def load(root: Path, name: str) -> RunConfig:
    options = [*RUNS[name][1], "train.calibrate=true", "algorithm.lr=0.05", "algorithm.anchor_lr=0.05"]
    return reader.load(root / name / "config.yaml", options)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("calibrated")
    for name, (kind, *_) in RUNS.items():
        write_tiny_config(root / name, kind)
        training.train(load(root, name), Communicator())
    return root


def logits_of(model: Any, run: build.Run, split: str, tokens: dict[str, int] | None) -> tuple[Tensor, Tensor]:
    """What an exported model says of the classes, and labels."""
    logits, labels = [], []
    for item in run.split(split):
        with torch.no_grad():
            batch_logits = model(**item.inputs).logits
        if tokens is not None:
            at = item.targets["position"]
            batch_logits = batch_logits[torch.arange(len(batch_logits)), at][:, list(tokens.values())]
        logits.append(batch_logits.float())
        labels.append(item.targets["label"])
    return torch.cat(logits), torch.cat(labels)


@every_run
def test_the_exported_model_does_what_the_run_reports(root: Path, name: str) -> None:
    _, _, loader, bias = RUNS[name]
    folder, run = root / name / "run", build.build_run(load(root, name), Communicator())
    about = json.loads((folder / "model/calibration.json").read_text())
    assert about["added_to"] == bias
    assert (about["tokens"] is None) == (run.pretrained.kind == "classifier")
    offsets = torch.tensor(list(about["offsets"].values()))
    assert offsets.abs().max() > 1e-3
    model = loader.from_pretrained(folder / "model").eval()
    logits, labels = logits_of(model, run, "test", about["tokens"])
    logits = logits if bias else logits + offsets
    after = results(folder)["after"]
    assert after["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-4)
    assert after["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    # Where the offsets are from: the training samples.
    logits, labels = logits_of(model, run, "train", about["tokens"])
    logits = logits - offsets if bias else logits
    assert best_offsets(logits.double(), labels).tolist() == pytest.approx(offsets.tolist(), abs=1e-3)
    assert results(folder)["offsets"] == pytest.approx(about["offsets"])


def test_evaluate_and_export_have_the_offsets_too(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = root / "label words" / "run"
    assert cli.main(["evaluate", str(run)]) == 0
    assert f"loss {results(run)['after']['loss']:.4f}" in capsys.readouterr().out
    assert cli.main(["export", str(run), str(tmp_path / "model")]) == 0
    assert (tmp_path / "model/calibration.json").read_text() == (run / "model/calibration.json").read_text()


def test_a_replay_has_no_data_for_offsets_and_says_so(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert cli.main(["replay", str(root / "label words" / "run"), "--export", str(tmp_path / "model")]) == 0
    assert "without data there are no offsets (train.calibrate); `export` has them" in caplog.text
    assert not (tmp_path / "model/calibration.json").exists()


def test_plain_runs_know_nothing_of_it(tmp_path: Path) -> None:
    run = training.train(reader.load(write_tiny_config(tmp_path, steps=1)), Communicator())
    assert "offsets" not in results(run)
    assert not (run / "model/calibration.json").exists()
