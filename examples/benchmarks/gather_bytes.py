"""What a step gathers: bytes of weights that collectives bring to a rank, over the size of the weights.

    python examples/benchmarks/gather_bytes.py [--shape opt-125m] [--ranks 2] [--layouts fsdp zero]

A MeZO step evaluates 2 variants of the weights, a MeZO-SVRG inner step 4. Here all of them share one gather. The naive
way perturbs the shards in place and runs one forward pass after another, as the released codes of both would on sharded
weights: every pass gathers everything. Bytes are read off the all-gathers that torch dispatches, whoever calls them; a
rank's own share counts as gathered, and so does padding.

Ranks are processes of this machine, joined over gloo. Random weights, random tokens; bytes depend on neither.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import torch
from step_cost import SHAPES, make_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mezo_dist.algorithms.base import Losses, Problem, Variant
from mezo_dist.algorithms.mezo import MeZO, MeZOPlanner
from mezo_dist.algorithms.step import Progress, take_step
from mezo_dist.algorithms.svrg import MeZOSVRG, SVRGPlanner
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.law import Law
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.layouts.base import Layout
from mezo_dist.testing import spawn

FAST = {"shape": "tiny"}
EPS, LR = 1e-3, 1e-6


class Counter(TorchDispatchMode):
    """Bytes of the outputs of every all-gather of this process, while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "allgather" in func.name():
            outputs, _ = torch.utils._pytree.tree_flatten(args[0])
            self.num_bytes += sum(t.numel() * t.element_size() for t in outputs if isinstance(t, Tensor))
        return func(*args, **(kwargs or {}))


def make_layout(name: str, model: nn.Module, comm: Communicator) -> Layout:
    """Shard ``model``."""
    if name == "fsdp":
        from mezo_dist.engines.layouts.fsdp import Fsdp

        return Fsdp(model, comm)
    from mezo_dist.engines.layouts.zero import Zero

    return Zero(model, comm, {})


def bytes_of(step: Callable[[], object]) -> int:
    """What ``step`` gathers."""
    with Counter() as counter:
        step()
    return counter.num_bytes


def measure(comm: Communicator, name: str, shape: str) -> dict[str, float]:
    """Gathered bytes over the weights' for steps of both algorithms, and for the naive way; on every rank alike."""
    model = make_model(shape)
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    engine = Engine(model, Law("gaussian"), make_layout(name, model, comm))
    tokens = torch.randint(10, 50000, (2, 16), generator=torch.Generator().manual_seed(comm.rank))
    problem = Problem(seed=0, num_steps=1000, batch_size=2 * comm.world_size, full_size=2 * comm.world_size)

    def evaluate(variants: tuple[Variant, ...]) -> list[float]:
        losses = engine.evaluate(variants, [tokens], lambda m, ids: float(m(input_ids=ids, labels=ids).loss))[0]
        return [total / 2**20 for total in comm.round(torch.tensor(losses).mul(2**20).long(), 0).tolist()]

    def take(planner: MeZOPlanner | SVRGPlanner, state: Any, number: int) -> Any:
        progress: Progress[Any] = Progress(state, number)
        take_step(planner, progress, lambda request, _: Losses(tuple(evaluate(request.variants))), engine, 0)
        return progress.state

    def naive_estimate(seed: int) -> None:
        for move in (EPS, -2 * EPS):
            engine.add(Combination.single(seed, move), rounding_seed=0)
            evaluate((Variant(),))
        engine.add(Combination.single(seed, EPS), rounding_seed=0)

    def naive_svrg(displacement: Combination) -> None:
        naive_estimate(1)
        engine.add(-displacement, rounding_seed=0)  # back to the anchor
        naive_estimate(1)
        engine.add(displacement, rounding_seed=0)

    mezo, svrg = (
        MeZOPlanner(MeZO(lr=LR, eps=EPS), problem),
        SVRGPlanner(MeZOSVRG(lr=LR, anchor_lr=LR, eps=EPS), problem),
    )
    anchored = take(svrg, svrg.init(), 0)
    num_bytes_of = {
        "mezo_over_weights": bytes_of(lambda: take(mezo, mezo.init(), 0)),
        "svrg_over_weights": bytes_of(lambda: take(svrg, anchored, 1)),
        "naive_svrg_over_weights": bytes_of(lambda: naive_svrg(Combination.single(2, LR))),
    }
    return {what: num_bytes / weight_bytes for what, num_bytes in num_bytes_of.items()}


def everything(comm: Communicator, layouts: list[str], shape: str) -> dict[str, dict[str, float]]:
    """What one rank does."""
    return {name: measure(comm, name, shape) for name in layouts}


def main() -> None:
    """Print a table and, with --json, one last line for machines."""
    parser = harness.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="opt-125m")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layouts", nargs="+", choices=["fsdp", "zero"], default=["fsdp", "zero"])
    arguments = harness.parse(parser, FAST)
    facts = harness.begin()
    by_layout = spawn(everything, arguments.ranks, arguments.layouts, arguments.shape, timeout_s=900)[0]
    print(f"{arguments.shape}, fp32, {arguments.ranks} ranks, torch {torch.__version__}; 1 = all weights once")
    print(f"{'':26}" + "".join(f"{name:>10}" for name in by_layout))
    for what in next(iter(by_layout.values())):
        print(f"{what:26}" + "".join(f"{figures[what]:10.3f}" for figures in by_layout.values()))
    rounded = {name: {what: round(x, 4) for what, x in f.items()} for name, f in by_layout.items()}
    harness.end(arguments, facts, rounded)


if __name__ == "__main__":
    main()
