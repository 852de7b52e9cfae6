"""Gradients of the first-order baselines are those of plain autograd, and of the losses that forward passes see; on two
processes and on shards they are the same but for the order in which numbers are added.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from torch import Tensor, nn

from mezo_dist.algorithms.base import Evaluation, Variant
from mezo_dist.algorithms.first_order import SGD as SGDSettings
from mezo_dist.algorithms.step import Progress
from mezo_dist.baselines.backward import back_propagating
from mezo_dist.config import reader
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.law import Law
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.engine import Engine
from mezo_dist.errors import UserError
from mezo_dist.runs.build import Run, build_run, with_gradients
from mezo_dist.runs.training import apply_step, evaluate_step
from mezo_dist.testing import spawn, write_tiny_config, write_tiny_model
from tests.parts import Parts, run_parts
from tests.tasks.kind_configs import TASKS, write_kind_config

EPS = 3e-4
LORA = ["model.peft.method=lora", "model.peft.target_modules=[q_proj,down_proj]"]
CASES: dict[str, list[str]] = {
    "label words": [],
    "calibrated": ["train.calibrate=true"],
    "recomputed": ["train.gradient_checkpointing=true"],
    "LoRA, recomputed": ["train.gradient_checkpointing=true", *LORA],
    "last block, remembered": ['model.trainable=["model.layers.1.mlp.*","model.norm.*"]'],
    "last block, recomputed": [
        'model.trainable=["model.layers.1.mlp.*","model.norm.*"]',
        "train.gradient_checkpointing=true",
    ],
}
STEPS = 3
ADAMW = ["algorithm.name=adamw", "algorithm.lr=3e-3", "algorithm.weight_decay=0.1", "algorithm.clip=2"]
SGD = ["algorithm.name=sgd", "algorithm.lr=0.05", "algorithm.momentum=0.9"]
COMPUTE = ["model.compute=bfloat16"]
ALONE: dict[str, list[str]] = {
    "adamw": ADAMW,
    "sgd": SGD,
    "calibrated": [*SGD, "train.calibrate=true"],
    "bf16 passes": [*SGD, *COMPUTE],
    "LoRA": [*ADAMW, *LORA],
    "a few weights": [*SGD, CASES["last block, recomputed"][0]],
}
ZERO = "layout.name=zero"
TOGETHER: dict[str, tuple[str, list[str]]] = {
    "whole": ("adamw", []),
    "whole, calibrated": ("calibrated", []),
    "whole, bf16 passes": ("bf16 passes", []),
    "shards": ("adamw", ["layout.name=fsdp"]),
    "shards, calibrated": ("calibrated", ["layout.name=fsdp"]),
    "shards, bf16 passes": ("bf16 passes", ["layout.name=fsdp"]),
    "shards in two copies, recomputed": (
        "sgd",
        ["layout.name=fsdp", "layout.replicate=2", "layout.offload=true", "train.gradient_checkpointing=true"],
    ),
    "zero": ("adamw", [ZERO, "layout.prefetch=true"]),
    "zero, calibrated": ("calibrated", [ZERO]),
    "zero, recomputed": ("sgd", [ZERO, "train.gradient_checkpointing=true"]),
    "zero, LoRA in host memory, recomputed": (
        "LoRA",
        [ZERO, "layout.ds_config=offload.json", "train.gradient_checkpointing=true"],
    ),
    "zero, a few weights": ("a few weights", [ZERO]),
    "zero, bf16 of fp32": ("bf16 passes", [ZERO, "model.weights=bfloat16"]),
}


def opened(path: Path, comm: Communicator, *options: str) -> Run:
    options = tuple(option.replace("=offload", f"={path.parent}/offload") for option in options)
    config = reader.load(path, [f"output.dir={path.parent / 'run'}", *options])
    return with_gradients(build_run(config, comm))


def gradient_of(run: Run) -> dict[str, Tensor]:
    """On the CPU, by parameter name."""
    return {n: p.grad.cpu() for n, p in run.pretrained.model.named_parameters() if p.grad is not None}


def direction(run: Run, seed: int) -> dict[str, Tensor]:
    values = {}
    for shard in run.engine.trainable_shards():
        values[shard.name] = torch.empty(shard.shape)
        zero, unit = torch.zeros(shard.shape), Combination.single(seed, 1.0)
        run.engine.law.add(zero, [unit], [values[shard.name]], param_id=shard.param_id, shape=shard.shape)
    return values


# On one process


def test_the_gradient_is_that_of_plain_autograd(tmp_path: Path) -> None:
    path = write_tiny_config(tmp_path, "llama", "mezo", batch_size=5, micro_batch=3)
    run = opened(path, Communicator(), *SGD)
    batch = run.batch("minibatch", 0)
    assert run.gradients is not None
    losses = run.gradients.losses(batch, ("here",))
    assert losses is not None

    model = t.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    terms = []
    for item in batch:
        logits = model(**item.inputs).logits[torch.arange(len(item.slots)), item.targets["position"]]
        terms.append(
            torch.nn.functional.cross_entropy(logits[:, run.class_tokens], item.targets["label"], reduction="none")
        )
    loss = torch.cat(terms).mean()
    loss.backward()
    expected = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    assert losses.mean[0] == pytest.approx(float(loss.detach()), rel=1e-6)
    norm = float(torch.cat([g.flatten() for g in expected.values()]).norm())
    assert losses.gradient_norm == pytest.approx(norm, rel=1e-5)
    assert norm > 0.1
    torch.testing.assert_close(gradient_of(run), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [*CASES, *TASKS])
def test_the_gradient_is_that_of_the_loss_that_forward_passes_see(tmp_path: Path, name: str) -> None:
    """Along a random direction, against a difference of losses that the engine evaluates: MeZO's projected gradient."""
    if name in CASES:
        path, options = write_tiny_config(tmp_path, "llama", "mezo", batch_size=5, micro_batch=3), CASES[name]
    else:
        path = write_kind_config(tmp_path, name)
        options = ["train.calibrate=true"] if name == "long words" else []
        if name == "long words":
            write_tiny_model(tmp_path / "model", "llama")  # in place of OPT, whose ReLUs have kinks
    run = opened(path, Communicator(), *SGD, *options)
    batch = run.batch("minibatch", 1)
    assert run.gradients is not None
    losses = run.gradients.losses(batch, ("here",))
    gradient = gradient_of(run)
    assert set(gradient) == set(run.engine.trainable)
    sides = Evaluation(tuple(Variant(Combination.single(1, eps)) for eps in (EPS, -EPS, 0.0)))
    seen = run.evaluator.losses(sides, batch, ("there",))
    assert losses is not None
    assert seen is not None
    assert losses.mean[0] == pytest.approx(seen.mean[2], rel=1e-5)
    projected = float(sum((gradient[n] * z).sum() for n, z in direction(run, 1).items()))
    assert abs(projected) > 1e-3
    assert projected == pytest.approx((seen.mean[0] - seen.mean[1]) / (2 * EPS), rel=0.02, abs=1e-3)


def test_a_step_is_the_one_of_torch(tmp_path: Path) -> None:
    """And decay falls on matrices alone."""
    path = write_tiny_config(tmp_path, "llama", "mezo", batch_size=5, micro_batch=3)
    run = opened(path, Communicator(), "algorithm.name=adamw", "algorithm.lr=3e-3", "algorithm.weight_decay=0.5")
    weights = {n: p.detach().clone().requires_grad_() for n, p in run.pretrained.model.named_parameters()}
    groups = [
        {"params": [w for w in weights.values() if (w.dim() > 1) == is_matrix], "weight_decay": 0.5 * is_matrix}
        for is_matrix in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    for step in range(3):
        result, passes = evaluate_step(run, run.algorithm.init(), step)
        assert passes == 3 * 5
        for name, gradient in gradient_of(run).items():
            weights[name].grad = gradient.clone()
        apply_step(run, result)
        optimizer.step()
    for name, weight in run.pretrained.model.named_parameters():
        assert torch.equal(weight, weights[name]), name


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(tmp_path: Path) -> None:
    path = write_tiny_config(tmp_path, "llama", "mezo", batch_size=5, micro_batch=3)
    run = opened(path, Communicator(), *SGD)
    assert run.gradients is not None
    before, forward = run.engine.fingerprint(), run.evaluator.forward

    def poisoned(model: Any, item: Any) -> Any:
        scores = forward(model, item)
        return dataclasses.replace(scores, loss=scores.loss * torch.inf)

    evaluator = dataclasses.replace(run.evaluator, forward=poisoned)
    run = dataclasses.replace(run, gradients=dataclasses.replace(run.gradients, evaluator=evaluator))
    result, _ = evaluate_step(run, run.algorithm.init(), 0)
    apply_step(run, result)
    assert result.skipped == "a loss is not finite"
    assert run.engine.fingerprint() == before
    assert not gradient_of(run)


# On two


def learn(comm: Communicator, root: Path, options: list[str]) -> dict[str, Any]:
    """A few steps: losses, norms, and the weights after them."""
    run = opened(root / "config.yaml", comm, *options)
    progress: Progress[object] = Progress(run.algorithm.init())
    losses, norms = [], []
    for step in range(STEPS):
        result, _ = evaluate_step(run, progress.state, step)
        apply_step(run, result)
        progress.after(result.update)
        losses.append(result.rounds[0].mean[0])
        norms.append(result.rounds[0].gradient_norm)
    weights = {name: tensor.float().numpy().copy() for name, tensor in run.engine.named_weights()}
    comm.agree({"weights": run.engine.fingerprint()})
    return {"losses": losses, "norms": norms, "weights": weights}


class Experts(nn.Module):
    """A model of which a pass uses one part, at will."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor, which: int) -> Tensor:
        result: Tensor = self.experts[which](x)
        return result


def use_one_expert_after_the_other(comm: Communicator) -> dict[str, Any]:
    """The weights after each step, and what is said of a step that DeepSpeed skips."""
    from mezo_dist.baselines.zero_optimizer import ZeroOptimizer
    from mezo_dist.engines.layouts.zero import Zero

    torch.manual_seed(0)
    model, x = Experts(), torch.randn(2, 4)
    layout = Zero(model, comm, {})
    engine = Engine(model, Law("gaussian"), layout)
    optimizer = ZeroOptimizer(engine, layout, comm, SGDSettings(lr=0.1))

    def step(which: int) -> list[float]:
        optimizer.forget_gradients()
        with back_propagating(engine, recompute=False):
            optimizer.backward(optimizer.model(x, which).square().sum())
        optimizer.sum_gradients(comm, 2, which)
        optimizer.step(0.1, 1.0)
        return [float(tensor.double().sum()) for _, tensor in engine.named_weights()]

    weights = [step(0), step(1)]
    optimizer.model.was_step_applied = lambda: False  # on a GPU, where it adds squares up in float32
    try:
        step(0)
    except UserError as error:
        return {"weights": weights, "error": str(error)}
    return {"weights": weights, "error": ""}


def everything(comm: Communicator, root: Path) -> Parts:
    parts: dict[str, Callable[[], Any]] = {
        name: functools.partial(learn, comm, root, [*ALONE[alone], *more]) for name, (alone, more) in TOGETHER.items()
    }
    gc.freeze()  # DeepSpeed collects garbage as it makes an engine, which would look at all modules every time
    return run_parts({**parts, "experts": functools.partial(use_one_expert_after_the_other, comm)})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A minibatch of 5 makes micro-batches of 2, 2 and 1, so that one of two ranks has less to do."""
    root = tmp_path_factory.mktemp("gradients")
    write_tiny_config(root, "llama-tied", "mezo", batch_size=5, micro_batch=2)
    away = {"device": "cpu"}
    (root / "offload.json").write_text(
        json.dumps({"zero_optimization": {"offload_param": away, "offload_optimizer": away}})
    )
    return root


@pytest.fixture(scope="module")
def two(root: Path) -> list[Parts]:
    return spawn(everything, 2, root, timeout_s=500)


@pytest.fixture(scope="module")
def one(root: Path) -> Callable[[str], dict[str, Any]]:
    return functools.cache(lambda name: learn(Communicator(), root, ALONE[name]))


@pytest.mark.distributed
@pytest.mark.parametrize("name", TOGETHER)
def test_two_processes_learn_what_one_does(
    root: Path, one: Callable[[str], dict[str, Any]], two: list[Parts], name: str
) -> None:
    """Sums of gradients are added in another order: their last bits may differ, and AdamW divides them by their size.
    In bf16 shards are summed in bf16."""
    tolerance = 2e-2 if "bf16" in name else 1e-3
    alone, together = one(TOGETHER[name][0]), two[0][name]
    assert together["losses"] == pytest.approx(alone["losses"], rel=tolerance)
    assert together["norms"] == pytest.approx(alone["norms"], rel=tolerance)
    assert len(set(alone["losses"])) == STEPS
    for weight, expected in alone["weights"].items():
        np.testing.assert_allclose(
            together["weights"][weight], expected, rtol=tolerance, atol=tolerance / 10, err_msg=weight
        )
    assert two[1][name]["losses"] == together["losses"], "ranks agree, bit for bit"
    assert two[1][name]["norms"] == together["norms"]


@pytest.mark.distributed
def test_weights_that_a_step_of_deepspeed_does_not_use_stay_as_they_are(two: list[Parts]) -> None:
    """It would use their last gradient again."""
    first, second = two[0]["experts"]["weights"]
    assert second[:2] == first[:2]
    assert second[2] != first[2]
    assert two[1]["experts"] == two[0]["experts"]


@pytest.mark.distributed
def test_a_step_that_deepspeed_skips_is_no_step(two: list[Parts]) -> None:
    assert "DeepSpeed skipped a step, as the norm of its gradient is too large" in two[0]["experts"]["error"]
