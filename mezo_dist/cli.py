"""The command line: ``mezo-dist COMMAND``, the same as ``python -m mezo_dist COMMAND``.

Nothing heavy is imported before the arguments are known to be good: ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import mezo_dist
from mezo_dist import commands
from mezo_dist.engines.malloc import ask_for_huge_pages
from mezo_dist.errors import LostRankError, Stopped, UserError, printable
from mezo_dist.planning.options import add_plan
from mezo_dist.simulation.options import add_simulate
from mezo_dist.studies.options import add_study

SETTING = re.compile(r"--[a-z_]+\.[a-z_.]+(=|$)")
MAX_SECONDS = 10**6  # far below what overflows in torch's timers


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: what stands after ``mezo-dist``; None: those of this process.

    Returns:
        The exit status: 0, that of the error (see `UserError`), or that of an orderly stop (see `Stopped`).
    """
    parser = _parser()
    known, extra = parser.parse_known_args(arguments)
    if known.command in (commands.train, commands.show_task):  # settings
        known.arguments = extra
    elif extra:
        is_setting = any(SETTING.match(argument) for argument in extra)
        hint = "; settings go with train, or into the config" if is_setting else ""
        parser.error(f"unknown arguments: {' '.join(extra)}{hint}")
    ask_for_huge_pages()
    try:
        known.command(known)
    except Stopped as stop:
        print(f"mezo-dist: {_indented(str(stop))}", file=sys.stderr)
        return stop.status
    except (UserError, LostRankError) as error:
        print(f"mezo-dist{_rank_in_words()}: error: {_indented(str(error))}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print(f"mezo-dist: stopped{getattr(known, 'advice', '')}", file=sys.stderr)
        return 130
    return 0


def _indented(message: str) -> str:
    """A message that may name what a file holds: no line of it can pass for one of another origin."""
    return printable(message, keep="\n").replace("\n", "\n  ")


def _rank_in_words() -> str:
    """`` (rank 1)``; empty without a launcher."""
    from mezo_dist.distributed import environment

    try:
        cluster = environment.discover(os.environ)
        rank = str(cluster.rank) if cluster.launcher else ""
    except UserError:  # what the launcher said is what is wrong
        rank = os.environ.get("RANK", "")
    return f" (rank {rank})" if rank else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mezo-dist",
        description="Fine-tune language models with forward passes only (MeZO, MeZO-SVRG), on one process or many.",
        epilog="Many processes: torchrun --nproc-per-node 2 -m -- mezo_dist train CONFIG",
    )
    parser.add_argument("--version", action="version", version=f"mezo_dist {mezo_dist.__version__}")
    # DeepSpeed's launcher puts this option before the command. It is in the environment, too, and read there.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    _add_init(subparsers.add_parser("init", help="write a config and a task file for a model and a data set"))

    # No arguments are declared: `commands.train` gets them as they are, for settings may stand there in several forms.
    train = subparsers.add_parser("train", help="fine-tune as a config file says", add_help=False)
    train.set_defaults(command=commands.train)

    evaluate = subparsers.add_parser("evaluate", help="loss and metric of a run's model on a split")
    _add_run(evaluate, commands.evaluate)
    evaluate.add_argument(
        "--split", choices=["train", "validation", "test"], default="test", help="split of the task; test by default"
    )
    evaluate.add_argument(
        "--rewards",
        action="store_true",
        help="of a run that was trained on rewards: start the program that its config names, and show them",
    )

    export = subparsers.add_parser("export", help="write a run's model as a Hugging Face folder")
    _add_run(export, commands.export)
    export.add_argument("folder", type=Path, metavar="FOLDER", help="where to write; must not exist")

    replay = subparsers.add_parser(
        "replay", help="rebuild a run's model from base and trajectory alone, verify it, and export it if wanted"
    )
    _add_run(replay, commands.replay)
    replay.add_argument("--export", type=Path, metavar="FOLDER", help="where to write the model; must not exist")

    _add_doctor(subparsers.add_parser("doctor", help="say why a job does not start; start it the same way as the job"))

    plan = subparsers.add_parser("plan", help="memory, traffic and time of a run, before anything is loaded or rented")
    add_plan(plan)
    plan.set_defaults(command=commands.plan)

    simulating = subparsers.add_parser(
        "simulate", help="what a run gets done in a week on hosts that fail, up to 10,000"
    )
    add_simulate(simulating)
    simulating.set_defaults(command=commands.simulate)

    study = subparsers.add_parser("study", help="run a matrix of cases through the launchers; tables and plots")
    add_study(study)
    study.set_defaults(command=commands.study)

    tasks = subparsers.add_parser("tasks", help="list the tasks that ship, or show what one looks like to a model")
    _add_tasks(tasks)

    completion = subparsers.add_parser("completion", help="the script by which a shell completes commands and settings")
    completion.add_argument("shell", choices=["bash", "zsh", "fish"], help="as in: source <(mezo-dist completion bash)")
    completion.set_defaults(command=_completion)

    _add_report(subparsers.add_parser("report", help="one HTML page about a run, or several, from their files"))
    return parser


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder; several are compared")
    parser.add_argument(
        "--to",
        type=Path,
        metavar="FILE",
        help="where to write; RUN/report.html by default, and report.html here for several runs",
    )
    parser.set_defaults(command=commands.report)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most {MAX_SECONDS:,}, not {text}")
    return seconds


def _add_run(parser: argparse.ArgumentParser, command: Callable[[argparse.Namespace], None]) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--step", type=int, metavar="N", help="number of steps to apply (0: the base model); all by default"
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the model's own code, if the run did (model.trust_remote_code)",
    )
    parser.set_defaults(command=command)


def _add_init(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="a file, a folder of files named after splits, or a hub name")
    parser.add_argument("--model", required=True, help="a model folder, hub name or demo model")
    parser.add_argument("--to", type=Path, default=Path(), metavar="FOLDER", help="where to write; here by default")
    parser.add_argument("--name", help="of the task; that of the data by default")
    parser.add_argument("--subset", help="configuration of a hub data set")
    parser.set_defaults(command=commands.init)


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE", help="files that must be the same on all ranks")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(),
        metavar="FOLDER",
        help="folder that all ranks must see; this one by default",
    )
    parser.add_argument(
        "--timeout", type=_seconds, default=30.0, metavar="S", help="seconds to wait for ranks that do not answer"
    )
    parser.set_defaults(command=commands.doctor)


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=commands.list_tasks)
    actions = parser.add_subparsers(metavar="show")
    show = actions.add_parser(
        "show",
        help="rendered samples of a task, as a model gets them",
        epilog="More settings may follow, as in --task.data=rows.jsonl",
    )
    show.add_argument("task", metavar="TASK", help="a task that ships, or a task file")
    show.add_argument("--model", required=True, help="a model folder, hub name or demo model")
    show.add_argument("--rows", type=int, default=2, metavar="N", help="training samples to show; 2 by default")
    show.set_defaults(command=commands.show_task)


def _completion(arguments: argparse.Namespace) -> None:
    from mezo_dist.config.completion import script

    print(script(arguments.shell, _parser()), end="")
