"""Trainers of TRL with steps of MeZO: `MeZOTrainer` is a mix-in for them. Skipped where TRL is not installed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from mezo_dist import MeZO, MeZOTrainer
from mezo_dist.testing import WORDS, tiny_model, tiny_tokenizer
from tests.trainer.trainers import fingerprint, losses

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's, and what it makes transformers say


def words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(WORDS, k=count))


def settings(config: Any, folder: Path, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "max_steps": 2,
        "save_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "max_length": 32,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return config(output_dir=str(folder), **{**options, **changes})


def test_supervised_fine_tuning(tmp_path: Path) -> None:
    """Its losses are those of SFTTrainer, and it is gone on with as any run."""
    trl = pytest.importorskip("trl", reason="TRL is not installed (pip install --no-deps trl)")
    datasets = pytest.importorskip("datasets")

    class MeZOSFTTrainer(MeZOTrainer, trl.SFTTrainer):  # type: ignore[name-defined]
        pass

    draw = random.Random(0)
    rows = [{"prompt": words(draw, 5), "completion": words(draw, 3 + i % 4)} for i in range(16)]
    parts = {"train_dataset": datasets.Dataset.from_list(rows), "processing_class": tiny_tokenizer()}

    def make(folder: str) -> Any:
        args = settings(trl.SFTConfig, tmp_path / folder)
        return MeZOSFTTrainer(tiny_model("llama-tied"), args, algorithm=MeZO(eps=1e-4), **parts)

    plain = trl.SFTTrainer(tiny_model("llama-tied"), settings(trl.SFTConfig, tmp_path / "plain"), **parts)
    whole, again = make("whole"), make("again")
    plain.train()
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert losses(whole)[0] == pytest.approx(losses(plain)[0], abs=1e-4)
    assert fingerprint(again) == fingerprint(whole)


def test_rewards_and_preferences(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed (pip install --no-deps trl)")
    datasets, transformers = pytest.importorskip("datasets"), pytest.importorskip("transformers")
    draw = random.Random(0)
    rows = [{"prompt": words(draw, 5), "chosen": words(draw, 4), "rejected": words(draw, 3)} for _ in range(8)]
    tiny_model("llama-tied").save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    scorer = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=1)
    writer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for kind, config, model in (
        (trl.RewardTrainer, trl.RewardConfig, scorer),
        (trl.DPOTrainer, trl.DPOConfig, writer),
    ):
        made = type("Mixed", (MeZOTrainer, kind), {})(
            model,
            args=settings(config, tmp_path / kind.__name__),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tiny_tokenizer(),
            algorithm=MeZO(),
        )
        before = fingerprint_of(made)
        made.train()
        assert losses(made)[0] == pytest.approx(0.693, abs=0.1)
        assert fingerprint(made) != before


def fingerprint_of(one: MeZOTrainer) -> str:
    one.create_optimizer()
    return fingerprint(one)
