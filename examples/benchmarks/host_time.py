"""What a step costs the host: the time in which a GPU waits to be told what to do, in forward passes.

    python examples/benchmarks/host_time.py [--what step] [--law rademacher] [--layers 24] [--repeats 15]
        [--device cpu] [--profile]

OPT's architecture with a tiny hidden size, so that computing takes no time: a forward pass is what torch's calls cost
the host, and a step is that plus the engine, the planner and the host's side of kernels. ``--what`` chooses what else
is measured: ``decode``, both signs of a low-rank direction that write texts in lock step, against ``generate`` alone;
``svrg``, a cycle of an anchor step and an inner step with a stored anchor (six forward passes); ``per-sample``, a MeZO
step with a low-rank direction for each sample. Without a GPU the code that
feeds one runs on tensors in host memory, with launches that do nothing (``--device cpu``); on one (``cuda``) a launch
is Triton's. Both signs cannot cost less than two forward passes, an update not less than its launches. Figures are
medians over rounds of (what is measured / the forward pass of the same round).
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import pstats
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import harness
import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from mezo_dist.algorithms.base import Evaluation, Losses, Problem, Variant
from mezo_dist.algorithms.mezo import MeZO, MeZOPlanner
from mezo_dist.algorithms.step import Progress, take_step
from mezo_dist.algorithms.svrg import MeZOSVRG, SVRGPlanner
from mezo_dist.directions import devices, law
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.kernels import gpu
from mezo_dist.directions.law import Law
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.decoding import Way, evaluate_decoding
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.lockstep.passes import Coroutine
from mezo_dist.runs.evaluation import Evaluator
from mezo_dist.tasks.batches import MicroBatch
from mezo_dist.tasks.classification.label_words import LabelWords
from mezo_dist.tasks.generation.decode import Decoding, decode

FAST = {"layers": 2, "repeats": 3}
VOCABULARY = 64
NEW_TOKENS = 16
Runs = dict[str, Callable[[], object]]
"""What is timed, by name; what the others are held against comes first."""


def make_model(layers: int, device: str) -> nn.Module:
    """OPT with weights of zero, so that its losses are finite, whatever launches do that do nothing; bf16 on a GPU. (On
    the host, products of fp32 numbers are called fastest.)"""
    sizes = {"hidden_size": 16, "ffn_dim": 64, "num_attention_heads": 2, "word_embed_proj_dim": 16}
    config = OPTConfig(**sizes, num_hidden_layers=layers, vocab_size=VOCABULARY, use_cache=False)
    model = OPTForCausalLM(config).eval().to(device, torch.float32 if device == "cpu" else torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.zero_()
    return model


def make_batch() -> MicroBatch:
    """Two samples of eight tokens."""
    ids = torch.randint(2, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))
    targets = {"position": torch.full((2,), 7), "label": torch.arange(2)}
    return MicroBatch((0, 1), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, targets, columns=2)


@contextlib.contextmanager
def without_gpu(counts: Counter[str]) -> Iterator[None]:
    """Tensors in host memory take the way of those on a GPU, and launches do nothing but count."""

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: object, **constants: object) -> None:
        counts["launches"] += 1

    with (
        mock.patch.object(law, "implementation", return_value=gpu),
        mock.patch.object(devices, "takes_launches", return_value=True),
        mock.patch.object(gpu, "launch", launch),
        mock.patch.object(torch, "empty", torch.zeros),  # what launches would fill
        mock.patch.object(torch, "empty_like", torch.zeros_like),
    ):
        yield


@contextlib.contextmanager
def counting_launches(counts: Counter[str]) -> Iterator[None]:
    """Launches on a GPU, counted."""
    launch = gpu.launch

    def counted(*arguments: Any, **constants: Any) -> None:
        counts["launches"] += 1
        launch(*arguments, **constants)

    with mock.patch.object(gpu, "launch", counted):
        yield


def steps(arguments: argparse.Namespace) -> Runs:
    """A MeZO step and its parts, or a cycle of MeZO-SVRG."""
    model, batch = make_model(arguments.layers, arguments.device), make_batch()
    with torch.no_grad():
        objective = LabelWords(model, [10, 20], batch)
    is_lowrank = arguments.what == "per-sample" or arguments.law == "lowrank"
    law = Law("lowrank", 2) if is_lowrank else Law(arguments.law)
    engine = Engine(model, law, stochastic_rounding=True)
    evaluator = Evaluator(engine, objective, Communicator())
    problem = Problem(0, 10**6, 2, 2, has_16bit_weights=True)
    planner: Any = MeZOPlanner(MeZO(lr=1e-7, per_sample=arguments.what == "per-sample"), problem)
    if arguments.what == "svrg":
        planner = SVRGPlanner(MeZOSVRG(lr=1e-7, anchor_lr=1e-7), problem)
    progress: Progress[Any] = Progress(planner.init())
    seeds = iter(range(10**9))

    def evaluate(request: Evaluation, number: int) -> Losses | None:
        return evaluator.losses(request, [batch], (progress.step, number))

    def both_signs() -> object:
        shift = Combination.single(next(seeds), 1e-3)
        return evaluator.losses(Evaluation((Variant(shift), Variant(-shift))), [batch], ())

    def step() -> object:
        result = take_step(planner, progress, evaluate, engine, 0)
        assert result.update is not None, result.skipped
        return result

    def forward() -> object:
        with torch.no_grad():
            return objective(model, batch).loss.mean().item()

    def update() -> object:
        return engine.add(Combination.single(next(seeds), 1e-6), next(seeds))

    if arguments.what == "svrg":
        return {"forward pass": forward, "step": lambda: [step(), step()]}
    return {"forward pass": forward, "both signs": both_signs, "update": update, "step": step}


def decoding(arguments: argparse.Namespace) -> Runs:
    """Texts that the model writes by itself, and those of both signs."""
    model, inputs = make_model(arguments.layers, arguments.device), dict(make_batch().inputs)
    inputs = {name: tensor.to(arguments.device) for name, tensor in inputs.items()}
    engine, seeds, settings = Engine(model, Law("lowrank", 2)), iter(range(10**9)), Decoding(NEW_TOKENS, (), 0)

    def write(model: nn.Module, item: Any) -> list[list[int]]:
        return decode(model, item, settings)

    def both_signs(way: Way = "lock step") -> object:
        shift = Combination.single(next(seeds), 1e-3)
        variants = [Variant(shift), Variant(-shift)]
        if way == "lock step":
            with engine.called_often():
                return engine.evaluate(variants, [inputs], write)
        return [*evaluate_decoding(engine, way, variants, [inputs], write)]

    def alone() -> object:
        return write(model, inputs)

    return {"forward pass": alone, "step": both_signs, "one by one": lambda: both_signs("activations")}


def seconds(run: Callable[[], object], device: str) -> float:
    """Time of a call, until the device has done it."""
    began = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(arguments: argparse.Namespace, counts: Counter[str]) -> dict[str, float]:
    """Median ratios to a forward pass, and that in seconds; what a step calls and launches."""
    runs = decoding(arguments) if arguments.what == "decode" else steps(arguments)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(arguments.repeats + 3):  # the first ones fill tables and do not count
        for name, run in runs.items():
            taken = seconds(run, arguments.device)
            if number >= 3:
                times[name].append(taken)
    figures = {
        name: statistics.median(t / f for t, f in zip(some, times["forward pass"], strict=True))
        for name, some in times.items()
    }
    figures["forward pass, ms"] = 1000 * statistics.median(times["forward pass"])
    counts.clear()
    wait = Coroutine.wait

    def counted(caller: Coroutine, request: Any) -> Any:
        counts["calls of hooks"] += 1
        return wait(caller, request)

    with mock.patch.object(Coroutine, "wait", counted):
        runs["step"]()
    figures.update(counts)
    if arguments.profile:
        for name in [
            name
            for name in runs
            if name not in ("forward pass", *(["step"] if "update" in runs and arguments.what == "step" else []))
        ]:
            profile = cProfile.Profile()
            profile.runcall(lambda run=runs[name]: [run() for _ in range(arguments.repeats)])
            print(f"--- {name}, {arguments.repeats} times")
            pstats.Stats(profile).sort_stats("tottime").print_stats(40)
    return figures


def main() -> None:
    """Print the ratios and, with --json, one last line for machines."""
    parser = harness.parser(__doc__)
    parser.add_argument("--what", choices=["step", "decode", "svrg", "per-sample"], default="step")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--law", choices=["gaussian", "rademacher", "lowrank"], default="rademacher")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--profile", action="store_true", help="also print where time is spent")
    arguments = harness.parse(parser, FAST)
    facts = harness.begin()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    with (without_gpu if arguments.device == "cpu" else counting_launches)(counts):
        figures = measure(arguments, counts)
    for name, figure in figures.items():
        print(f"{name:20}{figure:10.2f}")
    harness.end(arguments, facts, {name: round(figure, 3) for name, figure in figures.items()})


if __name__ == "__main__":
    main()
