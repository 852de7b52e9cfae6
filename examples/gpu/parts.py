"""Parts of the first half hour on a GPU (see first_run.sh): whether bits are right, and what directions, steps, memory
and texts cost.

    python examples/gpu/parts.py PART [--shapes opt-1.3b ...] [--only WORD] [--rehearse] [--out FOLDER]

Each part prints rows as they come, and writes FOLDER/PART.json and a table, FOLDER/PART.md. With ``--rehearse`` the
same code runs on the CPU with tiny shapes. Parts: tests, trajectory, runs, directions, linear, steps, memory,
generation, compile, profile, paper.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
import yaml
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mezo_dist.algorithms.base import Algorithm, Evaluation, Losses, Problem, Variant
from mezo_dist.algorithms.mezo import MeZO, MeZOPlanner
from mezo_dist.algorithms.step import Progress, take_step
from mezo_dist.algorithms.svrg import MeZOSVRG, SVRGPlanner
from mezo_dist.config import reader
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.law import Law
from mezo_dist.directions.parts import Part
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.engine import Engine
from mezo_dist.runs.evaluation import Evaluator
from mezo_dist.runs.training import train
from mezo_dist.tasks.classification.label_words import LabelWords
from mezo_dist.tasks.generation.decode import Decoding, decode
from mezo_dist.testing import write_tiny_config

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "benchmarks")]
from baselines import in_place_lozo, textbook_mezo  # noqa: E402
from compiled import compile_modes  # noqa: E402
from layers import linear  # noqa: E402
from profiled import profiles  # noqa: E402
from runs import runs  # noqa: E402
from shapes import SHAPES, config_of, make_batch  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]
LAWS = {"gaussian": Law("gaussian"), "rademacher": Law("rademacher"), "lowrank": Law("lowrank", 2)}
PUBLISHED = {"opt-13b": "zo-vllm: 88 ms (low-rank, in LoRA slots); the usual code: 630 ms"}
LARGE = ["opt-30b", "opt-66b"]
SAMPLES, TOKENS = 16, 40
GIB = 2**30


class Machine:
    """Where parts run, and how large."""

    def __init__(self, out: Path, *, rehearse: bool, only: str = "") -> None:
        self.out, self.rehearse, self.only = out, rehearse, only
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.dtype = torch.float32 if rehearse else torch.bfloat16
        self.linear = "materialised" if rehearse else "registers"  # whose kernel is for GPUs

    def seconds(self, run: Callable[[], object], repeats: int = 5) -> float:
        """Median time of a call, after two that count for nothing. Of short calls many are told to a GPU at a time, or
        the way to it would be measured."""
        times, together = [], 1
        for number in range(3 if self.rehearse else repeats + 2):
            self.wait()
            began = time.perf_counter()
            for _ in range(together):
                run()
            self.wait()
            times.append((time.perf_counter() - began) / together)
            if number == 1 and self.device.type == "cuda":
                together = max(1, min(50, int(0.01 / times[-1])))
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

    def requests(self) -> int:
        """How often torch's allocator has asked the GPU for memory."""
        return torch.cuda.memory_stats()["num_device_alloc"] if self.device.type == "cuda" else 0

    def model(self, shape: str) -> nn.Module:
        """Random weights, made where they live."""
        with self.device:
            return AutoModelForCausalLM.from_config(config_of(shape), dtype=self.dtype).eval()


def tests(machine: Machine, shapes: list[str]) -> Iterator[Row]:
    """The bits of every kernel against the reference, where there is a GPU; and what else is tested of GPUs."""
    xml = machine.out / "tests.xml"
    paths = ["tests/directions/test_gpu.py", "tests/directions/test_fused_linear.py", "tests/gpu"]
    some = ["-k", "test_is_the_implementation_for_cuda or test_what_would_wait"] if machine.rehearse else []
    xml.unlink(missing_ok=True)  # of a call before, which this one must not be taken for
    command = [sys.executable, "-m", "pytest", "-q", *paths, *some, f"--junitxml={xml.resolve()}"]
    subprocess.run(command, cwd=ROOT, check=False)
    suite = ElementTree.parse(xml).getroot()[0]
    yield {"what": "all", **{name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}}
    for case in suite.iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            yield {"what": case.attrib["name"], "tests": 1, "failures": 1, "errors": 0, "skipped": 0}
    if int(suite.attrib["failures"]) + int(suite.attrib["errors"]):
        raise SystemExit(1)


def trajectory(machine: Machine, shapes: list[str]) -> Iterator[Row]:
    """The same steps on the CPU and on the GPU. One update has the same bits on both (lowrank: but for the last bits of
    products); losses are rounded otherwise, and so are all steps after the first."""
    number = 3 if machine.rehearse else 20
    for name, law in LAWS.items():
        models = [_small_model(torch.device("cpu")), _small_model(machine.device)]
        updated = []
        for model in models:
            Engine(model, law).add(Combination.single(5, 1e-3), 0)
            updated.append(torch.cat([p.detach().cpu().view(-1) for p in model.parameters()]))
        equal = (updated[0] == updated[1]).double().mean().item()
        apart = (updated[0] - updated[1]).abs().max().item()
        losses = [_losses(model, law, number) for model in models]
        differences = [max(abs(a - b) for a, b in zip(*pair, strict=True)) for pair in zip(*losses, strict=True)]
        yield {
            "law": name,
            "equal weights after one update": equal,
            "largest difference of weights": apart,
            "difference of losses, first step": differences[0],
            f"difference of losses, step {number}": differences[-1],
        }


def _small_model(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of("tiny"), dtype=torch.float32).eval().to(device)


def _losses(model: nn.Module, law: Law, number: int) -> list[tuple[float, ...]]:
    """Of the variants of each step."""
    with torch.no_grad():
        objective = LabelWords(model, [100, 200], make_batch(1, 2))
    planner, engine = MeZOPlanner(MeZO(lr=1e-4), Problem(0, number, 4, 4, has_16bit_weights=False)), Engine(model, law)
    evaluator, progress = Evaluator(engine, objective, Communicator()), Progress(planner.init())
    losses: list[tuple[float, ...]] = []

    def evaluate(request: Evaluation, place: int) -> Losses | None:
        found = evaluator.losses(request, [make_batch(4, 16)], (progress.step, place))
        losses.append(found.mean if found is not None else ())
        return found

    for _ in range(number):
        take_step(planner, progress, evaluate, engine, 0)
    return losses


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
    for name, moved, run in (case for case in cases if case[0] == "copy" or machine.only in case[0]):
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


def objective_of(model: nn.Module) -> LabelWords:
    """Of two label words; it changes the model's head, so there is one for each model."""
    with torch.no_grad():
        return LabelWords(model, [100, 200], make_batch(1, 2))


def methods(machine: Machine, model: nn.Module, objective: LabelWords) -> dict[str, tuple[Callable[[], object], int]]:
    """By name: takes a step, and how many calls belong together.

    Args:
        machine: where.
        model: which is trained.
        objective: of `objective_of`.
    """
    samples, tokens = (2, 8) if machine.rehearse else (SAMPLES, TOKENS)
    problem = Problem(0, 10**6, samples, samples, has_16bit_weights=machine.dtype == torch.bfloat16)
    batch, stochastic = make_batch(samples, tokens), machine.dtype == torch.bfloat16

    def ours(law: Law, planner: Algorithm[Any], linear: Any = "materialised") -> Callable[[], object]:
        engine = Engine(model, law, stochastic_rounding=stochastic, linear=linear)
        return stepper(engine, planner, objective, samples, tokens)

    def loss() -> Tensor:
        with torch.no_grad():
            return objective(model, batch).loss.mean()

    numbers = iter(range(10**9))
    mezo, per_sample = MeZO(lr=1e-7), MeZO(lr=1e-7, per_sample=True)
    svrg, replayed = (MeZOSVRG(lr=1e-7, anchor_lr=1e-7, anchor=anchor) for anchor in ("auto", "replay"))
    return {
        "forward": (loss, 1),
        **{f"mezo {name}": (ours(law, MeZOPlanner(mezo, problem)), 1) for name, law in LAWS.items()},
        "mezo in registers": (ours(LAWS["rademacher"], MeZOPlanner(mezo, problem), machine.linear), 1),
        "mezo per sample": (ours(LAWS["lowrank"], MeZOPlanner(per_sample, problem)), 1),
        "svrg cycle of 2": (ours(LAWS["rademacher"], SVRGPlanner(svrg, problem)), 2),
        "svrg, anchor replayed": (ours(LAWS["rademacher"], SVRGPlanner(replayed, problem)), 2),
        "textbook MeZO": (lambda: textbook_mezo(model, loss, next(numbers)), 1),
        "in-place LOZO": (lambda: in_place_lozo(model, loss, next(numbers)), 1),
    }


def steps(machine: Machine, shapes: list[str]) -> Iterator[Row]:
    """Seconds of a step, and in forward passes."""
    for shape in shapes:
        model, forward = machine.model(shape), None
        for name, (run, calls) in methods(machine, model, objective_of(model)).items():
            seconds = machine.seconds(lambda run=run, calls=calls: [run() for _ in range(calls)])
            forward = forward or seconds
            row = {"shape": shape, "method": name, "ms": 1000 * seconds, "forwards": seconds / forward}
            yield row | {"published": PUBLISHED.get(shape, "") if name == "forward" else ""}
        del model


def memory(machine: Machine, shapes: list[str]) -> Iterator[Row]:
    """Peak against a forward pass. Of shapes beyond those of `steps` MeZO-SVRG alone is looked at; the largest that
    fits with it comes out as the last one without ``full``."""
    for shape in shapes:
        is_large, forward = shape in LARGE, None
        gc.collect()  # the model before
        try:
            model = machine.model(shape)
            objective = objective_of(model)
            for name in methods(machine, model, objective):
                if is_large and name not in ("forward", "svrg, anchor replayed"):
                    continue
                gc.collect()  # an anchor that another method has stored
                run, calls = methods(machine, model, objective)[name]
                peak = machine.peak_gib(lambda run=run, calls=calls: [run() for _ in range(2 * calls)])
                asked = machine.requests()
                for _ in range(3 * calls):
                    run()
                forward, more = forward or peak, machine.requests() - asked
                ratio = None if peak is None or forward is None else peak / forward
                row = {"shape": shape, "method": name, "GiB": peak, "of a forward": ratio}
                yield row | {"requests to the GPU after two": more}
                del run
            del model, objective
        except torch.OutOfMemoryError:
            yield {"shape": shape, "method": "full"}
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


PAPER = {
    "mezo": {"name": "mezo", "lr": 3e-5, "eps": 1e-3},
    "mezo-svrg": {"name": "mezo-svrg", "lr": 3e-6, "anchor_lr": 3e-5, "eps": 1e-3},
    "adamw": {"name": "adamw", "lr": 3e-5},
}
"""Rates from the middle of the grids of the studies' preset `gpu`; nobody has tried them with so many steps."""
STEPS = {"mezo": 100_000, "mezo-svrg": 20_000, "adamw": 2_000}
"""200,000 forward passes of 64 samples with MeZO, and as many with MeZO-SVRG, whose cycle of an anchor (of 512 samples)
and a step takes 20 of them in two steps."""


def paper(machine: Machine, shapes: list[str]) -> Iterator[Row]:
    """The setting of the MeZO-SVRG paper as far as the models at hand go: MiniLM-L6 with a fresh head, all weights, 512
    samples, batch 64. A run that SIGTERM cut short (`timeout` sends it) goes on where it was the next time."""
    for name, algorithm in PAPER.items():
        if machine.only not in name:
            continue
        folder = machine.out / f"paper-{name}"
        data = yaml.safe_load((Path(__file__).parent / "paper.yaml").read_text())
        if machine.rehearse:
            tiny = yaml.safe_load(write_tiny_config(machine.out / "tiny", "bert", "mezo", batch_size=8).read_text())
            data |= {"model": {**tiny["model"], "head": "classifier"}, "task": tiny["task"], "train": tiny["train"]}
        data["algorithm"] = algorithm
        data["train"]["steps"] = 2 if machine.rehearse else STEPS[name]
        path = machine.out / f"paper-{name}.yaml"
        path.write_text(yaml.safe_dump(data))
        if not (folder / "results.json").exists():
            train(reader.load(path, [f"output.dir={folder}"]), Communicator(), quiet=True)
        results = json.loads((folder / "results.json").read_text())
        figures = {when: results[when]["accuracy"] for when in ("before", "validation", "after")}
        yield {"algorithm": name, "steps": results["steps"], "training_s": results["training_s"], **figures}


PARTS = {
    "tests": tests,
    "trajectory": trajectory,
    "runs": runs,
    "directions": directions,
    "linear": linear,
    "steps": steps,
    "memory": memory,
    "generation": generation,
    "compile": compile_modes,
    "profile": lambda machine, shapes: profiles(
        machine, shapes, lambda there, model: methods(there, model, objective_of(model))
    ),
    "paper": paper,
}


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="all from OPT-125M on if left out")
    parser.add_argument("--only", default="", help="rows whose name has this in it (directions, profile, paper)")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument("--out", type=Path, default=Path("first_run"), help="folder of the results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    machine = Machine(options.out, rehearse=options.rehearse, only=options.only)
    every = ["opt-125m", "opt-1.3b", "opt-6.7b", "opt-13b", *(LARGE if options.part == "memory" else ())]
    shapes = options.shapes or (["tiny"] if options.rehearse else every)
    about = {
        "part": options.part,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if machine.device.type == "cuda" else "cpu",
        "rehearsal": options.rehearse,
    }
    rows: list[Row] = []
    for row in PARTS[options.part](machine, shapes):
        rows.append(row)
        print("  ".join(f"{key} {_shown(value)}" for key, value in row.items()), flush=True)
        (options.out / f"{options.part}.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
        (options.out / f"{options.part}.md").write_text(_table(rows))


def _table(rows: list[Row]) -> str:
    """In Markdown."""
    lines = [[*rows[0]], ["---"] * len(rows[0]), *([_shown(row.get(name, "")) for name in rows[0]] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
