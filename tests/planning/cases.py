"""Real steps on small random models, with the memory and the bytes that they take, and the plans of the same."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mezo_dist import algorithms
from mezo_dist.algorithms.base import Problem
from mezo_dist.algorithms.step import Progress, take_step
from mezo_dist.directions.law import Law
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.layouts.base import Layout
from mezo_dist.engines.units import Unit
from mezo_dist.planning.families import shape_of_config
from mezo_dist.planning.machine import Machine
from mezo_dist.planning.memory import memory_of, width_of
from mezo_dist.planning.rounds import rounds_of
from mezo_dist.planning.setting import Setting
from mezo_dist.planning.shapes import ModelShape
from mezo_dist.planning.traffic import traffic_of
from mezo_dist.runs.evaluation import Evaluator
from mezo_dist.runs.work_split import WorkSplit
from mezo_dist.tasks.batches import MicroBatch
from mezo_dist.tasks.classification.label_words import LabelWords
from mezo_dist.tasks.kind import Bench, Scores
from mezo_dist.tasks.scoring import TokenScores, token_targets

SIZES = {"vocab_size": 3000, "hidden_size": 192, "num_attention_heads": 8, "max_position_embeddings": 512}
GATED = {**SIZES, "num_hidden_layers": 3, "intermediate_size": 768, "num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "opt": {"model_type": "opt", **SIZES, "num_hidden_layers": 3, "ffn_dim": 768, "word_embed_proj_dim": 192},
    "llama": {"model_type": "llama", **GATED, "tie_word_embeddings": False},
    "llama-tied": {"model_type": "llama", **GATED, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **GATED, "intermediate_size": 384, "head_dim": 48, "tie_word_embeddings": True},
    "mixtral": {"model_type": "mixtral", **GATED, "intermediate_size": 384, "num_local_experts": 4,
                "num_experts_per_tok": 2},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model and a way to run it."""

    model: str
    setting: Setting
    trainable: tuple[str, ...] = ("*",)

    def shape(self) -> ModelShape:
        """The plan's model."""
        shape = shape_of_config(MODELS[self.model], self.model)
        assert shape is not None
        return shape.trained(self.trainable)


@dataclass(frozen=True)
class Figures:
    """Of the rank that has most of it."""

    weights: int
    """Bytes that are there between steps: shards, and a kept anchor."""
    peak: int
    """Bytes of tensors at most."""
    gathered: int
    """Bytes gathered in all steps."""


def planned(case: Case, ranks: int) -> Figures:
    """What the plan says of the steps that `measured` takes."""
    shape, machine = case.shape(), Machine(ranks_per_host=ranks, runtime=0, gpu=False)
    memory = memory_of(shape, case.setting, machine)
    steps = rounds_of(case.setting, ranks)
    gathered = sum(
        traffic_of(shape, case.setting, machine, step, width_of(shape, case.setting, step, 0)).gathered
        for step in steps
    )
    return Figures(memory.parts["weights"] + memory.parts["anchor"], memory.tensors, gathered)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that torch has allocated at a time during ``work``, above what there was before: a running sum of
    all allocations of the CPU allocator in this thread. Garbage of an earlier measurement, if Python frees it during
    ``work``, would be taken off the sum: it is collected before."""
    gc.collect()
    gc.disable()
    try:
        with profile(use_cpu=True, profile_memory=True) as recorded:
            work()
    finally:
        gc.enable()
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    now = peak = 0
    for event in events:
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def measured(case: Case, comm: Communicator) -> Figures:
    """One cycle of the algorithm: one step of MeZO; an anchor step and the inner steps of MeZO-SVRG."""
    setting = case.setting
    torch.manual_seed(0)
    settings = dict(MODELS[case.model])
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings, use_cache=False)
    model = transformers.AutoModelForCausalLM.from_config(config).to(getattr(torch, setting.weights)).eval()
    shape = case.shape()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(w.name == name and w.trainable for w in shape.weights))
    compute = getattr(torch, setting.compute) if setting.compute else None
    engine = Engine(model, Law(setting.law, setting.direction_rank), _layout(setting, model, comm),
                    compute_dtype=compute, prefetch=setting.prefetch)  # fmt: skip
    forward = _forward(setting, model, engine)
    _free_in_this_thread(engine.layout)
    copies = setting.copies(comm.world_size)
    split = WorkSplit(comm.world_size, copies, by_base=setting.is_sharded)
    evaluator = Evaluator(engine, forward, comm, setting.width, work_split=split)
    problem = Problem(0, 1000, setting.batch_size, setting.full_size, setting.weights != "float32")
    planner = algorithms.build(setting.algorithm.name, setting.algorithm, problem)
    progress: Progress[Any] = Progress(planner.init())
    batches = {size: _batch(setting, size) for size in (setting.batch_size, setting.full_size)}

    def steps(count: int) -> None:
        for _ in range(count):
            step()

    def step() -> None:
        def evaluate(request: Any, number: int) -> Any:
            batch = batches[setting.full_size if request.batch == "full" else setting.batch_size]
            return evaluator.losses(request, batch, (progress.step, number))

        take_step(planner, progress, evaluate, engine, 0)

    cycle = getattr(setting.algorithm, "q", 1)
    steps(cycle)  # afterwards everything that is made once is there
    engine._materialise.scratch.release()
    gathered = engine.gathered_bytes
    before = sum(shard.tensor.untyped_storage().nbytes() for shard in engine.shards()) if not setting.is_sharded else 0
    before = before or sum(shard.tensor.nbytes for shard in engine.shards())
    before += sum(shard.tensor.nbytes for shard in engine.anchor_shards())
    peak = peak_bytes(lambda: steps(2 * cycle))
    figures = Figures(before, before + peak, (engine.gathered_bytes - gathered) // 2)
    every = comm.collect(lambda: [figures.weights, figures.peak, figures.gathered])
    return Figures(*(max(column) for column in zip(*every, strict=True)))


class _Buffers(TorchDispatchMode):
    """Holds what gathers write to."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "gather" in func.name():
            self.held += [t for t in tree_leaves(args[0]) if isinstance(t, torch.Tensor)]
        return func(*args, **(kwargs or {}))

    def let_go(self) -> None:
        """Once nobody else holds them, or after a while: where a unit is one weight, that may be the buffer itself."""
        deadline = time.perf_counter() + 0.05
        while self.held:
            storage = self.held[-1].untyped_storage()
            while torch._C._storage_Use_Count(storage._cdata) > 2 and time.perf_counter() < deadline:
                time.sleep(0.0005)
            del storage
            self.held.pop()


def _free_in_this_thread(layout: Layout) -> None:
    """The profiler sees what this thread frees. gloo's threads hold the buffer of a gather until a moment after it is
    full, and must let go of it before this one does."""
    start, finish, buffers = layout.start, layout.finish, _Buffers()

    def holding(unit: Unit) -> None:
        with buffers:
            start(unit)

    def letting_go(unit: Unit) -> None:
        finish(unit)
        buffers.let_go()

    if layout.is_sharded:
        layout.start, layout.finish = holding, letting_go  # type: ignore[method-assign]


def _layout(setting: Setting, model: nn.Module, comm: Communicator) -> Layout | None:
    if setting.layout == "fsdp":
        from mezo_dist.engines.layouts.fsdp import Fsdp

        gather = setting.gather or setting.compute
        dtype = getattr(torch, gather) if gather else None
        return Fsdp(model, comm, replicate=setting.replicate, gather_dtype=dtype)
    if setting.layout == "zero":
        from mezo_dist.engines.layouts.zero import Zero

        return Zero(model, comm, {}, prefetch=setting.prefetch)
    return None


def _batch(setting: Setting, size: int) -> list[MicroBatch]:
    draw = torch.Generator().manual_seed(1)
    items = []
    for start in range(0, size, setting.micro_batch):
        slots = tuple(range(start, min(start + setting.micro_batch, size)))
        ids = torch.randint(5, 3000, (len(slots), setting.tokens), generator=draw)
        mask = torch.ones_like(ids)
        if setting.is_padded:
            mask[0, -3:] = 0
        if setting.reads == "labels":
            targets = {"position": torch.full((len(slots),), setting.tokens - 5), "label": torch.arange(len(slots)) % 2}
            columns = 2
        else:
            places = [list(range(5, 5 + setting.targets)) for _ in slots]
            targets, columns = token_targets(ids.tolist(), places), 2
        items.append(MicroBatch(slots, {"input_ids": ids, "attention_mask": mask}, targets, columns=columns))
    return items


def _forward(setting: Setting, model: nn.Module, engine: Engine) -> Callable[[nn.Module, MicroBatch], Scores]:
    probe = _batch(dataclasses.replace(setting, micro_batch=1, tokens=32, targets=min(setting.targets, 8)), 1)[0]

    def once(forward: Callable[[nn.Module, MicroBatch], torch.Tensor]) -> torch.Tensor:
        output: torch.Tensor = engine.evaluate([algorithms.base.Variant()], [probe], forward)[0][0]
        return output

    from mezo_dist.models.frozen_cache import run_whole

    if setting.reads == "labels":
        return LabelWords(model, [100, 200], probe, once=once)
    token_scores = TokenScores(Bench(model, {}, probe, lambda _: run_whole, once))

    def score(model: nn.Module, batch: MicroBatch) -> Scores:
        chosen, right = token_scores(model, batch)
        weight = batch.targets["is_target"].sum(dim=1)
        return Scores(-chosen.sum(dim=1), weight, torch.stack([right.sum(dim=1), weight], dim=1).float())

    return score
