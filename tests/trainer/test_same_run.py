"""The same run, whoever drives it: `mezo-dist train`, `MeZOTrainer`, and this on several processes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from mezo_dist import MeZO, MeZOSVRG, MeZOTrainer, join
from mezo_dist.config import reader
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.runs import training
from mezo_dist.runs.build import build_run
from mezo_dist.storage import trajectory
from mezo_dist.testing import spawn, write_tiny_config
from tests.trainer.trainers import arguments, fingerprint, trainer

SETTINGS: dict[str, MeZO | MeZOSVRG] = {
    "mezo": MeZO(directions=2),
    "mezo-svrg": MeZOSVRG(anchor_lr=1e-2, q=3),
}


@pytest.mark.usefixtures("no_gpu")  # as the trainers of these tests
@pytest.mark.parametrize("name", SETTINGS)
def test_it_makes_the_steps_of_a_run(name: str, tmp_path: Path) -> None:
    """With the data in the run's order and the losses of its task: the same losses, updates and weights."""
    path = write_tiny_config(tmp_path, "llama-tied", name, steps=5, batch_size=4, micro_batch=4)
    options = ["algorithm.lr=1e-3", "train.frozen_cache_gib=0"]
    options += ["algorithm.directions=2"] if name == "mezo" else ["algorithm.anchor_lr=1e-2", "algorithm.q=3"]
    config = reader.load(path, options)
    folder = training.train(config, Communicator(), quiet=True)
    run = build_run(config, Communicator())

    class InOrder(MeZOTrainer):
        def _get_train_sampler(self, *_: Any) -> list[int]:
            return [i for step in range(5) for i in run.order.batch(step)]

        def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:
            (item,) = run.cut(inputs["samples"])
            loss: torch.Tensor = run.evaluator.forward(model, item).loss
            return loss

    def collate(samples: Sequence[Any]) -> dict[str, Any]:
        return {"samples": samples, "input_ids": torch.zeros(len(samples), 1)}

    args = arguments(
        tmp_path / "trainer",
        max_steps=5,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        lr_scheduler_type="constant",
        seed=config.seed,
        remove_unused_columns=False,
    )
    done = InOrder(run.pretrained.model, args, collate, run.splits["train"], algorithm=SETTINGS[name])
    done.train()
    theirs, ours = (trajectory.read(f / "trajectory.jsonl") for f in (folder, tmp_path / "trainer"))
    if name == "mezo":
        assert [(step.rounds, step.update) for step in ours.steps] == [(s.rounds, s.update) for s in theirs.steps]
        assert ours.marks[5] == theirs.marks[5]
    for one, other in zip(ours.steps, theirs.steps, strict=True):  # full batches are cut in another order
        assert one.rounds[0].mean == pytest.approx(other.rounds[0].mean, abs=1e-6)


def on_two(comm: Communicator, folder: str) -> list[Any]:
    """What a rank has after training on its part of every batch; and whether it can go on from its checkpoint."""
    torchrun_has = {"LOCAL_RANK": str(comm.rank), "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    os.environ.update(torchrun_has)  # accelerate wants to see them, though the processes have met already
    assert join().world_size == 2, "over the process group that is there"
    done, again = (trainer(Path(folder), SETTINGS["mezo-svrg"], gradient_accumulation_steps=1) for _ in range(2))
    done.train()
    assert done.model_wrapped is done.model, "nothing is wrapped around it"
    again.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    return [done.args.world_size, fingerprint(done), fingerprint(again), done.evaluate()["eval_loss"]]


@pytest.mark.distributed
def test_two_processes_make_one_update(tmp_path: Path) -> None:
    """Each evaluates every other micro-batch, and all apply the same bits: those of one process that has them all."""
    alone = trainer(tmp_path / "one", SETTINGS["mezo-svrg"], save_strategy="no")
    alone.train()
    ranks = spawn(on_two, 2, str(tmp_path / "two"))
    assert ranks[0] == ranks[1]
    assert ranks[0][:3] == [2, fingerprint(alone), fingerprint(alone)]
    one, two = (trajectory.read(tmp_path / folder / "trajectory.jsonl") for folder in ("one", "two"))
    assert one.steps == two.steps


class OwnMean(MeZOTrainer):
    """Its ``compute_loss`` is its own, and divides by nothing."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:
        loss: torch.Tensor = model(**inputs).loss
        return loss


def first_loss(folder: Path, batch_size: int, kind: type[MeZOTrainer]) -> float:
    """The loss of a step of a classifier, which takes ``num_items_in_batch`` and gives means all the same."""
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    rows = [{"input_ids": torch.arange(4, 12) + k, "labels": torch.tensor(k % 2)} for k in range(12)]
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=64, **size))
    sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 2}
    options: dict[str, Any] = {**sizes, "learning_rate": 1e-12, "save_strategy": "no", "max_steps": 1}
    done = trainer(folder, kind=kind, data=rows, model=model, **options)
    done.train()
    return float(trajectory.read(folder / "trajectory.jsonl").steps[0].rounds[0].mean[0])


def first_losses_on_two(comm: Communicator, folder: str) -> list[float]:
    os.environ.update(LOCAL_RANK=str(comm.rank), LOCAL_WORLD_SIZE="2", MASTER_ADDR="here", MASTER_PORT="1")
    return [first_loss(Path(folder, kind.__name__), 3, kind) for kind in (MeZOTrainer, OwnMean)]


def mean_of_those_that_count(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """It divides by nothing that it is told, and is 0 where no label counts."""
    total = nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
    return total / (labels != -100).sum().clamp(min=1)


def each(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """A loss for every sample."""
    return nn.functional.cross_entropy(outputs.logits, labels, reduction="none")


def masked_run(folder: Path, masked: Sequence[int], losses: Any, resume: str = "", **options: Any) -> list[Any]:
    """Losses of the steps of a classifier, samples in order, some without a label that counts; and its weights."""

    class InOrder(MeZOTrainer):
        def _get_train_sampler(self, *_: Any) -> list[int]:
            return list(range(16))

    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    labels = [torch.tensor(-100 if k in masked else k % 2) for k in range(16)]
    rows = [{"input_ids": torch.arange(4, 12) + k, "labels": label} for k, label in enumerate(labels)]
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=64, **size))
    options = {"gradient_accumulation_steps": 2, "max_steps": 4, "save_steps": 2, **options}
    done = trainer(folder, SETTINGS["mezo"], kind=InOrder, data=rows, model=model, compute_loss_func=losses, **options)
    done.train(resume_from_checkpoint=f"{folder}/{resume}" if resume else None)
    steps = trajectory.read(folder / "trajectory.jsonl").steps
    return [[step.rounds[0].mean[0] for step in steps], fingerprint(done)]


def masked_on_two(comm: Communicator, folder: str) -> list[Any]:
    os.environ.update(LOCAL_RANK=str(comm.rank), LOCAL_WORLD_SIZE="2", MASTER_ADDR="here", MASTER_PORT="1")
    one: dict[str, Any] = {"gradient_accumulation_steps": 1, "save_strategy": "no"}
    masked = [masked_run(Path(folder, str(k)), rows, mean_of_those_that_count, **one) for k, rows in enumerate(MASKED)]
    return [*masked, masked_run(Path(folder, "each"), (), each, **one)]


MASKED = ((0, 1), (2, 3), (8, 9), (0, 1, 2, 3))
"""Samples without labels, of micro-batches of 2 and batches of 4."""


@pytest.mark.distributed
def test_micro_batches_that_do_not_tell_whether_losses_are_divided(tmp_path: Path) -> None:
    """The next one is asked, on whichever rank; so the same steps come out of one process, two, and after a restart."""
    runs = [masked_run(tmp_path / f"one {k}", rows, mean_of_those_that_count) for k, rows in enumerate(MASKED)]
    for number, (rows, run) in enumerate(zip(MASKED, runs, strict=True)):
        losses = run[0]
        assert losses[rows[0] // 4] == pytest.approx(0.35 if len(rows) == 2 else 0.0, abs=0.05), "means of two of four"
        again = masked_run(tmp_path / f"one {number}", rows, mean_of_those_that_count, resume="checkpoint-2")
        assert again == run
    runs.append(masked_run(tmp_path / "each", (), each))
    for ranks in spawn(masked_on_two, 2, str(tmp_path / "two")):
        for one, two in zip(runs, ranks, strict=True):
            assert two[0] == pytest.approx(one[0], abs=1e-6)
            assert two[1] == one[1]


@pytest.mark.distributed
def test_losses_that_divide_by_nothing_do_not_grow_with_processes(tmp_path: Path) -> None:
    """Trainer multiplies them by the number of processes, unless a trainer computes losses of its own."""
    alone = first_loss(tmp_path / "one", 6, MeZOTrainer)
    for rank in spawn(first_losses_on_two, 2, str(tmp_path / "two")):
        assert rank == pytest.approx([alone, alone], abs=1e-5)
