"""The command line: ``mezo-dist COMMAND``, the same as ``python -m mezo_dist COMMAND``.

Nothing heavy is imported before the arguments are known to be good: ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import mezo_dist
from mezo_dist.errors import UserError

if TYPE_CHECKING:
    from mezo_dist.wire import Wire

USER_ERROR = 2
log = logging.getLogger("mezo_dist")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, or 2 for something that the user can mend."""
    parser = _parser()
    known, extra = parser.parse_known_args(arguments)
    if known.command is _train:
        known.arguments = extra
    elif extra:
        parser.error(f"unknown arguments: {' '.join(extra)}")
    try:
        known.command(known)
    except UserError as error:
        rank = os.environ.get("RANK")
        print(f"mezo-dist{f' (rank {rank})' if rank else ''}: error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("mezo-dist: stopped; go on with --output.if_exists=resume", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mezo-dist",
        description="Fine-tune language models with forward passes only (MeZO, MeZO-SVRG), on one process or many.",
        epilog="Many processes: torchrun --nproc-per-node 2 -m mezo_dist train CONFIG",
    )
    parser.add_argument("--version", action="version", version=f"mezo_dist {mezo_dist.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    # Without arguments of its own: `_train` gets all as they are, since settings may stand there in any form.
    train = commands.add_parser("train", help="fine-tune as a config file says", add_help=False)
    train.set_defaults(command=_train)

    evaluate = commands.add_parser("evaluate", help="loss and metric of a run's model on a split")
    evaluate.add_argument("run", type=Path, metavar="RUN", help="run folder")
    evaluate.add_argument("--split", choices=["train", "validation", "test"], default="test")
    evaluate.add_argument("--step", type=int, help="number of steps to apply (0: the base model); all by default")
    evaluate.set_defaults(command=_evaluate)

    export = commands.add_parser("export", help="write a run's model as a Hugging Face folder")
    export.add_argument("run", type=Path, metavar="RUN", help="run folder")
    export.add_argument("folder", type=Path, metavar="FOLDER", help="where to write; must not exist")
    export.add_argument("--step", type=int, help="number of steps to apply (0: the base model); all by default")
    export.set_defaults(command=_export)
    return parser


def _train(arguments: argparse.Namespace) -> None:
    from mezo_dist import config_reader

    given: list[str] = arguments.arguments
    if "-h" in given or "--help" in given:
        names = [item.partition("=")[2] for item in given if item.removeprefix("--").startswith("algorithm.name=")]
        print(config_reader.help_text(*names[-1:]))
        return
    if not given or given[0].startswith("-"):
        raise UserError("name a config file first, as in `mezo-dist train configs/quickstart.yaml --seed=1`")
    run_config = config_reader.load(given[0], given[1:])

    def job(wire: Wire) -> None:
        from mezo_dist import training

        training.train(run_config, wire)

    _with_wire(run_config.distributed.timeout_s, job)


def _evaluate(arguments: argparse.Namespace) -> None:
    def job(wire: Wire) -> None:
        from mezo_dist import training
        from mezo_dist.monitor import Monitor

        run, num_steps = training.rebuild(arguments.run, arguments.step, wire)
        with Monitor.open(None, is_main=wire.rank == 0, num_steps=num_steps) as monitor:
            training.score(run, arguments.split, monitor, num_steps)

    _with_wire(600.0, job)


def _export(arguments: argparse.Namespace) -> None:
    if arguments.folder.exists():
        raise UserError(f"{arguments.folder} exists; name a folder that does not")

    def job(wire: Wire) -> None:
        from mezo_dist import checkpoint, training

        run, _ = training.rebuild(arguments.run, arguments.step, wire)
        if wire.rank == 0:
            checkpoint.export(run.loaded.model, run.loaded.tokenizer, arguments.folder)
            print(f"wrote {arguments.folder}")
        wire.barrier()

    _with_wire(600.0, job)


def _with_wire(timeout_s: float, job: Callable[[Wire], None]) -> None:
    from mezo_dist import wire
    from mezo_dist.monitor import configure_logging

    connection = wire.connect(timeout_s)
    configure_logging(connection.rank, sys.stderr.isatty())
    job(connection)
    connection.close()  # not after an error: other ranks may not be there to leave together
