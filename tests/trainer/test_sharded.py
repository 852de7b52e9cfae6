"""`MeZOTrainer` with weights that are cut over two processes: the bits of whole ones, in checkpoints, too."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mezo_dist import MeZOSVRG, MeZOTrainer, UserError, join, replay, shard
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.testing import spawn, tiny_model
from mezo_dist.trainer import sharded
from tests.trainer.trainers import arguments, fingerprint, trainer

ALGORITHM = MeZOSVRG(anchor_lr=1e-2, q=4, anchor="stored")
LAYOUTS = ("replicated", "fsdp", "zero")


def on_two(comm: Communicator, root: str) -> dict[str, dict[str, Any]]:
    """What a rank sees of the same training on every layout."""
    torchrun_has = {"LOCAL_RANK": str(comm.rank), "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    os.environ.update(torchrun_has)
    assert join().world_size == 2
    return {layout: one(Path(root, layout), layout) for layout in LAYOUTS}


def one(folder: Path, name: Any) -> dict[str, Any]:
    def build(**options: Any) -> Any:
        model = tiny_model("llama-tied")
        layout = None if name == "replicated" else shard(model, name)
        common: dict[str, Any] = {"gradient_accumulation_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
        return trainer(folder, ALGORITHM, model=model, layout=layout, **common, **options)

    done = build(load_best_model_at_end=True, metric_for_best_model="eval_turn", compute_metrics=turn)
    before = done.evaluate()["eval_loss"]
    done.train()
    best, after = fingerprint(done), done.evaluate()["eval_loss"]
    again = build()
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    again.save_model(str(folder / "last"))
    told = {}
    if name != "replicated":
        with pytest.raises(UserError, match=r"^generate: texts cannot be written while weights are cut"):
            again.model.generate(torch.ones(1, 1, dtype=torch.long))
        with pytest.raises(UserError, match=r"^resume_from_checkpoint: .*holds no shards"):
            again._load_from_checkpoint(str(folder / "last"))
        told["is_cut"] = sum(shard.tensor.numel() for shard in again._mezo_engine(again.model).shards())
    losses = [line["eval_loss"] for line in again.state.log_history if "eval_loss" in line]
    return {
        "bits": [before, best, after, fingerprint(again), losses],
        **told,
    }


def turn(prediction: Any) -> dict[str, float]:
    """The checkpoint after two steps is the best: it is evaluated first."""
    turn.calls = getattr(turn, "calls", 0) + 1  # type: ignore[attr-defined]
    assert prediction.predictions.shape[0] == 16
    return {"turn": -float(turn.calls)}  # type: ignore[attr-defined]


@pytest.mark.distributed
def test_every_layout_gives_the_same_bits(tmp_path: Path) -> None:
    ranks = spawn(on_two, 2, str(tmp_path))
    whole = ranks[0]["replicated"]["bits"]
    for rank in ranks:
        for layout in LAYOUTS:
            assert rank[layout]["bits"] == whole, layout
    size = sum(parameter.numel() for parameter in tiny_model("llama-tied").parameters())
    for layout in LAYOUTS[1:]:
        counts = [rank[layout]["is_cut"] for rank in ranks]
        assert sum(counts) == size
        assert max(counts) < 0.7 * size
    for folder in ("checkpoint-2", "checkpoint-4", "last"):
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "replicated" / folder).state_dict()
        for layout in LAYOUTS[1:]:
            here = tmp_path / layout / folder
            weights = AutoModelForCausalLM.from_pretrained(here).state_dict()
            assert weights.keys() == expected.keys()
            assert all(torch.equal(weights[name], expected[name]) for name in expected), (layout, folder)
            assert not (here / sharded.EXPORTED).exists()
            assert (here / "training_args.bin").is_file()
            assert (here / sharded.SHARDS).exists() == (folder != "last")
            text = (here / "trajectory.jsonl").read_bytes()
            assert text == (tmp_path / "replicated" / folder / "trajectory.jsonl").read_bytes()
    model = tiny_model("llama-tied")
    assert replay(model, tmp_path / "zero" / "checkpoint-4" / "trajectory.jsonl") == 4
    assert all(torch.equal(expected[name], weight) for name, weight in model.state_dict().items() if name in expected)


@pytest.mark.parametrize("name", ["predict_with_generate", "bf16_full_eval", "fp16_full_eval"])
def test_what_sharded_weights_cannot_do_is_refused(name: str, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    setattr(args, name, True)
    with pytest.raises(UserError, match=f"^{name}: "):
        sharded.prepare(tiny_model("llama-tied"), args)


def test_another_model_than_the_one_that_was_cut_is_refused(tmp_path: Path) -> None:
    layout: Any = SimpleNamespace(is_sharded=True)
    with pytest.raises(UserError, match=r"^model_init: "):
        MeZOTrainer(args=arguments(tmp_path), model_init=lambda: tiny_model("llama-tied"), layout=layout)


@pytest.mark.parametrize(("name", "layout"), [("fsdp", "fsdp"), ("deepspeed", "zero")])
def test_layouts_of_trainer_are_refused_with_ours(name: str, layout: str, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    setattr(args, name, "full_shard")
    with pytest.raises(UserError, match=rf"^{name}: .*layout=mezo_dist\.shard\(model, '{layout}'\)"):
        MeZOTrainer(tiny_model("llama-tied"), args)
