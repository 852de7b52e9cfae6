"""The options of ``mezo-dist plan``. Nothing is imported here but argparse, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse

EPILOG = """\
MODEL is a named shape (opt-125m to opt-175b, llama-3-8b, -70b, -405b, qwen3-0.6b to -235b-a22b, mixtral-8x7b, -8x22b),
a folder or config.json, a hub name, or the config of a run. No weights are read. Figures are per rank and per step.
"""


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.usage = "mezo-dist plan [--help] [OPTION ...] [MODEL|CONFIG]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    machine = add_question(parser)
    machine.add_argument("--hosts", type=int, metavar="N", default=1, help="number of hosts; 1 by default")
    answer = parser.add_argument_group("the answer")
    answer.add_argument("--find", choices=["model", "micro-batch", "context"], help="the largest that fits")
    answer.add_argument("--json", action="store_true", help="one JSON object in place of tables")


def add_question(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Declare the options that say what runs on which machines, but for their number; the group of the machines."""
    parser.add_argument("model", nargs="?", metavar="MODEL|CONFIG", help="what to run")
    machine = parser.add_argument_group("machines")
    machine.add_argument(
        "--ranks-per-host", type=int, metavar="N", default=1, help="processes of each (one per GPU); 1 by default"
    )
    machine.add_argument(
        "--memory", metavar="BYTES", default="80GB", help="that a rank has for itself; 80GB by default"
    )
    machine.add_argument("--link", metavar="RATE", help="between hosts, one way, as in 100gbit (the default)")
    machine.add_argument("--host-link", metavar="RATE", help="between two ranks of a host, as in 300GB/s")
    machine.add_argument("--flops", metavar="RATE", help="that a rank's matrix products reach, as in 400tflops")
    machine.add_argument("--bandwidth", metavar="RATE", help="of a rank's memory, as in 2TB/s")
    machine.add_argument(
        "--calibrate", action="store_true", help="measure the rates of this machine, and remember them"
    )
    machine.add_argument(
        "--rates",
        choices=["here", "h100", "h200"],
        help="measured ones of this machine (if there are), assumed ones, or those of an H200 that were measured",
    )
    run = parser.add_argument_group("the run; a config's own settings count where one is given")
    run.add_argument("--layout", nargs="+", choices=["replicated", "fsdp", "zero"], metavar="NAME",
                     help="replicated, fsdp, zero; all by default")  # fmt: skip
    run.add_argument("--algorithm", nargs="+", choices=["mezo", "mezo-svrg"], metavar="NAME",
                     help="mezo, mezo-svrg; both by default")  # fmt: skip
    run.add_argument("--anchor", choices=["auto", "stored", "replay"], help="of mezo-svrg")
    run.add_argument("--directions", type=int, metavar="N", help="per step")
    run.add_argument("--one-sided", action="store_true", default=None, help="n + 1 passes for n directions")
    run.add_argument("--per-sample", action="store_true", default=None, help="a direction per sample (law lowrank)")
    run.add_argument("--batch", type=int, metavar="N", help="samples of a minibatch; 16 by default")
    run.add_argument("--full", type=int, metavar="N", help="samples of a full batch; 512 by default")
    run.add_argument("--micro-batch", type=int, metavar="N", help="samples of a forward pass; 8 by default")
    run.add_argument(
        "--width", type=int, metavar="N", help="micro-batches in lock step; what the engine chooses by default"
    )
    run.add_argument("--tokens", type=int, metavar="N", help="of a sample, padding included; 512 by default")
    run.add_argument("--reads", choices=["labels", "tokens", "texts"],
                     help="logits of label words (the default), of target tokens, or written texts")  # fmt: skip
    run.add_argument(
        "--targets", type=int, metavar="N", help="target tokens of a sample, or tokens to write; 128 by default"
    )
    run.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the weights; bfloat16 by default")
    run.add_argument("--compute", choices=["float32", "bfloat16", "float16"], help="of the passes; that of the weights")
    run.add_argument(
        "--gather", choices=["float32", "bfloat16", "float16"], help="of gathered weights; see layout.gather"
    )
    run.add_argument("--prefetch", action="store_true", default=None, help="gather the next block while one computes")
    run.add_argument("--offload", action="store_true", default=None, help="fsdp: shards in host memory")
    run.add_argument("--trainable", nargs="+", metavar="PATTERN", help="weights that are trained; all by default")
    return machine
