"""Parts 2 to 5 of the first half hour on a GPU (see first_run.sh): what directions, steps, memory and texts cost.

    python examples/gpu/parts.py directions|steps|memory|generation [--shapes opt-1.3b ...] [--rehearse] [--out FOLDER]

Each part prints a table and writes FOLDER/PART.json. With ``--rehearse`` the same code runs on the CPU with tiny
shapes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mezo_dist.algorithms.base import Algorithm, Evaluation, Losses, Problem, Variant
from mezo_dist.algorithms.mezo import MeZO, MeZOPlanner
from mezo_dist.algorithms.step import Progress, take_step
from mezo_dist.algorithms.svrg import MeZOSVRG, SVRGPlanner
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.law import Law
from mezo_dist.directions.parts import Part
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.engine import Engine
from mezo_dist.runs.evaluation import Evaluator
from mezo_dist.tasks.classification.label_words import LabelWords
from mezo_dist.tasks.generation.decode import Decoding, decode

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "benchmarks")]
from baselines import in_place_lozo, textbook_mezo  # noqa: E402
from shapes import SHAPES, config_of, make_batch  # noqa: E402

Row = dict[str, Any]
LAWS = {"gaussian": Law("gaussian"), "rademacher": Law("rademacher"), "lowrank": Law("lowrank", 2)}
PUBLISHED = {"opt-13b": "zo-vllm: 88 ms (low-rank, in LoRA slots); the usual code: 630 ms"}
SAMPLES, TOKENS = 16, 40
GIB = 2**30


class Machine:
    """Where parts run, and how large."""

    def __init__(self, *, rehearse: bool) -> None:
        self.rehearse = rehearse
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.dtype = torch.float32 if rehearse else torch.bfloat16

    def seconds(self, run: Callable[[], object], repeats: int = 5) -> float:
        """Median time of a call, after two that count for nothing."""
        times = []
        for _ in range(3 if self.rehearse else repeats + 2):
            self.wait()
            began = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - began)
        return statistics.median(times[2:])

    def wait(self) -> None:
        """Until the device has done all it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak_gib(self, run: Callable[[], object]) -> float | None:
        """Most memory that was allocated during a call; None where nobody counts."""
        if self.device.type != "cuda":
            run()
            return None
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / GIB

    def model(self, shape: str) -> nn.Module:
        """Random weights, made where they live."""
        with self.device:
            return AutoModelForCausalLM.from_config(config_of(shape), dtype=self.dtype).eval()


def directions(machine: Machine, shapes: list[str]) -> Iterator[Row]:
    """GB/s of what must be moved, against a copy of the same bytes and against `normal_` and `add_`."""
    side = 64 if machine.rehearse else 16384
    weight = torch.zeros(side, side, device=machine.device, dtype=machine.dtype)
    one, two = torch.empty_like(weight), torch.empty_like(weight)
    both = [Combination.single(1, 1e-3), Combination.single(1, -1e-3)]
    updates = [(Combination.single(k, 1e-6), k if machine.dtype == torch.bfloat16 else None) for k in range(8)]
    size = weight.nbytes
    cases: list[tuple[str, int, Callable[[], object]]] = [
        ("copy", 2 * size, lambda: one.copy_(weight)),
        ("normal_ + add_", 2 * size, lambda: weight.add_(one.normal_(), alpha=1e-6)),
    ]
    for name, law in LAWS.items():
        whole = {"param_id": 1, "shape": weight.shape}
        parts = [Part(weight, (weight,), 1, weight.shape)]
        cases += [
            (f"{name}: both signs", 3 * size, lambda law=law, w=whole: law.add(weight, both, [one, two], **w)),
            (f"{name}: update", 2 * size, lambda law=law, p=parts: law.advance_parts(p, updates[:1])),
            (f"{name}: 8 updates", 2 * size, lambda law=law, p=parts: law.advance_parts(p, updates)),
        ]
    low = LAWS["lowrank"]
    seeds = list(range(16))
    thin = 16 * 2 * side * low.rank * 4
    cases += [
        ("factors of 16 directions", thin, lambda: low.factors(seeds, 1, weight.shape, machine.device)),
        ("scale", 2 * size, lambda: LAWS["gaussian"].scale(weight, 0.999, param_id=1)),
    ]
    copy = None
    for name, moved, run in cases:
        rate = moved / machine.seconds(run) / 1e9
        copy = copy or rate
        yield {"what": name, "GB/s": rate, "of a copy": rate / copy}


def stepper(engine: Engine, planner: Algorithm[Any], objective: Any, samples: int, tokens: int) -> Callable[[], object]:
    """Takes one step each time it is called; full batches are the same as minibatches."""
    evaluator, batch = Evaluator(engine, objective, Communicator()), [make_batch(samples, tokens)]
    progress: Progress[Any] = Progress(planner.init())

    def evaluate(request: Evaluation, number: int) -> Losses | None:
        return evaluator.losses(request, batch, (progress.step, number))

    return lambda: take_step(planner, progress, evaluate, engine, 0)


def methods(machine: Machine, model: nn.Module) -> dict[str, tuple[Callable[[], object], int]]:
    """By name: takes a step, and how many calls belong together."""
    samples, tokens = (2, 8) if machine.rehearse else (SAMPLES, TOKENS)
    problem = Problem(0, 10**6, samples, samples, has_16bit_weights=machine.dtype == torch.bfloat16)
    with torch.no_grad():
        objective = LabelWords(model, [100, 200], make_batch(1, 2))
    batch, stochastic = make_batch(samples, tokens), machine.dtype == torch.bfloat16

    def ours(law: Law, planner: Algorithm[Any]) -> Callable[[], object]:
        return stepper(Engine(model, law, stochastic_rounding=stochastic), planner, objective, samples, tokens)

    def loss() -> Tensor:
        with torch.no_grad():
            return objective(model, batch).loss.mean()

    numbers = iter(range(10**9))
    mezo, per_sample = MeZO(lr=1e-7), MeZO(lr=1e-7, per_sample=True)
    svrg = MeZOSVRG(lr=1e-7, anchor_lr=1e-7)
    return {
        "forward": (loss, 1),
        **{f"mezo {name}": (ours(law, MeZOPlanner(mezo, problem)), 1) for name, law in LAWS.items()},
        "mezo per sample": (ours(LAWS["lowrank"], MeZOPlanner(per_sample, problem)), 1),
        "svrg cycle of 2": (ours(LAWS["rademacher"], SVRGPlanner(svrg, problem)), 2),
        "textbook MeZO": (lambda: textbook_mezo(model, loss, next(numbers)), 1),
        "in-place LOZO": (lambda: in_place_lozo(model, loss, next(numbers)), 1),
    }


def steps(machine: Machine, shapes: list[str]) -> Iterator[Row]:
    """Seconds of a step, and in forward passes."""
    for shape in shapes:
        model, forward = machine.model(shape), None
        for name, (run, calls) in methods(machine, model).items():
            seconds = machine.seconds(lambda run=run, calls=calls: [run() for _ in range(calls)])
            forward = forward or seconds
            row = {"shape": shape, "method": name, "ms": 1000 * seconds, "forwards": seconds / forward}
            yield row | {"published": PUBLISHED.get(shape, "") if name == "forward" else ""}
        del model


def memory(machine: Machine, shapes: list[str]) -> Iterator[Row]:
    """Peak against a forward pass; the largest shape with MeZO-SVRG that fits comes out as the last one without
    ``full``."""
    for shape in shapes:
        try:
            model, forward = machine.model(shape), None
            for name, (run, calls) in methods(machine, model).items():
                peak = machine.peak_gib(lambda run=run, calls=calls: [run() for _ in range(calls)])
                forward = forward or peak
                ratio = None if peak is None or forward is None else peak / forward
                yield {"shape": shape, "method": name, "GiB": peak, "of a forward": ratio}
            del model
        except torch.OutOfMemoryError:
            yield {"shape": shape, "method": "full", "GiB": None, "of a forward": None}
            return


def generation(machine: Machine, shapes: list[str]) -> Iterator[Row]:
    """Tokens per second of `generate`, and of both signs of a low-rank direction in lock step."""
    samples, prompt, new = (2, 4, 3) if machine.rehearse else (SAMPLES, 64, 64)
    decoding = Decoding(new, (), 0)
    for shape in shapes:
        model = machine.model(shape)
        ids = make_batch(samples, prompt).inputs["input_ids"].to(machine.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        engine, shift = Engine(model, LAWS["lowrank"]), Combination.single(1, 1e-3)
        variants = [Variant(shift), Variant(-shift)]

        def write(model: nn.Module, item: Any) -> list[list[int]]:
            return decode(model, item, decoding)

        def both(engine: Engine = engine, inputs: Any = inputs, variants: Any = variants, write: Any = write) -> None:
            with engine.called_often():
                engine.evaluate(variants, [inputs], write)

        alone = machine.seconds(lambda model=model, inputs=inputs: decode(model, inputs, decoding), 3)
        signs = machine.seconds(both, 3)
        written = samples * new
        yield {"shape": shape, "generate tokens/s": written / alone, "both signs tokens/s": 2 * written / signs}


PARTS = {"directions": directions, "steps": steps, "memory": memory, "generation": generation}


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="all from OPT-125M on if left out")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument("--out", type=Path, default=Path("first_run"), help="folder of the results")
    options = parser.parse_args()
    machine = Machine(rehearse=options.rehearse)
    every = ["opt-125m", "opt-1.3b", "opt-6.7b", "opt-13b"]
    shapes = options.shapes or (["tiny"] if options.rehearse else every)
    about = {
        "part": options.part,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if machine.device.type == "cuda" else "cpu",
        "rehearsal": options.rehearse,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for row in PARTS[options.part](machine, shapes):
        rows.append(row)
        print("  ".join(f"{key} {_shown(value)}" for key, value in row.items()), flush=True)
        (options.out / f"{options.part}.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
