"""What a direction costs: `mezo_dist.directions.add` on the parameters of OPT-125M's shape (random weights).

    python examples/benchmarks/directions.py                  # this machine's CPU
    python examples/benchmarks/directions.py --device cuda

Two yardsticks: the textbook way, which fills a tensor with `normal_` and adds it, and a plain copy of the same weights.
All contenders run one after the other in every round, so that a busy machine slows all of them; figures are medians
over the rounds, "x textbook" is the median of the ratios within a round. The textbook's scratch tensor is allocated
once, which flatters it. GB/s counts what must be moved: every input read once and every output written once.

With ``--json`` the last line is an object with the speed-ups over the textbook (fp32, in place, all threads).
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import harness
import torch
from torch import Tensor

from mezo_dist.directions.add import add, advance
from mezo_dist.directions.bits import GAUSSIAN, RADEMACHER, BitLayout
from mezo_dist.directions.combination import Combination

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MINUS, PLUS = Combination.single(1, -1e-3), Combination.single(1, 1e-3)
SHIFT = Combination.single(2, 1e-5)
NUM_UPDATES = 8
FAST = {"rounds": 2, "dtypes": ["fp32"]}
HIDDEN, LAYERS = 768, 12


def shapes_of_opt_125m() -> Iterator[tuple[int, ...]]:
    """Tables of tokens and positions, then attention, feed-forward and norms of every layer, and the last norm."""
    yield from ((50272, HIDDEN), (2050, HIDDEN))
    for _ in range(LAYERS):
        yield from [(HIDDEN, HIDDEN), (HIDDEN,)] * 4
        yield from ((4 * HIDDEN, HIDDEN), (4 * HIDDEN,), (HIDDEN, 4 * HIDDEN), (HIDDEN,))
        yield from [(HIDDEN,)] * 4
    yield from [(HIDDEN,)] * 2


@dataclass(frozen=True)
class Contender:
    """Something to be timed: ``run`` handles one parameter; ``moved`` counts its reads and writes of an element."""

    name: str
    run: Callable[[int, Tensor], None]
    moved: int


class Scratch:
    """Output tensors for the largest parameter, used again for every parameter, as the engines do."""

    def __init__(self, size: int, dtype: torch.dtype, device: str) -> None:
        self._buffers = [torch.empty(size, dtype=dtype, device=device) for _ in range(4)]

    def like(self, weight: Tensor, count: int) -> list[Tensor]:
        return [buffer[: weight.numel()].view(weight.shape) for buffer in self._buffers[:count]]


def contenders(dtype: torch.dtype, scratch: Scratch) -> list[Contender]:
    """The yardsticks first: textbook, copy."""

    def copy(_: int, weight: Tensor) -> None:
        scratch.like(weight, 1)[0].copy_(weight)

    def textbook(_: int, weight: Tensor) -> None:
        (z,) = scratch.like(weight, 1)
        weight.add_(z.normal_(), alpha=1e-3)

    def in_place(bits: BitLayout, rounding_seed: int | None = None) -> Callable[[int, Tensor], None]:
        return lambda i, weight: add(weight, [PLUS], [weight], param_id=i, bits=bits, rounding_seed=rounding_seed)

    def variants(bits: BitLayout, sums: list[Combination]) -> Callable[[int, Tensor], None]:
        return lambda i, weight: add(weight, sums, scratch.like(weight, len(sums)), param_id=i, bits=bits)

    def updates(bits: BitLayout, rounding_seed: int | None = None) -> Callable[[int, Tensor], None]:
        return lambda i, weight: advance(weight, [(PLUS, rounding_seed)] * NUM_UPDATES, param_id=i, bits=bits)

    entrants = [Contender("textbook: normal_, add_", textbook, 2), Contender("plain copy", copy, 2)]
    for bits in (GAUSSIAN, RADEMACHER):
        entrants += [
            Contender(f"{bits.name}, in place", in_place(bits), 2),
            Contender(f"{bits.name}, 2 variants", variants(bits, [PLUS, MINUS]), 3),
            Contender(
                f"{bits.name}, 4 variants of 2 directions",
                variants(bits, [PLUS, MINUS, PLUS + SHIFT, MINUS + SHIFT]),
                5,
            ),
            Contender(f"{bits.name}, {NUM_UPDATES} updates in one pass", updates(bits), 2),
        ]
        if dtype == torch.bfloat16:
            entrants.append(
                Contender(f"{bits.name}, in place, stochastic rounding", in_place(bits, rounding_seed=3), 2)
            )
    return entrants


def seconds(contender: Contender, weights: list[Tensor], device: str) -> float:
    """Wall time of one pass over all parameters."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for i, weight in enumerate(weights):
        contender.run(i, weight)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(dtype: str, threads: int, rounds: int, device: str) -> dict[str, float]:
    """Print one table; returns the speed-up of each contender over the textbook."""
    torch.set_num_threads(threads)
    weights = [torch.randn(shape, device=device).to(DTYPES[dtype]) for shape in shapes_of_opt_125m()]
    count = sum(weight.numel() for weight in weights)
    entrants = contenders(DTYPES[dtype], Scratch(max(w.numel() for w in weights), DTYPES[dtype], device))
    for contender in entrants:
        seconds(contender, weights, device)  # compile, touch the memory
    times = [[seconds(contender, weights, device) for contender in entrants] for _ in range(rounds)]
    print(f"\n{dtype}, {device}" + (f", {threads} threads" if device == "cpu" else "") + f", {count:,} elements")
    print(f"{'':46}{'ns/element':>12}{'x textbook':>12}{'x copy time':>13}{'GB/s':>8}")
    speedups = {}
    for k, contender in enumerate(entrants):
        nanoseconds = statistics.median(row[k] for row in times) / count * 1e9
        speedups[contender.name] = statistics.median(row[0] / row[k] for row in times)
        slower_than_copy = statistics.median(row[k] / row[1] for row in times)
        bandwidth = contender.moved * weights[0].element_size() / nanoseconds
        print(
            f"{contender.name:46}{nanoseconds:12.3f}{speedups[contender.name]:12.1f}"
            f"{slower_than_copy:13.2f}{bandwidth:8.1f}"
        )
    return speedups


def main() -> None:
    parser = harness.parser(__doc__, whole_doc=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()], help="CPU threads")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = harness.parse(parser, FAST)
    facts = harness.begin()
    logging.basicConfig(format="%(message)s")
    result: dict[str, float] = {}
    for threads in arguments.threads if arguments.device == "cpu" else arguments.threads[:1]:
        for dtype in dict.fromkeys(["fp32", *arguments.dtypes]) if arguments.json else arguments.dtypes:
            speedups = measure(dtype, threads, arguments.rounds, arguments.device)
            if dtype == "fp32" and threads == max(arguments.threads):
                for bits in (GAUSSIAN, RADEMACHER):
                    result[f"{bits.name}_speedup"] = round(speedups[f"{bits.name}, in place"], 2)
    harness.end(arguments, facts, result)


if __name__ == "__main__":
    main()
