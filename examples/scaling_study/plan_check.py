"""Seconds of a step: what ``mezo-dist plan`` predicts, against what real steps take, with every residual.

    python examples/scaling_study/plan_check.py [--threads 2] [--repeats 5] [--cases small|all] [--json]

The machine is measured first (`mezo_dist.planning.calibration`), with as many threads as the steps have. Then each case
takes steps on a model of random weights, and the fastest of them counts: the prediction is for an undisturbed machine.
Cases of two ranks run one thread each, on the same memory, which the prediction does not know: their residual says what
that costs. Random tokens, whole micro-batches without padding, logits read at label words.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from mezo_dist import algorithms
from mezo_dist.algorithms import Settings
from mezo_dist.algorithms.base import Problem
from mezo_dist.algorithms.mezo import MeZO
from mezo_dist.algorithms.step import Progress, take_step
from mezo_dist.algorithms.svrg import MeZOSVRG
from mezo_dist.directions.law import Law
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.layouts.base import Layout
from mezo_dist.engines.malloc import ask_for_huge_pages, tune_malloc
from mezo_dist.planning.calibration import measure, with_rates
from mezo_dist.planning.choice import Plan, plan
from mezo_dist.planning.families import shape_of_config
from mezo_dist.planning.machine import Machine
from mezo_dist.planning.named import NAMED
from mezo_dist.planning.setting import Setting
from mezo_dist.runs.evaluation import Evaluator
from mezo_dist.runs.work_split import WorkSplit
from mezo_dist.tasks.batches import MicroBatch
from mezo_dist.tasks.classification.label_words import LabelWords
from mezo_dist.testing import spawn

LIMIT = 0.2
"""Residuals beyond this are marked."""


@dataclass(frozen=True)
class Case:
    """A shape (cut to some layers, so that it fits on small machines) and a way to run it."""

    shape: str
    layers: int
    setting: Setting
    ranks: int = 1

    @property
    def config(self) -> dict[str, Any]:
        """Contents of a config.json."""
        return {**NAMED[self.shape], "num_hidden_layers": self.layers}

    @property
    def name(self) -> str:
        """For people."""
        s = self.setting
        way = f"{s.layout} {self.ranks} rank(s)"
        return f"{self.shape}/{self.layers} {s.weights} {s.batch_size}x{s.tokens} {s.algorithm.name} {way}"


def _setting(size: str, algorithm: Settings, **options: Any) -> Setting:
    samples, tokens = map(int, size.split("x"))
    usual = {"weights": "float32", "batch_size": samples, "full_size": samples, "micro_batch": samples // 2}
    return Setting(**{**usual, "tokens": tokens, "is_padded": False, "width": 2, "algorithm": algorithm, **options})


SMALL = [
    Case("opt-125m", 4, _setting("8x32", MeZO())),
    Case("qwen3-0.6b", 2, _setting("8x32", MeZO())),
    Case("opt-125m", 2, _setting("4x32", MeZO(), layout="fsdp"), ranks=2),
]
ALL = [
    Case("opt-125m", 12, _setting("16x32", MeZO())),
    Case("opt-125m", 12, _setting("16x128", MeZO())),
    Case("opt-125m", 12, _setting("16x128", MeZOSVRG())),
    Case("opt-125m", 12, _setting("16x32", MeZO(directions=4, one_sided=True))),
    Case("opt-125m", 12, _setting("16x32", MeZO(), weights="bfloat16")),
    Case("opt-350m", 24, _setting("8x64", MeZO())),
    Case("opt-1.3b", 4, _setting("4x128", MeZOSVRG())),
    Case("qwen3-0.6b", 8, _setting("8x128", MeZO())),
    Case("llama-3-8b", 1, _setting("4x64", MeZO(), weights="bfloat16")),
    Case("opt-125m", 12, _setting("16x32", MeZO(), layout="fsdp"), ranks=2),
    Case("opt-125m", 12, _setting("16x128", MeZO(), layout="zero"), ranks=2),
    Case("opt-125m", 12, _setting("16x128", MeZO()), ranks=2),
]


def predicted(case: Case, rates: dict[str, Any]) -> Plan:
    """The plan of a case on the machine at hand."""
    shape = shape_of_config(case.config, case.shape)
    assert shape is not None
    machine = with_rates(Machine(ranks_per_host=case.ranks), rates, case.setting.weights)
    return plan(shape, case.setting, machine)


def _layout(case: Case, model: torch.nn.Module, comm: Communicator) -> Layout | None:
    if case.setting.layout == "fsdp":
        from mezo_dist.engines.layouts.fsdp import Fsdp

        return Fsdp(model, comm)
    if case.setting.layout == "zero":
        from mezo_dist.engines.layouts.zero import Zero

        return Zero(model, comm, {})
    return None


def measured(comm: Communicator, case: Case, repeats: int) -> float:
    """Seconds of a step, the fastest of some, over a cycle of the algorithm; of the slowest rank."""
    setting = case.setting
    settings = dict(case.config)
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings, use_cache=False)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, setting.weights)).eval()
    batch = _batch(setting)
    with torch.no_grad():
        forward = LabelWords(model, [100, 200], batch[0])
    engine = Engine(model, Law("gaussian"), _layout(case, model, comm))
    split = WorkSplit(comm.world_size, setting.copies(comm.world_size), by_base=setting.is_sharded)
    evaluator = Evaluator(engine, forward, comm, setting.width, work_split=split)
    problem = Problem(0, 1000, setting.batch_size, setting.full_size, setting.weights != "float32")
    planner = algorithms.build(setting.algorithm.name, setting.algorithm, problem)
    progress: Progress[Any] = Progress(planner.init())

    def step() -> None:
        take_step(planner, progress, lambda request, n: evaluator.losses(request, batch, (progress.step, n)), engine, 0)

    cycle = getattr(setting.algorithm, "q", 1)
    for _ in range(cycle):
        step()
    times = [sum(_seconds(step) for _ in range(cycle)) / cycle for _ in range(repeats)]
    return max(comm.collect(lambda: [min(times)])[r][0] for r in range(comm.world_size))


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _batch(setting: Setting) -> list[MicroBatch]:
    items = []
    draw = torch.Generator().manual_seed(0)
    for start in range(0, setting.batch_size, setting.micro_batch):
        slots = tuple(range(start, start + setting.micro_batch))
        ids = torch.randint(10, 30000, (len(slots), setting.tokens), generator=draw)
        targets = {"position": torch.full((len(slots),), setting.tokens - 1), "label": torch.arange(len(slots)) % 2}
        items.append(MicroBatch(slots, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, targets, columns=2))
    return items


def main() -> None:
    """Measure all cases; print a table and, with --json, one last line for machines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", choices=["small", "all"], default="all")
    arguments = parser.parse_args()
    ask_for_huge_pages()  # as the command line does
    tune_malloc(is_sharded=False)
    torch.set_num_threads(arguments.threads)
    if (load := os.getloadavg()[0]) > 1:
        print(f"the machine is busy (load {load:.1f}): neither rates nor times mean much")
    cases = SMALL if arguments.cases == "small" else ALL
    rates = {1: measure()}
    if any(case.ranks > 1 for case in cases):
        torch.set_num_threads(1)
        rates[2] = measure()
        torch.set_num_threads(arguments.threads)
    rows = []
    print(f"{'case':62} {'predicted':>10} {'measured':>10} {'residual':>9}   parts of the prediction")
    for case in cases:
        one = predicted(case, rates[case.ranks])
        if case.ranks > 1:
            seconds = spawn(measured, case.ranks, case, arguments.repeats, timeout_s=900)[0]
        else:
            seconds = measured(Communicator(), case, arguments.repeats)
        residual = one.seconds / seconds - 1
        parts = {name: one.mean(lambda s, name=name: s.duration.parts[name]) for name in one.steps[0].duration.parts}
        rows.append({"case": case.name, "predicted_s": one.seconds, "measured_s": seconds, "residual": residual,
                     "parts": parts})  # fmt: skip
        shown = "  ".join(f"{name} {value:.3f}" for name, value in parts.items() if value)
        mark = "" if abs(residual) <= LIMIT else " !"
        print(f"{case.name:62} {one.seconds:10.3f} {seconds:10.3f} {residual:+9.0%}{mark:2} {shown}", flush=True)
    within = sum(abs(row["residual"]) <= LIMIT for row in rows)
    print(f"{within} of {len(rows)} within {LIMIT:.0%}; load {os.getloadavg()[0]:.1f} after")
    if arguments.json:
        print(json.dumps({"within": within, "rates": {str(n): r for n, r in rates.items()}, "rows": rows}))


if __name__ == "__main__":
    main()
