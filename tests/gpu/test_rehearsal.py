"""Whole runs and steps on a GPU that is not there (`played_gpu`): what they send, launch and wait for.

The host must never wait for the device within a step but once, for its losses, and the number of copies to the device
must not depend on how many weights or micro-batches there are. transformers looks at an attention mask
(``padding_mask.all()`` in its `masking_utils`) once in each forward pass, before its first block, when hardly anything
is queued: that is counted by itself.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import transformers
from torch import Tensor

from mezo_dist import algorithms
from mezo_dist.algorithms import Settings
from mezo_dist.algorithms.base import Variant
from mezo_dist.algorithms.mezo import MeZO
from mezo_dist.algorithms.operations import apply_updates
from mezo_dist.algorithms.svrg import MeZOSVRG
from mezo_dist.algorithms.svrg_released import MeZOSVRGReleased
from mezo_dist.config import reader
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.kernels import gpu_inputs
from mezo_dist.directions.law import Law
from mezo_dist.directions.parts import Part
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines import scratch
from mezo_dist.engines.engine import Engine
from mezo_dist.planning.families import shape_of_config
from mezo_dist.planning.memory import scratch_bytes
from mezo_dist.planning.rounds import rounds_of
from mezo_dist.planning.setting import Setting
from mezo_dist.runs import pool
from mezo_dist.runs.build import Run, build_run
from mezo_dist.runs.training import evaluate_step, train
from mezo_dist.testing import write_tiny_config
from tests.gpu.played_gpu import CUDA, Counts, DeviceTensor, PlayedGpu, Waited, played_gpu
from tests.tasks.kind_configs import write_kind_config

MOST_UPLOADS = 6
"""Of a step: its inputs, its seeds and coefficients, those of the update, and what directions per sample need."""

ALGORITHMS: dict[str, Settings] = {
    "two-sided": MeZO(lr=1e-3),
    "one-sided": MeZO(lr=1e-3, directions=3, one_sided=True, weight_decay=0.1),
    "several": MeZO(lr=1e-3, directions=4),
    "svrg replay": MeZOSVRG(lr=1e-3, anchor="replay"),
    "svrg stored": MeZOSVRG(lr=1e-3, anchor="stored", weight_decay=0.1),
    "svrg released": MeZOSVRGReleased(lr=1e-3),
    "per sample": MeZO(lr=1e-3, per_sample=True),
    "svrg per sample": MeZOSVRG(lr=1e-3, per_sample=True),
}
LAWS = {"gaussian": Law("gaussian"), "rademacher": Law("rademacher"), "lowrank": Law("lowrank", 2)}
KINDS = ["words", "head", "calibrated", "frozen", "choice", "completion", "regression"]
SOME = [
    ("two-sided", "gaussian", "words"),
    ("two-sided", "rademacher", "calibrated"),
    ("two-sided", "lowrank", "head"),
    ("several", "gaussian", "frozen"),
    ("one-sided", "lowrank", "completion"),
    ("several", "rademacher", "regression"),
    ("svrg replay", "lowrank", "words"),
    ("svrg stored", "gaussian", "choice"),
    ("svrg released", "rademacher", "words"),
    ("per sample", "lowrank", "completion"),
    ("per sample", "lowrank", "head"),
    ("svrg per sample", "lowrank", "choice"),
]
"""Every algorithm, law and kind of task, and what they have to do with one another."""
EVERY = [
    (algorithm, law, kind)
    for algorithm in ALGORITHMS
    for law in (["lowrank"] if "sample" in algorithm else LAWS)
    for kind in KINDS
    if (kind, "sample" in algorithm) != ("calibrated", True)  # settings that are refused
]
CASES = EVERY if os.environ.get("MEZO_DIST_REHEARSE") == "all" else SOME


def config_of(folder: Path, kind: str) -> tuple[Path, list[str]]:
    options = ["train.batch_size=2", "train.micro_batch=2", "train.full_size=2"]
    if kind == "words":
        return write_tiny_config(folder, "llama-tied", "mezo"), options
    if kind == "head":
        return write_tiny_config(folder, "bert", "mezo"), [*options, "model.head=classifier"]
    if kind == "calibrated":
        return write_tiny_config(folder, "opt", "mezo"), [*options, "train.calibrate=true"]
    if kind == "frozen":
        return write_tiny_config(folder, "llama", "mezo"), [*options, 'model.trainable=["*layers.1.mlp*"]']
    return write_kind_config(folder, kind), options


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedGpu]:
    with played_gpu(monkeypatch) as there:
        yield there


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rehearsal")


BUILT: dict[str, Run] = {}


@pytest.fixture
def run_of(folder: Path, gpu: PlayedGpu) -> Callable[[str], Run]:
    """A run of a kind of task, built on the GPU when it is asked for the first time. A build may wait."""

    def get(kind: str) -> Run:
        if kind not in BUILT:
            path, options = config_of(folder / kind, kind)
            with gpu.waiting():
                BUILT[kind] = build_run(reader.load(path, options), Communicator())
        return BUILT[kind]

    return get


def varied(run: Run, law: Law, settings: Settings) -> Run:
    """The run with other directions and another algorithm, on samples that are all alike."""
    engine = Engine(run.pretrained.model, law)
    name: Any = law.name
    config = dataclasses.replace(run.config, algorithm=settings, law=name, direction_rank=law.rank)
    return dataclasses.replace(
        run,
        config=config,
        splits={**run.splits, "train": [run.splits["train"][0]] * 30},
        loaded=dataclasses.replace(run.loaded, engine=engine),
        evaluator=dataclasses.replace(run.evaluator, engine=engine),
        algorithm=algorithms.build(settings.name, settings, run.problem),
    )


def steps(run: Run, gpu: PlayedGpu, number: int) -> list[tuple[Counts, Counts]]:
    """Take steps; what each of them asked of the GPU, to be evaluated and to be applied. One read is taken off for
    every round after the first, whose losses are read at its end, too."""
    state, counts = run.algorithm.init(), []
    gpu_inputs.terms_table.cache_clear()  # steps with the same seeds may have been taken before
    gpu_inputs.seeds_table.cache_clear()
    with gpu:
        for step in range(number):
            gpu.counts = evaluated = Counts()
            result, _ = evaluate_step(run, state, step)
            assert result.update is not None, result.skipped
            evaluated.reads -= len(result.rounds) - 1
            state = result.update.state
            gpu.counts = updated = Counts()
            apply_updates(run.engine, 1, [(step, result.update.operations)])
            counts.append((evaluated, updated))
    return counts


@pytest.mark.parametrize(("algorithm", "law", "kind"), CASES, ids=lambda value: str(value))
def test_the_host_waits_once_in_a_step(
    run_of: Callable[[str], Run], gpu: PlayedGpu, algorithm: str, law: str, kind: str
) -> None:
    """Of a cycle of MeZO-SVRG the anchor step and the inner one are looked at; in the first steps the engine learns in
    which order modules are called, and fills tables. (All samples are as long, or tables of their embeddings would
    differ.)"""
    is_svrg = "svrg" in algorithm
    run = varied(run_of(kind), LAWS[law], ALGORITHMS[algorithm])
    for evaluated, updated in steps(run, gpu, 6 if is_svrg else 3)[-2 if is_svrg else -1 :]:
        assert evaluated.reads == 1
        assert updated.reads == 0
        assert evaluated.uploads + updated.uploads <= MOST_UPLOADS
        assert sum(updated.launches.values()) <= 8, updated.launches


def test_sixteen_bit_weights_are_scaled_and_rounded_on_the_gpu(gpu: PlayedGpu) -> None:
    model = deep_model(gpu, 2, torch.bfloat16)
    for law in LAWS.values():
        engine = Engine(model, law, stochastic_rounding=True)
        with gpu:
            gpu.counts = Counts()
            engine.scale(0.9, 5, exempt_vectors=True)
            engine.advance([(Combination.single(3, 1e-3), 5), (Combination.single(4, 1e-3), 6)])
        assert gpu.counts.reads == 0
        assert sum(gpu.counts.launches.values()) == (4 if law.is_lowrank else 2)  # factors, matrices, vectors


@pytest.mark.parametrize("settings", [MeZO(lr=1e-3), MeZO(lr=1e-3, per_sample=True)], ids=["plain", "per sample"])
def test_copies_do_not_grow_with_micro_batches(
    run_of: Callable[[str], Run], gpu: PlayedGpu, settings: Settings
) -> None:
    run = varied(run_of("words"), LAWS["lowrank"], settings)
    uploads = []
    for size in (1, 2):
        train = dataclasses.replace(run.config.train, micro_batch=size)
        other = dataclasses.replace(run, config=dataclasses.replace(run.config, train=train))
        uploads.append([evaluated.uploads for evaluated, _ in steps(other, gpu, 4)][-1])
    assert uploads[0] == uploads[1]


def deep_model(gpu: PlayedGpu, num_layers: int, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    size = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.LlamaConfig(**size, num_hidden_layers=num_layers, max_position_embeddings=16)
    model = transformers.LlamaForCausalLM(config).eval()
    gpu.move(model, dtype)
    return model


@dataclasses.dataclass(frozen=True)
class Item:
    ids: Tensor
    slots: tuple[int, ...] = (0, 1)


@pytest.mark.parametrize("law", LAWS)
def test_launches_of_a_deep_model(gpu: PlayedGpu, law: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Launches of 32 layers of 9 modules each, from those of one layer and of two: one kernel for both signs of all
    weights of a layer (low-rank: one for matrices, one for their factors, and one for vectors)."""
    one, two = (launches(gpu, 1, LAWS[law]), launches(gpu, 2, LAWS[law]))
    deep = {name: count + 31 * (two[name] - count) for name, count in one.items()}
    with capsys.disabled():
        print(f"\n32 layers, {law}, two-sided, one micro-batch: {sum(deep.values())} launches, {deep}")
    ours = {name: count for name, count in deep.items() if name.startswith("triton")}
    ends = 2  # embedding and output head; the norm before the head is a vector
    if law == "lowrank":
        assert ours.pop("triton fill_kernel") == 32 + ends
        assert ours == {"triton add_kernel": 32 + ends + 32 + 1}
    else:
        assert ours == {"triton add_kernel": 32 + ends + 1}
    assert sum(deep[name] for name in deep if not name.startswith("triton")) <= 32 * 100


def launches(gpu: PlayedGpu, num_layers: int, law: Law) -> Counter[str]:
    """What a forward pass of both signs launches. (What follows on what is learnt from a first one.)"""
    engine = Engine(deep_model(gpu, num_layers), law)
    shift = Combination.single(3, 1e-3)
    item = Item(DeviceTensor.of(torch.zeros(2, 8, dtype=torch.int64)))
    with gpu:
        for _ in range(2):
            gpu.counts = Counts()
            engine.evaluate(
                [Variant(shift), Variant(-shift)],
                [item],
                lambda model, item: model(item.ids, use_cache=False).logits.mean(),
            )
    return gpu.counts.launches


def test_groups_change_no_bits_and_are_as_large_as_planned(gpu: PlayedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """All modules of a layer at once, two at a time, or each by itself; also for other variants of each micro-batch."""
    model = deep_model(gpu, 2)
    item = Item(DeviceTensor.of(torch.arange(16).view(2, 8)))
    variants = [Variant(Combination.single(k, 1e-2)) for k in (3, 4)]
    losses, sizes = [], []
    matrix, vector = 2 * 4 * 16 * 16, 2 * 4 * 16
    for group_bytes in (2**28, 2 * matrix, 0):
        monkeypatch.setattr(scratch, "GROUP_BYTES", group_bytes)
        engine = Engine(model, LAWS["gaussian"])
        with gpu.waiting():
            for some in (variants, variants, [Variant(), *variants]):
                (row,) = engine.evaluate(some, [item], lambda model, item: model(item.ids, use_cache=False).logits)
            losses.append([loss.cpu() for loss in row])
        sizes.append(engine._materialise.scratch.buffer.numel())
    assert all(torch.equal(a, b) for other in losses[1:] for a, b in zip(losses[0], other, strict=True))
    table = 2 * 4 * 32 * 16
    assert sizes == [7 * matrix + 2 * vector, max(table, 2 * matrix), table]


def test_no_matrices_are_made_beside_those_that_are_shifted_in_activations(
    gpu: PlayedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the passes before made them together with a norm."""
    engine = Engine(deep_model(gpu, 2), LAWS["lowrank"])
    item = Item(DeviceTensor.of(torch.arange(16).view(2, 8)))
    dimensions: list[int] = []
    add_parts = Law.add_parts

    def recorded(law: Law, parts: Sequence[Part], *args: Any, **options: Any) -> None:
        dimensions.extend(len(part.shape) for part in parts)
        add_parts(law, parts, *args, **options)

    monkeypatch.setattr(Law, "add_parts", recorded)

    def evaluated() -> set[int]:
        dimensions.clear()
        with gpu.waiting():
            engine.evaluate([Variant(Combination.single(3, 1e-2))], [item], lambda m, x: m(x.ids, use_cache=False))
        return set(dimensions)

    assert [evaluated() for _ in range(2)] == [{1, 2}] * 2
    with engine.called_often():
        assert evaluated() == {1}


@pytest.mark.parametrize("law", LAWS)
def test_buffers_are_kept_and_as_large_as_planned(gpu: PlayedGpu, law: str) -> None:
    """The engine allocates none after its second step. What the model's own code computes is allocated and freed along
    the way, in every step alike."""
    model = deep_model(gpu, 2)
    engine, item = Engine(model, LAWS[law]), Item(DeviceTensor.of(torch.arange(16).view(2, 8)))
    buffers = []
    with gpu:
        for step in range(5):
            gpu.counts, shift = Counts(), Combination.single(step, 1e-3)
            engine.evaluate(
                [Variant(shift), Variant(-shift)], [item], lambda model, item: model(item.ids).logits.mean()
            )
            engine.add(shift, step)
            buffers.append(gpu.counts.buffers)
    assert buffers[0] > 0
    assert buffers[2:] == [0, 0, 0]
    shape = shape_of_config(model.config.to_dict(), "deep")
    assert shape is not None
    setting = Setting(weights="float32", micro_batch=2, batch_size=2, tokens=8, reads="tokens", is_padded=False)
    (planned,) = rounds_of(setting, 1)[0].bases
    assert engine._materialise.scratch.buffer.numel() == scratch_bytes(shape, setting, planned, 1, gpu=True)


@pytest.mark.parametrize("law", LAWS)
def test_updates_and_replay_go_through_many_weights_at_once(gpu: PlayedGpu, law: str) -> None:
    num_layers = 8
    engine = Engine(deep_model(gpu, num_layers), LAWS[law])
    num_groups = -(-(num_layers * 9 + 3) // 32)
    with gpu:
        for start in (0, 100):  # for the second time
            for number in (1, 20):
                gpu.counts = Counts()
                engine.advance([(Combination.single(start + k, 1e-3), k) for k in range(number)])
                if start:
                    assert gpu.counts.reads == 0
                    assert gpu.counts.uploads == 1
                    assert sum(gpu.counts.launches.values()) <= (4 if law == "lowrank" else 1) * num_groups


def test_what_would_wait_is_noticed(gpu: PlayedGpu) -> None:
    x, ids = DeviceTensor.of(torch.zeros(4)), DeviceTensor.of(torch.zeros(4, dtype=torch.int64))
    waiting: list[Callable[[], Any]] = [
        lambda: x.sum().item(),
        lambda: x.tolist(),
        lambda: bool((x > 0).any()),
        lambda: x[x > 0],
        lambda: torch.nonzero(x),
        lambda: torch.unique(ids),
        lambda: torch.zeros(3).to(CUDA),
        lambda: torch.zeros(3).to(CUDA, non_blocking=True),
        lambda: torch.tensor([1, 2], device=CUDA),
        lambda: x.copy_(torch.zeros(4)),
        lambda: x[torch.tensor([1, 2])],
    ]
    with gpu:
        for wait in waiting:
            with pytest.raises(Waited):
                wait()
        x.cpu()
        x[ids] + torch.zeros(4, device=CUDA)
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.zeros(4)
    assert gpu.counts.reads == 1
    assert gpu.counts.uploads == 0


def test_a_whole_run_has_the_figures_that_it_has_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built from a config, evaluated, trained, exported. (Attention is computed in another way, with other last
    bits.)"""
    path, options = config_of(tmp_path / "config", "words")
    options += ["train.steps=3", "output.looks=0", "output.answers=0", "monitor=[]"]
    results = []
    for device in ("cpu", "cuda"):
        config = reader.load(path, [*options, f"output.dir={tmp_path / device}"])
        if device == "cpu":
            train(config, Communicator(), quiet=True)
        else:
            with played_gpu(monkeypatch) as gpu, gpu.waiting():
                train(config, Communicator(), quiet=True)
            assert gpu.counts.launches["triton add_kernel"] > 0
        results.append(json.loads((tmp_path / device / "results.json").read_text()))
    on_cpu, on_gpu = results
    for when in ("before", "after"):
        assert on_gpu[when]["loss"] == pytest.approx(on_cpu[when]["loss"], abs=1e-6)
    assert on_gpu["skipped_steps"] == 0


def test_memory_of_a_step_is_asked_for_at_once(
    tmp_path: Path, gpu: PlayedGpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All of the plan's but weights and what the process has; a step that will not fit is told of before it begins."""
    path, options = config_of(tmp_path, "words")
    with gpu.waiting():
        run = build_run(reader.load(path, options), Communicator())
    tokens = max(item.inputs["input_ids"].shape[1] for item in run.batch("minibatch", 0))
    parts = pool.planned_memory(run, tokens).parts
    with gpu.waiting():
        gpu.counts = Counts()
        assert pool.reserve(run, 0) == sum(parts.values()) - parts["weights"] - parts["runtime"] > 0
        assert gpu.counts.buffers == 1
        with monkeypatch.context() as patch:  # all that is free is in pieces
            patch.setattr(torch, "empty", Mock(side_effect=torch.OutOfMemoryError))
            assert pool.reserve(run, 0) == 0
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10, 2**36))
        assert pool.reserve(run, 0) == 0
    assert gpu.counts.buffers == 1
    assert "lower train.micro_batch (now 2)" in caplog.text


def test_written_texts_wait_once_for_each_token(folder: Path, gpu: PlayedGpu) -> None:
    """The host says when a text ends, so it reads every token; `generate` asks the device twice."""
    path = write_kind_config(folder / "generation", "generation", temperature=1.0)
    options = ["train.batch_size=2", "train.micro_batch=2", "train.objective=metric", "law=lowrank"]
    with gpu.waiting():
        run = build_run(reader.load(path, options), Communicator())
        evaluate_step(run, run.algorithm.init(), 0)
        gpu.counts = Counts()
        evaluate_step(run, run.algorithm.init(), 1)
    passes, most_tokens = 2, 4
    assert passes < gpu.counts.reads <= passes * most_tokens + 1
    assert gpu.counts.waits <= passes * (2 * most_tokens + 1)
