"""The memory of a rank's steps: what the plan says of it, and, on a GPU, one pool for all of it.

Scratch, hidden states and logits come from torch's allocator, which keeps what is freed, but in the pieces that it
asked the GPU for: a step whose tensors are a little larger than those before asks for more, and pieces of many sizes do
not fit together. So one piece, as large as the plan says that a step takes beside the weights, is allocated and freed
before the first step. The allocator cuts what follows from it.
"""

from __future__ import annotations

import dataclasses
import logging

import torch

from mezo_dist.algorithms import FirstOrder
from mezo_dist.engines.capacity import free_bytes
from mezo_dist.errors import UserError
from mezo_dist.planning.from_config import setting_of
from mezo_dist.planning.lookup import find_shape
from mezo_dist.planning.machine import GIB, Machine
from mezo_dist.planning.memory import Memory, memory_of
from mezo_dist.runs.build import Run
from mezo_dist.runs.memory import advice

log = logging.getLogger(__name__)

RANDOM = "random:"
LASTING = ("weights", "anchor", "frozen cache", "runtime")
"""Parts of a plan that are not a step's: they are there before it, or stay."""


def planned_memory(run: Run, tokens: int) -> Memory:
    """What the cost model says of the memory of a rank.

    Args:
        run: what is planned.
        tokens: of the longest sample, padding included.

    Raises:
        UserError: the model or a setting is not planned.
    """
    config, notes = run.config, list[str]()
    if isinstance(config.algorithm, FirstOrder):
        raise UserError(f"algorithm.name: {config.algorithm.name} is not planned")
    setting = setting_of(config, notes)
    shape = find_shape(config.located().model.name.removeprefix(RANDOM), notes)
    if config.model.peft.method is not None:
        raise UserError("model.peft is not planned")
    shape = shape.trained(config.model.trainable, config.model.freeze)
    variants = len(run.algorithm.plan(run.algorithm.init(), 0).variants)
    width = max(1, run.evaluator.capacity // (variants * config.train.micro_batch * tokens))
    setting = dataclasses.replace(
        setting,
        tokens=tokens,
        targets=min(setting.targets, tokens),
        num_train=len(run.splits["train"]),
        full_size=run.problem.full_size,
        width=config.train.width or width,
    )
    hosts = max(1, run.comm.world_size // run.comm.ranks_here)
    return memory_of(shape, setting, Machine(hosts, run.comm.world_size // hosts, gpu=torch.cuda.is_available()))


def reserve(run: Run, step: int) -> int:
    """Ask the GPU for the memory that a step takes beside the weights; nothing is asked for where there is no GPU or no
    plan.

    Args:
        run: whose weights are there.
        step: the next one; samples of its minibatch say how long samples are.

    Returns:
        Bytes.
    """
    device = next(run.engine.model.parameters()).device
    if device.type != "cuda":
        return 0
    tokens = max(item.inputs["input_ids"].shape[1] for item in run.batch("minibatch", step))
    try:
        memory = planned_memory(run, tokens)
    except UserError as error:
        log.info("memory is not asked for in advance, as there is no plan: %s", error)
        return 0
    size = sum(size for name, size in memory.parts.items() if name not in LASTING)
    if size > (free := free_bytes()):
        log.warning(
            "the plan says that a step takes %.2f GiB beside the weights, and %.2f are free: %s",
            size / GIB, free / GIB, advice(run.config),
        )  # fmt: skip
        return 0
    try:
        torch.empty(size, dtype=torch.uint8, device=device)  # freed at once, and kept by the allocator
    except torch.OutOfMemoryError:  # what is free is in pieces, which may do
        log.info("memory is not asked for in advance, as no %.2f GiB are free in one piece", size / GIB)
        return 0
    return size
