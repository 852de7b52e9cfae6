"""What it costs to write texts under both signs of a direction, against ``model.generate`` of the same batch.

    python examples/benchmarks/generation.py [--shape smollm2-135m] [--samples 16] [--prompt 64] [--new 64]
                                             [--repeats 5] [--threads 2]

Written under law lowrank, both signs cannot cost less than twice what ``generate`` costs once. Contenders run in turn
in one process, on the same model with random weights and the same random prompts, and every figure is the median over
rounds of (contender / ``generate`` of the same round); no text ends early. ``lock step`` makes the weights anew for
every token: it is measured on four tokens, and its seconds per token are compared.

Peak memory is that of a process of its own for each contender (Linux: VmHWM since the model was loaded), over that of
``generate``.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mezo_dist.algorithms.base import Variant
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.law import Law
from mezo_dist.engines.decoding import Way, evaluate_decoding
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.malloc import ask_for_huge_pages, tune_malloc
from mezo_dist.tasks.generation.decode import Decoding, decode

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 2, "vocab_size": 512},
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                     "num_key_value_heads": 3, "vocab_size": 49152},
    "smollm2-360m": {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
                     "num_key_value_heads": 5, "vocab_size": 49152},
}  # fmt: skip
BOTH = [Variant(Combination.single(1, 1e-3)), Variant(Combination.single(1, -1e-3))]
LOCK_STEP_TOKENS = 4
GIB = 2**30
FAST = {"shape": "tiny", "samples": 4, "prompt": 16, "new": 8, "repeats": 1}


@dataclass(frozen=True)
class Prompts:
    """One micro-batch."""

    slots: tuple[int, ...]
    inputs: dict[str, Tensor]


def make_model(shape: str) -> LlamaForCausalLM:
    """Llama's architecture with random weights, fp32."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPES[shape], tie_word_embeddings=True)).eval()


def contenders(model: LlamaForCausalLM, prompts: Prompts, new: int) -> dict[str, Callable[[], Any]]:
    """What is compared, by name."""

    def write(tokens: int) -> Callable[[nn.Module, Prompts], Any]:
        return lambda on, item: decode(on, item.inputs, Decoding(tokens, (), 0))

    def both(law: str, way: Way, tokens: int = new) -> Callable[[], Any]:
        engine = Engine(model, Law(law))
        return lambda: list(evaluate_decoding(engine, way, BOTH, [prompts], write(tokens)))

    def generate() -> Any:
        with torch.no_grad():
            return model.generate(
                **prompts.inputs, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
            )

    return {
        "generate": generate,
        "lowrank, activations": both("lowrank", "activations"),
        "gaussian, copies": both("gaussian", "copies"),
        "gaussian, lock step": both("gaussian", "lock step", LOCK_STEP_TOKENS),
    }


def time_ratios(arguments: argparse.Namespace) -> dict[str, float]:
    """Medians over rounds of seconds per token over those of ``generate``, and tokens per second of ``generate``."""
    named = contenders(make_model(arguments.shape), make_prompts(arguments), arguments.new)
    rounds: list[dict[str, float]] = []
    for _ in range(arguments.repeats + 1):
        seconds = {}
        for name, run in named.items():
            began = time.perf_counter()
            run()
            tokens = LOCK_STEP_TOKENS if "lock step" in name else arguments.new
            seconds[name] = (time.perf_counter() - began) / tokens
        rounds.append(seconds)
    rounds = rounds[1:]  # the first one compiles kernels
    ratios = {
        name: statistics.median(seconds[name] / seconds["generate"] for seconds in rounds)
        for name in named
        if name != "generate"
    }
    speed = arguments.samples / statistics.median(seconds["generate"] for seconds in rounds)
    return {**ratios, "tokens_per_s": speed}


def make_prompts(arguments: argparse.Namespace) -> Prompts:
    """Random tokens."""
    generator = torch.Generator().manual_seed(0)
    size = (arguments.samples, arguments.prompt)
    ids = torch.randint(10, int(SHAPES[arguments.shape]["vocab_size"]), size, generator=generator)
    return Prompts(tuple(range(arguments.samples)), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def peak_gib(arguments: argparse.Namespace, name: str) -> float:
    """Peak memory of a process that does nothing else."""
    size = [f"--{key}={getattr(arguments, key)}" for key in ("shape", "samples", "prompt", "new", "threads")]
    command = [sys.executable, __file__, *size, f"--memory-of={name}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def print_peak(arguments: argparse.Namespace) -> None:
    """Run one contender; print its peak memory in GiB."""
    named = contenders(make_model(arguments.shape), make_prompts(arguments), arguments.new)
    Path("/proc/self/clear_refs").write_text("5")
    named[arguments.memory_of]()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(line.split()[1]) * 1024 / GIB)


def main() -> None:
    """Measure, print a table and, with --json, one last line for machines."""
    parser = harness.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens that are written")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = harness.parse(parser, FAST)
    ask_for_huge_pages()  # as the command line does
    tune_malloc(is_sharded=False)
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print_peak(arguments)
        return
    facts = harness.begin()
    times = time_ratios(arguments)
    base = peak_gib(arguments, "generate")
    names = [name for name in times if name != "tokens_per_s"]
    memory = {name: peak_gib(arguments, name) / base for name in names}
    print(
        f"{arguments.shape}, {arguments.samples} x ({arguments.prompt} + {arguments.new}) tokens, fp32, "
        f"{arguments.threads} threads, torch {torch.__version__}; generate: {times['tokens_per_s']:.0f} tokens/s, "
        f"{base:.2f} GiB"
    )
    print(f"{'both signs, over generate once':32}{'time':>8}{'memory':>8}")
    for name in names:
        print(f"{name:32}{times[name]:8.2f}{memory[name]:8.2f}")
    harness.end(arguments, facts, {"time": times, "memory": memory})


if __name__ == "__main__":
    main()
