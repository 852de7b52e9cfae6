"""What a step costs, in forward passes of the same batch: mezo_dist against the textbook's in-place way.

    python examples/benchmarks/step_cost.py [--repeats 5] [--shape opt-125m] [--threads 2]
    python examples/benchmarks/step_cost.py --nogil-pool     # what torch's own threads gain over threads of Python

A MeZO step cannot cost less than 2 forward passes, a MeZO-SVRG inner step not less than 4; what is above that is the
price of perturbing and updating weights. Contenders run in turn in one process, on the same model with random weights
and the same random tokens; every figure is the median over rounds of (contender / forward pass of the same round).

The textbook's way, as the released codes of MeZO and MeZO-SVRG do it: seed the generator, draw ``torch.normal_`` for
one parameter after another, add +eps z in place, run, add -2 eps z, run, add +eps z, then draw once more to update.

``--nogil-pool`` compares the same steps on two kinds of threads at 16 x 32 tokens: torch's own, as
`mezo_dist.directions.kernels.threads` uses them, and a `ThreadPoolExecutor` that runs the same kernel compiled with
``nogil=True``. Figures are the median over rounds of (pool / torch's threads), and that of the fastest rounds, with the
load of the machine.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any
from unittest import mock

import harness
import numba
import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from mezo_dist.algorithms.base import Evaluation, Losses, Problem
from mezo_dist.algorithms.mezo import MeZO, MeZOPlanner
from mezo_dist.algorithms.step import Progress, take_step
from mezo_dist.algorithms.svrg import MeZOSVRG, SVRGPlanner
from mezo_dist.directions.kernels import cpu, cpu_kernel
from mezo_dist.directions.kernels.cpu_arguments import SIGNATURE, Arguments
from mezo_dist.directions.kernels.threads import share_out
from mezo_dist.directions.law import Law
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.malloc import ask_for_huge_pages, tune_malloc
from mezo_dist.tasks.batches import MicroBatch
from mezo_dist.tasks.classification.label_words import LabelWords
from mezo_dist.tasks.kind import Forward

EPS, LR = 1e-3, 1e-6
FAST = {"shape": "tiny", "repeats": 1}
SHAPES = {
    "opt-125m": {"hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072, "num_attention_heads": 12},
    "opt-350m": {"hidden_size": 1024, "num_hidden_layers": 24, "ffn_dim": 4096, "num_attention_heads": 16},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "ffn_dim": 128, "num_attention_heads": 2},
}


def make_model(shape: str) -> nn.Module:
    """OPT's architecture with random weights, fp32."""
    sizes = SHAPES[shape]
    torch.manual_seed(0)
    config = OPTConfig(**sizes, word_embed_proj_dim=sizes["hidden_size"], vocab_size=50272, use_cache=False)
    return OPTForCausalLM(config).eval()


def make_batch(num_samples: int, length: int) -> MicroBatch:
    """Random tokens; the answer is read at the last one."""
    ids = torch.randint(10, 50000, (num_samples, length))
    return MicroBatch(
        tuple(range(num_samples)),
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        {"position": torch.full((num_samples,), length - 1), "label": torch.randint(0, 2, (num_samples,))},
        columns=2,
    )


def ours(
    engine: Engine, planner: MeZOPlanner | SVRGPlanner, objective: Forward, batch: MicroBatch
) -> Callable[[], None]:
    """One step of a planner: plan, evaluate, update, apply. For MeZO-SVRG an inner step, after one anchor step."""
    progress: Progress[Any] = Progress(planner.init())

    def evaluate(request: Evaluation, round_number: int) -> Losses:
        scores = engine.evaluate(request.variants, [batch], objective)[0]
        return Losses(tuple(float(score.loss.mean()) for score in scores))

    def take() -> None:
        take_step(planner, progress, evaluate, engine, 0)

    if isinstance(planner, SVRGPlanner):
        take()  # the anchor
        anchored = progress.state

        def take_inner() -> None:
            progress.state, progress.step = anchored, 1
            take()

        return take_inner
    return take


def perturb(parameters: list[nn.Parameter], seed: int, scale: float) -> None:
    """In place, the whole direction drawn anew."""
    torch.manual_seed(seed)
    for p in parameters:
        p.data.add_(torch.empty_like(p).normal_(), alpha=scale)


def textbook_estimate(
    model: nn.Module, parameters: list[nn.Parameter], seed: int, forward: Callable[[], float]
) -> float:
    """The two-point estimate by +eps, -2 eps, +eps."""
    perturb(parameters, seed, EPS)
    plus = forward()
    perturb(parameters, seed, -2 * EPS)
    minus = forward()
    perturb(parameters, seed, EPS)
    return (plus - minus) / (2 * EPS)


def textbook_mezo(model: nn.Module, forward: Callable[[], float]) -> Callable[[], None]:
    """MeZO's step, in place."""
    parameters = list(model.parameters())

    def take() -> None:
        projected = textbook_estimate(model, parameters, 1, forward)
        perturb(parameters, 1, -LR * projected)

    return take


def textbook_svrg(model: nn.Module, anchor: nn.Module, forwards: list[Callable[[], float]]) -> Callable[[], None]:
    """MeZO-SVRG's inner step with a copy of the weights as anchor and the full-batch estimate as a dense gradient."""
    parameters, anchor_parameters = list(model.parameters()), list(anchor.parameters())
    dense = [torch.randn_like(p) * 1e-3 for p in parameters]

    def take() -> None:
        here = textbook_estimate(model, parameters, 1, forwards[0])
        perturb(parameters, 1, -LR * here)
        there = textbook_estimate(anchor, anchor_parameters, 2, forwards[1])
        perturb(parameters, 2, LR * there)
        for p, g in zip(parameters, dense, strict=True):
            p.data.add_(g, alpha=-LR)

    return take


def measure(shape: str, length: int, repeats: int) -> dict[str, float]:
    """Median ratios over ``repeats`` rounds, at 16 samples of ``length`` tokens."""
    model, anchor, batch = make_model(shape), make_model(shape), make_batch(16, length)
    engine = Engine(model, Law("gaussian"))
    problem = Problem(seed=0, num_steps=1000, batch_size=16, full_size=16)
    objective, anchor_objective = (LabelWords(m, [100, 200], batch) for m in (model, anchor))

    def loss(of: nn.Module, by: Forward) -> Callable[[], float]:
        return torch.no_grad()(lambda: float(by(of, batch).loss.mean()))

    forward, anchor_forward = loss(model, objective), loss(anchor, anchor_objective)
    contenders: dict[str, Callable[[], object]] = {
        "forward": forward,
        "mezo_over_forward": ours(engine, MeZOPlanner(MeZO(lr=LR, eps=EPS), problem), objective, batch),
        "svrg_over_forward": ours(
            engine, SVRGPlanner(MeZOSVRG(lr=LR, anchor_lr=LR, eps=EPS), problem), objective, batch
        ),
        "textbook_mezo_over_forward": textbook_mezo(model, forward),
        "textbook_svrg_over_forward": textbook_svrg(model, anchor, [forward, anchor_forward]),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(repeats + 1):  # the first warms up and does not count
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            if round_number:
                times[name].append(time.perf_counter() - began)
    ratios = {
        name: statistics.median(t / f for t, f in zip(values, times["forward"], strict=True))
        for name, values in times.items()
    }
    return {**ratios, "forward": statistics.median(times["forward"])}


def nogil_pool() -> Callable[[int, Arguments, int, int], None]:
    """The plain alternative to `threads.in_threads`: numba's ``nogil=True`` and a pool of Python threads."""
    run = numba.njit(SIGNATURE, nogil=True)(cpu_kernel._run)
    pool = ThreadPoolExecutor(max(1, torch.get_num_threads() - 1))

    def launch(kernel: int, arguments: Arguments, num_tasks: int, min_tasks: int) -> None:
        num_threads = share_out(arguments, num_tasks, min_tasks)
        address = ctypes.addressof(arguments)
        others = [pool.submit(run, address) for _ in range(num_threads - 1)]
        run(address)
        wait(others)

    return launch


def compare_threads(shape: str, rounds: int) -> None:
    """Print how much longer steps and their forward passes take on Python's threads than on torch's.

    Args:
        shape: a key of `SHAPES`.
        rounds: in each of them, every step runs once on both kinds of threads, in turns first.
    """
    model, batch, launch = make_model(shape), make_batch(16, 32), nogil_pool()
    engine = Engine(model, Law("gaussian"))
    problem = Problem(seed=0, num_steps=1000, batch_size=16, full_size=16)
    objective = LabelWords(model, [100, 200], batch)
    planners = {
        "MeZO step": MeZOPlanner(MeZO(lr=LR, eps=EPS), problem),
        "MeZO-SVRG inner step": SVRGPlanner(MeZOSVRG(lr=LR, anchor_lr=LR, eps=EPS), problem),
    }
    steps = {name: ours(engine, planner, objective, batch) for name, planner in planners.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    print(f"load {os.getloadavg()[0]:.1f} before, {torch.get_num_threads()} threads")
    for round_number in range(rounds + 1):  # the first warms up and does not count
        for name, step in steps.items():
            seconds = [0.0, 0.0]
            for pooled in (0, 1) if round_number % 2 else (1, 0):
                with mock.patch.object(cpu, "in_threads", launch if pooled else cpu.in_threads):
                    began = time.perf_counter()
                    step()
                    seconds[pooled] = time.perf_counter() - began
            if round_number:
                times[name].append((seconds[0], seconds[1]))
    for name, pairs in times.items():
        lower, middle, upper = statistics.quantiles((pool / torch_team for torch_team, pool in pairs), n=4)
        fastest = min(pool for _, pool in pairs) / min(torch_team for torch_team, _ in pairs)
        print(
            f"{name:22} pool / torch's threads {middle:.3f} (quartiles {lower:.3f} to {upper:.3f}, {rounds} rounds), "
            f"of the fastest {fastest:.3f}"
        )
    print(f"load {os.getloadavg()[0]:.1f} after")


def main() -> None:
    """Measure both lengths, print a table and, with --json, one last line for machines."""
    parser = harness.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shape", choices=SHAPES, default="opt-125m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--nogil-pool", action="store_true", help="compare torch's threads with Python's instead")
    arguments = harness.parse(parser, FAST)
    facts = harness.begin()
    ask_for_huge_pages()  # as the command line does
    tune_malloc(is_sharded=False)
    torch.set_num_threads(arguments.threads)
    if arguments.nogil_pool:
        compare_threads(arguments.shape, arguments.repeats)
        return
    measured = {f"16x{n}": measure(arguments.shape, n, arguments.repeats) for n in (32, 128)}
    print(
        f"{arguments.shape}, fp32, {torch.get_num_threads()} threads, torch {torch.__version__}; 1 = one forward pass"
    )
    print(f"{'':28}" + "".join(f"{name:>10}" for name in measured))
    rows = [name for name in next(iter(measured.values())) if name != "forward"]
    for name in rows:
        print(f"{name:28}" + "".join(f"{ratios[name]:10.2f}" for ratios in measured.values()))
    print(f"{'one forward pass (s)':28}" + "".join(f"{ratios['forward']:10.3f}" for ratios in measured.values()))
    rounded = {size: {name: round(r[name], 3) for name in rows} for size, r in measured.items()}
    harness.end(arguments, facts, rounded)


if __name__ == "__main__":
    main()
