"""Rates of the machine at hand, measured in a few seconds, and remembered under the user's cache folder."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mezo_dist.assets.registry import cache_folder
from mezo_dist.errors import UserError
from mezo_dist.json_types import JsonObject
from mezo_dist.planning.machine import Machine
from mezo_dist.storage.files import replace_file

RATES = ("bandwidth", "generate", "write", "call", "latency", "host_link")
"""What is measured besides the rate of matrix products, under the names of `Machine`."""
REPEATS = 5


def remembered_at() -> Path:
    """The file of this user's measurements."""
    return cache_folder() / "calibration.json"


def remembered() -> JsonObject | None:
    """What `measure` found on this machine before; None if it was never called.

    Raises:
        UserError: the file is damaged.
    """
    path = remembered_at()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"--calibrate: {path} cannot be read ({error}); measure again") from error
    rates = data.get("rates") if isinstance(data, dict) else None
    numbers = [rates.get(name) for name in RATES] if isinstance(rates, dict) else [None]
    flops = data.get("flops") if isinstance(data, dict) else None
    numbers += list(flops.values()) if isinstance(flops, dict) and flops else [None]
    if not all(isinstance(number, (int, float)) and number > 0 for number in numbers):
        raise UserError(f"--calibrate: {path} is damaged; measure again")
    return dict(data)


def with_rates(machine: Machine, data: JsonObject, dtype: str) -> Machine:
    """``machine`` with measured rates.

    Args:
        machine: hosts, ranks and memory.
        data: from `measure` or `remembered`.
        dtype: of the forward passes.
    """
    origin = f"measured on {data['host']}, {data['date']}, {data['threads']} thread(s), {data['device']}"
    rates = {name: data["rates"][name] for name in RATES}
    gpu = not str(data["device"]).startswith("CPU")
    return replace(machine, flops=data["flops"][dtype], gpu=gpu, origin=origin, **rates)


def measure() -> JsonObject:
    """Measure this machine. Takes about ten seconds, some of them for imports.

    Returns:
        ``flops`` by dtype, ``rates`` (see `Machine`), and where and when they are from.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.no_grad():
        return {
            "host": platform.node(),
            "date": time.strftime("%Y-%m-%d"),
            "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, torch {torch.__version__}",
            "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0],
            "flops": {dtype: _flops(device, dtype) for dtype in ("float32", "bfloat16", "float16")},
            "rates": {"bandwidth": _bandwidth(device), **_kernel(device), "call": _call(device), **_reduce()},
        }


def remember(data: JsonObject) -> None:
    """Write down what `measure` found, for later plans on this machine."""
    path = remembered_at()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(data, indent=1).encode())
    except OSError as error:
        raise UserError(f"--calibrate: cannot write {path} ({error}); MEZO_DIST_CACHE names another folder") from error


def _seconds(work: Callable[[], object], device: str) -> float:
    """The fastest of some runs, after two that warm up: what the machine does when nothing disturbs it. Of short work
    on a GPU much is told to it at a time, or the way to it would be measured."""
    import torch

    times, together = [], 1
    for run in range(REPEATS + 2):
        began = time.perf_counter()
        for _ in range(together):
            work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / together)
        if run == 1 and device == "cuda":
            together = max(1, min(50, int(0.01 / times[-1])))
    return min(times[2:])


def _flops(device: str, dtype: str) -> float:
    """Operations per second of the six linear layers of a block: 768 features, four times as many inside, 256 tokens
    (on a GPU: 4,096 features and tokens)."""
    import torch

    n, tokens = (4096, 4096) if device == "cuda" else (768, 256)
    kind = getattr(torch, dtype)
    x, inside = (torch.randn(tokens, width, device=device).to(kind) for width in (n, 4 * n))
    square, up, down = (torch.randn(*shape, device=device).to(kind) for shape in ((n, n), (4 * n, n), (n, 4 * n)))

    def block() -> None:
        for _ in range(4):
            torch.nn.functional.linear(x, square)
        torch.nn.functional.linear(x, up)
        torch.nn.functional.linear(inside, down)

    return 2 * tokens * 12 * n * n / _seconds(block, device)


def _bandwidth(device: str) -> float:
    """Bytes per second that a copy of 128 MiB (on a GPU: 1 GiB, far more than its caches hold) reads and writes."""
    import torch

    source = torch.zeros(2**28 if device == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)


def _kernel(device: str) -> dict[str, float]:
    """Seconds per element to generate a direction, and to write a variant: from one direction written once and four
    times, on weights of 4 million elements (on a GPU: 268 million, in bf16)."""
    import torch

    from mezo_dist.directions.combination import Combination
    from mezo_dist.directions.law import Law

    size, dtype = (2**28, torch.bfloat16) if device == "cuda" else (2**22, torch.float32)
    weight, law = torch.zeros(size, device=device, dtype=dtype), Law("gaussian")
    outputs = [torch.empty_like(weight) for _ in range(4)]
    shifts = [Combination.single(1, c) for c in (1.0, -1.0, 0.5, -0.5)]

    def write(n: int) -> float:
        add = lambda: law.add(weight, shifts[:n], outputs[:n], param_id=1, shape=weight.shape)  # noqa: E731
        return _seconds(add, device) / weight.numel()

    once, often = write(1), write(4)
    step = max((often - once) / 3, 1e-15)
    return {"generate": max(once - step, 1e-15), "write": step}


def _call(device: str) -> float:
    """Seconds that a pass takes per module beyond its arithmetic: a step in lock step on a Llama of hardly any size."""
    import torch
    import transformers

    from mezo_dist.algorithms.base import Variant
    from mezo_dist.directions.combination import Combination
    from mezo_dist.directions.law import Law
    from mezo_dist.engines.engine import Engine

    config = transformers.LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=4,
                                      num_attention_heads=2, use_cache=False)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        engine = Engine(transformers.LlamaForCausalLM(config).to(device), Law("gaussian"))
    modules = sum(len(unit.hooked_modules) for unit in engine.layout.units)
    items = [torch.ones(1, 4, dtype=torch.long, device=device)] * 4
    shift = Combination.single(1, 1e-3)

    def step() -> None:
        engine.evaluate([Variant(shift), Variant(-shift)], items, lambda model, ids: model(input_ids=ids).logits[0, 0])

    return _seconds(step, device) / (modules * 2 * len(items))


def _reduce() -> dict[str, float]:
    """Seconds of a hop, and bytes per second between two processes of this host: over gloo and loopback, from
    all-reduces of 256 bytes, and all-gathers of 8 MiB from each."""
    from torch.multiprocessing.spawn import spawn

    with tempfile.TemporaryDirectory() as folder:
        spawn(_meet, (folder,), nprocs=2)
        figures = json.loads((Path(folder) / "figures.json").read_text())
    return {"latency": float(figures["latency"]), "host_link": float(figures["host_link"])}


def _meet(rank: int, folder: str) -> None:
    """One of two processes that time collectives.

    Args:
        rank: 0 or 1.
        folder: where they meet, and rank 0 writes what it measured.
    """
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    words, part = torch.zeros(32, dtype=torch.int64), torch.zeros(2**21)
    whole = [torch.empty_like(part) for _ in range(2)]

    def many() -> None:
        for _ in range(50):
            dist.all_reduce(words)

    latency = _seconds(many, "cpu") / 50 / 2  # two hops
    rate = part.nbytes / _seconds(lambda: dist.all_gather(whole, part), "cpu")
    if rank == 0:
        (Path(folder) / "figures.json").write_text(json.dumps({"latency": latency, "host_link": rate}))
    dist.destroy_process_group()
