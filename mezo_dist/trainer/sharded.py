"""A `MeZOTrainer` whose weights are cut over the processes: checkpoints, going on from them, and what cannot be there.

A checkpoint holds the whole model, which rank 0 writes weight by weight as they are gathered, and in ``shards/`` the
pieces of the ranks, with the copy of the anchor if there is one. A run goes on from the latter, on any number of
processes; no rank ever holds all weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from mezo_dist.algorithms.base import Variant
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.engine import Engine
from mezo_dist.errors import UserError
from mezo_dist.storage.files import remove
from mezo_dist.storage.snapshot_writer import save_snapshot
from mezo_dist.storage.snapshots import load_snapshot, snapshots
from mezo_dist.trainer.batches import Inputs

SHARDS = "shards"
"""Folder in a checkpoint that holds the pieces."""
EXPORTED = ".whole"
"""Folder in a checkpoint in which the whole model is written, before its files are moved out."""
NO_TEXTS = (
    "texts cannot be written while weights are cut over the processes (layout=...): each token would gather all of "
    "them; load a checkpoint, which holds the whole model, and let that generate"
)


def prepare(model: Any, args: Any) -> None:
    """Refuse what sharded weights cannot do, and keep Trainer from moving them.

    Args:
        model: of transformers.
        args: the `transformers.TrainingArguments`.

    Raises:
        UserError: an argument asks for it.
    """
    if getattr(args, "predict_with_generate", False):
        raise UserError(f"predict_with_generate: {NO_TEXTS}")
    for name in ("fp16_full_eval", "bf16_full_eval"):
        if getattr(args, name, False):
            raise UserError(f"{name}: would cast the shards of the weights; leave it out")
    if "place_model_on_device" in vars(args):
        args.place_model_on_device = False  # they are where the layout wants them
    if hasattr(model, "generate"):
        model.generate = _no_texts


def _no_texts(*_: object, **__: object) -> NoReturn:
    raise UserError(f"generate: {NO_TEXTS}")


def evaluate_one(engine: Engine, inputs: Inputs, forward: Callable[[nn.Module, Inputs], Any]) -> Any:
    """``forward(model, inputs)`` with the weights as they are, gathered unit by unit. Collective: all ranks
    evaluate equally many batches.

    Args:
        engine: owns the weights.
        inputs: a batch of this rank.
        forward: calls the model.
    """
    return engine.evaluate([Variant()], [inputs], forward, most=1, filler=inputs)[0][0]


def save_whole(engine: Engine, comm: Communicator, folder: Path, tokenizer: Any, args: Any) -> None:
    """Write the whole model into ``folder``, as Trainer's own ``save_model`` would. Collective; rank 0 writes.

    Args:
        engine: owns the weights.
        comm: the ranks.
        folder: made if need be; other files in it stay.
        tokenizer: is saved beside the model; None: there is none.
        args: the `transformers.TrainingArguments`, which Trainer keeps with the model.

    Raises:
        UserError: on all ranks: it cannot be written.
    """
    from mezo_dist.runs.export import export_model

    def finish() -> None:
        if comm.rank == 0:
            for file in sorted((folder / EXPORTED).iterdir()):
                os.replace(file, folder / file.name)
            remove(folder / EXPORTED)
            torch.save(args, folder / "training_args.bin")

    comm.collect(lambda: folder.mkdir(parents=True, exist_ok=True))
    export_model(engine, tokenizer, folder / EXPORTED, comm)
    comm.collect(finish)


def save_shards(engine: Engine, comm: Communicator, checkpoint: Path, step: int) -> None:
    """Write the pieces of all ranks into a checkpoint. Collective. Raises as `save_snapshot` does.

    Args:
        engine: owns the weights.
        comm: the ranks.
        checkpoint: the folder, which all ranks must see.
        step: steps done.
    """
    save_snapshot(checkpoint / SHARDS, engine, step, comm, keep=1)


def load_shards(engine: Engine, comm: Communicator, checkpoint: Path) -> None:
    """Overwrite the weights, and the copy of the anchor if there is one, with those of a checkpoint. Collective.

    Args:
        engine: owns the weights.
        comm: the ranks.
        checkpoint: the folder.

    Raises:
        UserError: it holds no shards, or damaged ones.
    """
    names = comm.broadcast_text(" ".join(path.name for path in snapshots(checkpoint / SHARDS))).split()
    if not names:
        raise UserError(
            f"resume_from_checkpoint: {checkpoint / SHARDS} holds no shards: the checkpoint was written by a run with "
            "whole weights, or with save_only_model; begin a new run from its weights (model=...)"
        )
    load_snapshot(checkpoint / SHARDS / names[-1], engine, comm, anchor=True)
