"""Tiny trainers for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from mezo_dist import MeZO, MeZOSVRG, MeZOTrainer
from mezo_dist.testing import tiny_model

IDS = torch.randint(4, 60, (16, 9), generator=torch.Generator().manual_seed(1))
LABELS = IDS.masked_fill(torch.arange(9) < torch.arange(16)[:, None] % 6, -100)
"""Samples have between 3 and 8 tokens whose losses count."""
DATA = [{"input_ids": ids, "labels": labels} for ids, labels in zip(IDS, LABELS, strict=True)]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "learning_rate": 1e-3,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(output_dir=str(folder), **{**settings, **changes})


def trainer(
    folder: Path, algorithm: MeZO | MeZOSVRG | None = None, kind: type[MeZOTrainer] = MeZOTrainer, **options: Any
) -> MeZOTrainer:
    """A trainer of a tiny model.

    Args:
        folder: for its output.
        algorithm: its settings.
        kind: class of the trainer.
        options: of the trainer, or of its arguments.
    """
    names = (
        "layout",
        "model",
        "compute_loss_func",
        "callbacks",
        "full_size",
        "probe",
        "max_skipped",
        "compute_metrics",
        "law",
    )
    more = {name: options.pop(name) for name in names if name in options}
    model = more.pop("model", None) or tiny_model("llama-tied")
    data = options.pop("data", DATA)
    return kind(model, arguments(folder, **options), train_dataset=data, eval_dataset=data, algorithm=algorithm, **more)


def losses(done: MeZOTrainer) -> list[float]:
    return [line["loss"] for line in done.state.log_history if "loss" in line]


def weights(done: MeZOTrainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in done.model.named_parameters()}


def fingerprint(done: MeZOTrainer) -> str:
    return done._mezo_staged().engine.fingerprint()
