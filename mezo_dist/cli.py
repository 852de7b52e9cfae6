"""The command line: ``mezo-dist COMMAND``, the same as ``python -m mezo_dist COMMAND``.

Nothing heavy is imported before the arguments are known to be good: ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import mezo_dist
from mezo_dist.engines.malloc import ask_for_huge_pages, tune_malloc
from mezo_dist.errors import LostRankError, Stopped, UserError, printable
from mezo_dist.planning.options import add_plan
from mezo_dist.simulation.options import add_simulate
from mezo_dist.studies.options import add_study

if TYPE_CHECKING:
    from mezo_dist.distributed.communicator import Communicator
    from mezo_dist.objectives.calibration import Calibration
    from mezo_dist.runs.load import OpenedRun
    from mezo_dist.runs.model import LoadedModel

log = logging.getLogger("mezo_dist")
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
    if known.command in (_train, _show_task):  # settings
        known.arguments = extra
    elif extra:
        parser.error(f"unknown arguments: {' '.join(extra)}")
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
        epilog="Many processes: torchrun --nproc-per-node 2 -m mezo_dist train CONFIG",
    )
    parser.add_argument("--version", action="version", version=f"mezo_dist {mezo_dist.__version__}")
    # DeepSpeed's launcher puts this option before the command. It is in the environment, too, and read there.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    _add_init(commands.add_parser("init", help="write a config and a task file for a model and a data set"))

    # No arguments are declared: `_train` gets them as they are, since settings may stand there in several forms.
    train = commands.add_parser("train", help="fine-tune as a config file says", add_help=False)
    train.set_defaults(command=_train)

    evaluate = commands.add_parser("evaluate", help="loss and metric of a run's model on a split")
    _add_run(evaluate, _evaluate)
    evaluate.add_argument(
        "--split", choices=["train", "validation", "test"], default="test", help="split of the task; test by default"
    )
    evaluate.add_argument(
        "--rewards",
        action="store_true",
        help="of a run that was trained on rewards: start the program that its config names, and show them",
    )

    export = commands.add_parser("export", help="write a run's model as a Hugging Face folder")
    _add_run(export, _export)
    export.add_argument("folder", type=Path, metavar="FOLDER", help="where to write; must not exist")

    replay = commands.add_parser(
        "replay", help="rebuild a run's model from base and trajectory alone, verify it, and export it if wanted"
    )
    _add_run(replay, _replay)
    replay.add_argument("--export", type=Path, metavar="FOLDER", help="where to write the model; must not exist")

    _add_doctor(commands.add_parser("doctor", help="say why a job does not start; start it the same way as the job"))

    plan = commands.add_parser("plan", help="memory, traffic and time of a run, before anything is loaded or rented")
    add_plan(plan)
    plan.set_defaults(command=_plan)

    simulating = commands.add_parser("simulate", help="what a run gets done in a week on hosts that fail, up to 10,000")
    add_simulate(simulating)
    simulating.set_defaults(command=_simulate)

    study = commands.add_parser("study", help="run a matrix of cases through the launchers; tables and plots")
    add_study(study)
    study.set_defaults(command=_study)

    tasks = commands.add_parser("tasks", help="list the tasks that ship, or show what one looks like to a model")
    _add_tasks(tasks)

    completion = commands.add_parser("completion", help="the script by which a shell completes commands and settings")
    completion.add_argument("shell", choices=["bash", "zsh", "fish"], help="as in: source <(mezo-dist completion bash)")
    completion.set_defaults(command=_completion)

    report = commands.add_parser("report", help="one HTML page about a run, or several, from their files")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder; several are compared")
    report.add_argument(
        "--to",
        type=Path,
        metavar="FILE",
        help="where to write; RUN/report.html by default, and report.html here for several runs",
    )
    report.set_defaults(command=_report)
    return parser


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
    parser.set_defaults(command=_init)


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
    parser.set_defaults(command=_doctor)


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_list_tasks)
    actions = parser.add_subparsers(metavar="show")
    show = actions.add_parser(
        "show",
        help="rendered samples of a task, as a model gets them",
        epilog="More settings may follow, as in --task.data=rows.jsonl",
    )
    show.add_argument("task", metavar="TASK", help="a task that ships, or a task file")
    show.add_argument("--model", required=True, help="a model folder, hub name or demo model")
    show.add_argument("--rows", type=int, default=2, metavar="N", help="training samples to show; 2 by default")
    show.set_defaults(command=_show_task)


def _list_tasks(_: argparse.Namespace) -> None:
    from mezo_dist.config import yaml_file
    from mezo_dist.config.shipped import shipped_tasks

    for name, path in shipped_tasks().items():
        task = yaml_file.read(path, "task file")
        data = " ".join(str(task[key]) for key in ("data", "subset") if task.get(key))
        print(f"{name:20} {task.get('kind', 'classification'):16} {task.get('metric', ''):12} {data:36} {path}")


def _show_task(arguments: argparse.Namespace) -> None:
    from mezo_dist.config import reader, yaml_file
    from mezo_dist.config.shipped import task_file

    settings = [f"model.name={arguments.model}", f"task={arguments.task}", "train.batch_size=1"]
    if yaml_file.read(task_file(arguments.task, Path()), "task file").get("kind") == "regression":
        settings.append("model.head=classifier")  # nothing else will do
    config = reader.from_settings([*settings, *arguments.arguments])

    def work(comm: Communicator) -> None:
        from mezo_dist.runs.build import build_run
        from mezo_dist.runs.preview import preview

        lines = preview(build_run(config, comm), arguments.rows)
        if comm.rank == 0:
            print(printable("\n".join(lines), keep="\n"))

    _with_communicator(600.0, work)


def _init(arguments: argparse.Namespace) -> None:
    _announce_imports()
    from mezo_dist.runs.starter import write_starter

    task, config = write_starter(
        arguments.data, arguments.model, arguments.to, name=arguments.name, subset=arguments.subset
    )
    print(f"wrote {task} and {config}; look at them, then:")
    print(f"  mezo-dist tasks show {task} --model={arguments.model}\n  mezo-dist train {config}")


def _train(arguments: argparse.Namespace) -> None:
    from mezo_dist.config import reader
    from mezo_dist.config.help import help_text

    given = ["--output.if_exists=replace" if item == "--force-new" else item for item in arguments.arguments]
    if "-h" in given or "--help" in given:
        names = [item.partition("=")[2] for item in given if item.removeprefix("--").startswith("algorithm.name=")]
        after = given[given.index("-h" if "-h" in given else "--help") + 1 :]
        section = after[0] if after and not after[0].startswith("-") and "=" not in after[0] else None
        print(help_text(names[-1] if names else "mezo-svrg", section))
        return
    is_dry, given = "--dry-run" in given, [item for item in given if item != "--dry-run"]
    if not given or given[0].startswith("-"):
        raise UserError("name a config file first, as in `mezo-dist train configs/quickstart.yaml --seed=1`")
    config = reader.load(given[0], given[1:])
    tune_malloc(is_sharded=config.layout.name != "replicated")

    def work(comm: Communicator) -> None:
        from mezo_dist.runs import dry_run, training

        (dry_run.try_out if is_dry else training.train)(config, comm)

    if not is_dry:
        arguments.advice = "; go on with --output.if_exists=resume"  # where Ctrl-C stops it
    _with_communicator(config.distributed.timeout_s, work, config.distributed.patience_s)


def _evaluate(arguments: argparse.Namespace) -> None:
    def work(comm: Communicator) -> None:
        from mezo_dist.monitoring.console import Monitor
        from mezo_dist.objectives.rewards.judge import judging
        from mezo_dist.runs import load, looks

        opened = _opened(arguments, comm)
        is_rewarded = opened.config.train.objective == "reward"
        if arguments.rewards and not is_rewarded:
            raise UserError("--rewards: this run was not trained on rewards (train.objective); leave it out")
        with judging(opened.config, comm) if arguments.rewards else contextlib.nullcontext() as judge:
            run = load.load_run(opened, comm, judge)
            with Monitor.open(None, is_main=comm.rank == 0, num_steps=run.step) as monitor:
                calibration = looks.calibrate(run, monitor)
                looks.score(run, arguments.split, monitor, run.step, calibration)
                if is_rewarded and judge is None:
                    monitor.say(
                        "This run optimises a reward, which is not shown here: the loss is that of the texts in "
                        "task.completion (or of the prompts, without it). With --rewards the program that the run's "
                        "config names is started, and its rewards are shown."
                    )

    _with_communicator(600.0, work)


def _export(arguments: argparse.Namespace) -> None:
    _check_new(arguments.folder)

    def work(comm: Communicator) -> None:
        from mezo_dist.runs import load

        run = load.load_run(_opened(arguments, comm), comm)
        _write_model(run.loaded, arguments.folder, comm, run.calibration())

    _with_communicator(600.0, work)


def _doctor(arguments: argparse.Namespace) -> None:
    from mezo_dist.distributed import doctor

    doctor.report(doctor.examine(arguments.files, arguments.folder.resolve(), arguments.timeout))


def _plan(arguments: argparse.Namespace) -> None:
    from mezo_dist.planning import command

    command.run(arguments)


def _simulate(arguments: argparse.Namespace) -> None:
    from mezo_dist.simulation import command

    command.run(arguments)


def _study(arguments: argparse.Namespace) -> None:
    from mezo_dist.studies import command

    command.run(arguments)


def _replay(arguments: argparse.Namespace) -> None:
    if arguments.export is not None:
        _check_new(arguments.export)

    def work(comm: Communicator) -> None:
        from mezo_dist.runs import load

        loaded, about = load.audit(_opened(arguments, comm), comm)
        if comm.rank == 0:
            print(printable(about, keep="\n"))
        if arguments.export is not None:
            if loaded.config.train.calibrate:
                log.warning("%s: without data there are no offsets (train.calibrate); `export` has them", arguments.run)
            _write_model(loaded, arguments.export, comm)

    _with_communicator(600.0, work)


def _completion(arguments: argparse.Namespace) -> None:
    from mezo_dist.config.completion import script

    print(script(arguments.shell, _parser()), end="")


def _report(arguments: argparse.Namespace) -> None:
    from mezo_dist.monitoring import html_report

    folder = arguments.runs[0] if len(arguments.runs) == 1 else Path()
    path = arguments.to or folder / "report.html"
    html_report.write(arguments.runs, path)
    print(f"wrote {path}")


def _opened(arguments: argparse.Namespace, comm: Communicator) -> OpenedRun:
    """The run folder that a command names, read; malloc is set for the layout that its model will have."""
    from mezo_dist.runs import load

    opened = load.open_run(arguments.run, arguments.step, comm, trust_remote_code=arguments.trust_remote_code)
    tune_malloc(is_sharded=opened.config.layout.name != "replicated")
    return opened


def _check_new(folder: Path) -> None:
    if folder.exists():
        raise UserError(f"{folder} exists; name a folder that does not")


def _write_model(loaded: LoadedModel, folder: Path, comm: Communicator, calibration: Calibration | None = None) -> None:
    """Export a model. Collective.

    Args:
        loaded: the model.
        folder: where to.
        comm: the ranks.
        calibration: offsets that predictions need.
    """
    from mezo_dist.runs.export import export_model

    export_model(loaded.engine, loaded.pretrained.tokenizer, folder, comm, calibration=calibration)
    if comm.rank == 0:
        print(f"wrote {folder}")


def _announce_imports() -> None:
    """Say on rank 0 what the first silent seconds are for."""
    from mezo_dist.distributed import environment

    if {"torch", "transformers"} <= sys.modules.keys():
        return
    with contextlib.suppress(UserError):  # what the launcher said is wrong: `connect` says how
        if environment.discover(os.environ).rank == 0:
            print("mezo-dist: importing torch and transformers, which takes some seconds", file=sys.stderr, flush=True)


def _with_communicator(timeout_s: float, work: Callable[[Communicator], None], patience_s: float = 30.0) -> None:
    """Connect to the other ranks, and do something together.

    Args:
        timeout_s: seconds for every collective.
        work: what to do.
        patience_s: seconds of waiting after which a rank says for whom.
    """
    _announce_imports()
    from mezo_dist.distributed.connect import connect
    from mezo_dist.monitoring.console import configure_logging

    comm = connect(timeout_s, patience_s=patience_s)
    configure_logging(comm.rank, sys.stderr.isatty())
    work(comm)
    comm.close()  # not after an error: other ranks may not be there to leave together
