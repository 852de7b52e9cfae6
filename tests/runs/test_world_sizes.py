"""One, two and three processes do the same, bit for bit; and when they cannot, they say so and nobody hangs.

Starting a process takes longer than all that is asked of it here, so every world is started once, does everything,
and the tests look at what it found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch
from torch import nn

from mezo_dist.algorithms.base import Evaluation, Losses, Variant
from mezo_dist.algorithms.step import Progress
from mezo_dist.config import reader
from mezo_dist.config.schema import RunConfig
from mezo_dist.directions.combination import Combination
from mezo_dist.distributed.communicator import Communicator, OutOfStepError
from mezo_dist.errors import UserError
from mezo_dist.runs import build, training
from mezo_dist.storage import trajectory
from mezo_dist.storage.replay import replay_updates
from mezo_dist.storage.trajectory import Step
from mezo_dist.tasks.batches import MicroBatch
from mezo_dist.tasks.classification.kind import Classification
from mezo_dist.tasks.kind import Bench, Scores
from mezo_dist.testing import spawn, write_tiny_config, write_tiny_data, write_tiny_model
from tests.cases import CASES, WORLD_SIZES
from tests.parts import Parts, run_parts

pytestmark = pytest.mark.distributed

WORLDS = (1, 2, 3)
# A minibatch of 5 makes micro-batches of 3 and 2, the full batch of 30 makes ten of unequal cost:
# with three ranks one has nothing to do in a step of mezo, and none of them has as much as another in an anchor step.
SIZES = {"steps": 6, "batch_size": 5, "micro_batch": 3}
BAD_SAMPLE = 7
MAX_SKIPPED = 3


# What every rank does (this part runs in processes of its own)


def everything(comm: Communicator, root: Path) -> Parts:
    parts: dict[str, Callable[[], Any]] = {
        f"weights of {name}": functools.partial(train, comm, root, name) for name in [*WORLD_SIZES, "one bad sample"]
    }
    parts["out of step"] = lambda: get_out_of_step(comm, load(comm, root, "mezo"))
    parts["disagreements"] = lambda: disagree(comm, root) if comm.world_size > 1 else {}
    parts["each sample"] = lambda: losses_of_samples(comm, load(comm, root, "mezo"))
    parts["given up"] = lambda: give_up(comm, root)
    return run_parts(parts)


def load(comm: Communicator, root: Path, name: str) -> RunConfig:
    folder = "mezo" if name == "one bad sample" else name
    output = f"output.dir={root / f'{name} on {comm.world_size}'}"
    return reader.load(root / folder / "config.yaml", [*CASES[folder].options, output])


def train(comm: Communicator, root: Path, name: str) -> str:
    poison = one_bad_sample() if name == "one bad sample" else contextlib.nullcontext()
    with poison:
        folder = training.train(load(comm, root, name), comm)
    return str(json.loads((folder / "results.json").read_text())["weights"])


@contextlib.contextmanager
def one_bad_sample() -> Iterator[None]:
    """The loss of one training sample is not a number, so that of a step is so on one rank alone."""
    encode, forward = Classification.encode, Classification.forward
    bad: list[int] = []

    def watched(kind: Classification, rows: Any, split: str) -> Any:
        samples = list(encode(kind, rows, split))
        bad[:] = samples[BAD_SAMPLE].ids if split == "train" else bad
        return samples

    def poisoned(kind: Classification, bench: Bench) -> Callable[[nn.Module, MicroBatch], Scores]:
        objective = forward(kind, bench)

        def evaluate(model: nn.Module, batch: MicroBatch) -> Scores:
            scores = objective(model, batch)
            texts = zip(batch.inputs["input_ids"].tolist(), batch.inputs["attention_mask"].sum(1).tolist(), strict=True)
            is_bad = torch.tensor([ids[:length] == bad for ids, length in texts])
            return dataclasses.replace(scores, loss=torch.where(is_bad, torch.nan, scores.loss))

        return evaluate

    with (
        mock.patch.object(Classification, "encode", watched),
        mock.patch.object(Classification, "forward", poisoned),
    ):
        yield


def get_out_of_step(comm: Communicator, config: RunConfig) -> list[str]:
    run = build.build_run(config, comm)
    is_lost = comm.rank == comm.world_size - 1
    request = Evaluation((Variant(), Variant(Combination.single(1, 1e-3))))
    longer = dataclasses.replace(request, each_sample=True)  # a longer message than the others'
    attempts: list[Callable[[], object]] = [
        lambda: training.evaluate_step(run, run.algorithm.init(), 1 if is_lost else 0),
        lambda: run.evaluator.losses(longer if is_lost else request, run.batch("full", 0), ("step", 0)),
        lambda: run.evaluator.losses(request if is_lost else longer, run.batch("full", 0), ("step", 0)),
        lambda: comm.barrier() if is_lost else run.evaluator.losses(longer, run.batch("full", 0), ("step", 0)),
    ]
    messages = [run.engine.fingerprint()]
    for attempt in attempts:
        try:
            attempt()
        except OutOfStepError as error:
            messages.append(str(error))
    return [*messages, run.engine.fingerprint()]


def disagree(comm: Communicator, root: Path) -> dict[str, str]:
    """The last rank starts with something else under the same name."""
    is_last, home = comm.rank == comm.world_size - 1, Path.cwd()
    messages = {}
    for what in ("config", "data", "base model"):
        os.chdir(root / ("agree" if what == "config" or not is_last else f"agree, other {what}"))
        options = ["model.name=model", "task.data=data.jsonl"] + ["seed=1"] * (what == "config" and is_last)
        try:
            build.build_run(reader.load(root / "agree" / "config.yaml", options), comm)
        except UserError as error:
            messages[what] = str(error)
    os.chdir(home)
    return messages


def losses_of_samples(comm: Communicator, config: RunConfig) -> Losses | None:
    run = build.build_run(config, comm)
    request = Evaluation((Variant(), Variant(Combination.single(1, 0.1))), each_sample=True)
    return run.evaluator.losses(request, run.batch("full", 0), ("step", 0))


def give_up(comm: Communicator, root: Path) -> str:
    options = [f"output.dir={root / f'given up on {comm.world_size}'}", f"train.max_skipped={MAX_SKIPPED}"]
    try:
        training.train(reader.load(root / "broken" / "config.yaml", options), comm)
    except UserError as error:
        return str(error)
    return ""


# What is made of it


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("layouts")
    for name in WORLD_SIZES:
        write_tiny_config(root / name, CASES[name].model, CASES[name].algorithm, **SIZES)
    for name in ("agree", "agree, other data", "agree, other base model"):
        write_tiny_config(root / name, "llama", "mezo", **SIZES)
    write_tiny_data(root / "agree, other data" / "data.jsonl", seed=1)
    write_tiny_model(root / "agree, other base model" / "model", "llama", seed=1)
    write_tiny_config(root / "broken", "gpt2", "mezo-svrg", **SIZES)
    weights = root / "broken" / "model" / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    tensors["transformer.ln_f.weight"][3] = torch.nan
    safetensors.torch.save_file(tensors, weights, {"format": "pt"})
    return root


@pytest.fixture(scope="module")
def worlds(root: Path) -> dict[int, list[Parts]]:
    several = {n: spawn(everything, n, root, timeout_s=200) for n in WORLDS if n > 1}
    return {1: [everything(Communicator(), root)], **several}


def steps_of(root: Path, name: str, world: int) -> list[Step]:
    return trajectory.read(root / f"{name} on {world}" / "trajectory.jsonl").steps


def lines_of(root: Path, name: str, world: int) -> list[bytes]:
    return (root / f"{name} on {world}" / "trajectory.jsonl").read_bytes().splitlines()[1:]


every_run = pytest.mark.parametrize("name", [*WORLD_SIZES, "one bad sample"])


@every_run
def test_any_number_of_processes_takes_the_same_steps(worlds: dict[int, list[Parts]], root: Path, name: str) -> None:
    alone = lines_of(root, name, 1)
    assert len(alone) == SIZES["steps"] + 1, "the last line is the fingerprint of the weights"
    for world in WORLDS[1:]:
        assert lines_of(root, name, world) == alone
    headers = [trajectory.read(root / f"{name} on {world}" / "trajectory.jsonl").header for world in WORLDS]
    assert len({(h.config_digest, h.base_fingerprint, h.law_version, h.seed) for h in headers}) == 1


@every_run
def test_all_ranks_end_at_the_same_weights(worlds: dict[int, list[Parts]], root: Path, name: str) -> None:
    ends = {rank[f"weights of {name}"] for ranks in worlds.values() for rank in ranks}
    base = trajectory.read(root / f"{name} on 1" / "trajectory.jsonl").header.base_fingerprint
    assert len(ends) == 1
    assert ends != {base}


@every_run
def test_results_and_exported_models_are_the_same(worlds: dict[int, list[Parts]], root: Path, name: str) -> None:
    results = [json.loads((root / f"{name} on {world}" / "results.json").read_text()) for world in WORLDS]
    for result in results:
        del result["training_s"]
    assert results[0] == results[1] == results[2]
    files = [root / f"{name} on {world}" / "model" / "model.safetensors" for world in WORLDS]
    assert len({file.read_bytes() for file in files}) == 1


def test_directions_of_all_steps_differ(worlds: dict[int, list[Parts]], root: Path) -> None:
    """That runs are equal says little if their steps are all the same."""
    updates = updates_of(root, "mezo")
    assert len({seed for update in updates for seed, _ in update.terms}) == len(updates) == SIZES["steps"]
    assert [len(update) for update in updates_of(root, "per-sample")] == [30, 35] * 3


def updates_of(root: Path, name: str) -> list[Combination]:
    run = build.build_run(load(Communicator(), root, name), Communicator())
    steps = steps_of(root, name, 1)
    updates = replay_updates(run.algorithm, steps, Progress(run.algorithm.init()))
    return [update.combination for update in updates if update is not None]


@pytest.mark.parametrize("name", ["mezo", "mezo-svrg"])
@pytest.mark.parametrize("world", WORLDS)
def test_a_step_sends_at_most_256_bytes(worlds: dict[int, list[Parts]], root: Path, name: str, world: int) -> None:
    lines = (root / f"{name} on {world}" / "metrics.jsonl").read_text().splitlines()
    scalars = [json.loads(line)["scalars"] for line in lines]
    sent = [line["communicator/payload_bytes_per_step"] for line in scalars if "loss/train" in line]
    assert sent == [0 if world == 1 else 256] * SIZES["steps"]


@pytest.mark.parametrize("world", WORLDS[1:])
def test_a_rank_out_of_step_is_named_on_all_ranks(worlds: dict[int, list[Parts]], world: int) -> None:
    for rank, result in enumerate(worlds[world]):
        before, *messages, after = result["out of step"]
        assert len(messages) == 4
        for message in messages:
            assert f"rank(s) [{world - 1}] evaluate another round" in message
            assert f"seen on rank {rank}" in message
        assert before == after


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("what", ["config", "data", "base model"])
def test_ranks_that_start_from_something_else_are_named(worlds: dict[int, list[Parts]], world: int, what: str) -> None:
    fact = "data of the test split" if what == "data" else what
    for result in worlds[world]:
        assert result["disagreements"][what].startswith(f"{fact} of rank(s) [{world - 1}] differs")


def test_losses_of_samples_come_in_batch_order_on_any_rank(worlds: dict[int, list[Parts]], root: Path) -> None:
    losses = worlds[1][0]["each sample"]
    assert losses is not None
    assert all(rank["each sample"] == losses for ranks in worlds.values() for rank in ranks)
    run = build.build_run(load(Communicator(), root, "mezo"), Communicator())
    alone = []
    for sample in [run.splits["train"][i] for i in run.full_order.batch(0)]:
        scores = run.engine.evaluate([Variant()], run.cut([sample]), run.evaluator.forward)
        alone.append(float(scores[0][0].loss))
    assert len(alone) == 30
    assert len(set(alone)) > 20
    assert losses.each[0] == pytest.approx(alone, rel=1e-5)
    assert losses.each[1] != pytest.approx(alone, rel=1e-3)
    assert losses.mean[0] == pytest.approx(sum(alone) / len(alone), rel=1e-5)


@pytest.mark.parametrize("world", WORLDS)
def test_a_loss_that_is_not_finite_skips_the_step(worlds: dict[int, list[Parts]], root: Path, world: int) -> None:
    run = build.build_run(load(Communicator(), root, "mezo"), Communicator())
    bad = [step for step in range(SIZES["steps"]) if BAD_SAMPLE in run.order.batch(step)]
    steps = steps_of(root, "one bad sample", world)
    assert len(bad) == 1
    assert [step.step for step in steps if step.skipped] == bad
    assert steps[bad[0]] == Step(bad[0], (), skipped="a loss is not finite")
    assert all(step.update and step.rounds for step in steps if step.step not in bad)
    results = json.loads((root / f"one bad sample on {world}" / "results.json").read_text())
    assert results["skipped_steps"] == 1


@pytest.mark.parametrize("world", WORLDS)
def test_a_run_without_finite_losses_gives_up_on_all_ranks(
    worlds: dict[int, list[Parts]], root: Path, world: int
) -> None:
    for result in worlds[world]:
        assert f"train.max_skipped: {MAX_SKIPPED} steps in a row had no finite loss" in result["given up"]
    steps = steps_of(root, "given up", world)
    assert [bool(step.skipped) for step in steps] == [True] * MAX_SKIPPED


# The helper that starts the processes


def fail(comm: Communicator, how: str) -> str:
    if comm.rank == 1 and how == "raises":
        raise ValueError("no such thing")
    if comm.rank == 1 and how == "dies":
        os._exit(9)
    if comm.rank == 1 and how == "hangs":
        time.sleep(60)
    comm.barrier()
    return f"{how} {os.environ['MEZO_DIST_GREETING']} {torch.get_num_threads()}"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", r"rank 1 failed:(.|\n)*ValueError: no such thing|rank 0 failed"),
        ("dies", r"rank\(s\) \[1\] died without a word|rank 0 failed"),
        ("hangs", r"ranks \[0, 1\] did not finish|rank 0 failed"),
    ],
)
def test_spawn_tells_what_went_wrong(how: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        spawn(fail, 2, how, timeout_s=4)


def test_spawn_gives_results_by_rank_and_the_environment_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    for greeting in ("hello", "again"):
        monkeypatch.setenv("MEZO_DIST_GREETING", greeting)
        assert spawn(fail, 2, "works") == [f"works {greeting} 1"] * 2
