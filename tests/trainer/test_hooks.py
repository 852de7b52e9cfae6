"""What `MeZOTrainer` overrides and calls of Trainer is as it was when its loop was read."""

from __future__ import annotations

import ast
import inspect

import pytest
from transformers import Trainer

from mezo_dist import MeZOTrainer
from mezo_dist.trainer.losses import TrainerLosses

HOOKS = {
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "create_optimizer": ["self", "model"],
    "log": ["self", "logs", "start_time"],
    "save_model": ["self", "output_dir", "_internal_call"],
    "prediction_step": ["self", "model", "inputs", "prediction_loss_only", "ignore_keys"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_load_best_model": ["self"],
    "create_accelerator_and_postprocess": ["self"],
    "_clip_grad_norm": ["self", "model"],
    "_get_grad_norm": ["self", "model", "grad_norm"],
}
CALLED = {
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    "compute_loss_context_manager": ["self"],
    "get_batch_samples": ["self", "epoch_iterator", "num_batches", "device"],
    "get_decay_parameter_names": ["self", "model"],
    "get_train_dataloader": ["self"],
    "_prepare_inputs": ["self", "inputs"],
}


@pytest.mark.parametrize(("hook", "parameters"), [*HOOKS.items(), *CALLED.items()])
def test_they_are_what_they_were(hook: str, parameters: list[str]) -> None:
    theirs = inspect.signature(getattr(Trainer, hook)).parameters
    assert list(theirs) == parameters, f"transformers changed Trainer.{hook}: read its loop again"


@pytest.mark.parametrize("hook", HOOKS)
def test_ours_take_what_theirs_take(hook: str) -> None:
    """In the same order, with the same defaults; what ours pass on as ``*args`` and ``**kwargs`` may be anything."""
    ours = inspect.signature(getattr(MeZOTrainer, hook)).parameters
    theirs = inspect.signature(getattr(Trainer, hook)).parameters
    named = [p for p in ours.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    expected = list(theirs.values())
    if len(named) < len(ours):
        expected = expected[: len(named)]
    assert [(p.name, p.kind, p.default) for p in named] == [(p.name, p.kind, p.default) for p in expected]


def test_all_that_is_overridden_or_called_is_checked() -> None:
    overridden = {name for name, value in vars(MeZOTrainer).items() if callable(value) and hasattr(Trainer, name)}
    assert overridden - {"__init__"} == HOOKS.keys()
    # getattr: what some version or a trainer of TRL has, and others do without
    trees = [ast.parse(inspect.getsource(item)) for item in (MeZOTrainer, TrainerLosses)]
    calls = [node.func for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = {f.attr for f in calls if isinstance(f, ast.Attribute) and ast.unparse(f.value) in ("self", "trainer")}
    methods = {name for name in named if inspect.isfunction(getattr(Trainer, name, None))}
    elsewhere = {"add_callback", "push_to_hub"}  # public; the latter gets two arguments by name, among more every year
    assert methods - HOOKS.keys() - elsewhere == CALLED.keys() - HOOKS.keys()
    assert {"commit_message", "revision"} <= inspect.signature(Trainer.push_to_hub).parameters.keys()
