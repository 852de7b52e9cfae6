"""What each command of ``mezo-dist`` does, given its arguments; `mezo_dist.cli` declares these.

What is heavy is imported inside of the functions.
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

from mezo_dist.engines.malloc import tune_malloc
from mezo_dist.errors import UserError, printable
from mezo_dist.imports import imports_at_once

if TYPE_CHECKING:
    from mezo_dist.distributed.communicator import Communicator
    from mezo_dist.objectives.calibration import Calibration
    from mezo_dist.runs.load import OpenedRun
    from mezo_dist.runs.model import LoadedModel

log = logging.getLogger("mezo_dist")


def list_tasks(_: argparse.Namespace) -> None:
    from mezo_dist.config import yaml_file
    from mezo_dist.config.shipped import shipped_tasks

    for name, path in shipped_tasks().items():
        task = yaml_file.read(path, "task file")
        data = " ".join(str(task[key]) for key in ("data", "subset") if task.get(key))
        print(f"{name:20} {task.get('kind', 'classification'):16} {task.get('metric', ''):12} {data:36} {path}")


def show_task(arguments: argparse.Namespace) -> None:
    from mezo_dist.config import reader, yaml_file
    from mezo_dist.config.shipped import task_file

    settings = [f"model.name={arguments.model}", f"task={arguments.task}", "train.batch_size=1", "algorithm.lr=1"]
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


def init(arguments: argparse.Namespace) -> None:
    announce_imports()
    from mezo_dist.runs.starter import write_starter

    task, config = write_starter(
        arguments.data, arguments.model, arguments.to, name=arguments.name, subset=arguments.subset
    )
    print(f"wrote {task} and {config}; look at them, then:")
    print(f"  mezo-dist tasks show {task} --model={arguments.model}\n  mezo-dist train {config}")


def _help(given: Sequence[str]) -> None:
    """Explain the settings, or those of a section; with those of the algorithm that is given, or that the config
    names."""
    from mezo_dist.config import yaml_file
    from mezo_dist.config.help import help_text

    items = [part for item in given for part in (item.split("=", 1) if item.startswith("--help=") else [item])]
    names = [item.partition("=")[2] for item in items if item.removeprefix("--").startswith("algorithm.name=")]
    if not names and Path(items[0]).is_file():
        held = yaml_file.read(Path(items[0]), "config file").get("algorithm")
        names = [str(held["name"])] if isinstance(held, dict) and "name" in held else []
    after = items[items.index("-h" if "-h" in items else "--help") + 1 :]
    section = after[0] if after and not after[0].startswith("-") and "=" not in after[0] else None
    print(help_text(names[-1] if names else "mezo-svrg", section))


def train(arguments: argparse.Namespace) -> None:
    from mezo_dist.config import reader

    given = ["--output.if_exists=replace" if item == "--force-new" else item for item in arguments.arguments]
    if any(item in ("-h", "--help") or item.startswith("--help=") for item in given):
        _help(given)
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


def evaluate(arguments: argparse.Namespace) -> None:
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


def export(arguments: argparse.Namespace) -> None:
    _check_new(arguments.folder)

    def work(comm: Communicator) -> None:
        from mezo_dist.runs import load

        run = load.load_run(_opened(arguments, comm), comm)
        _write_model(run.loaded, arguments.folder, comm, run.calibration())

    _with_communicator(600.0, work)


def doctor(arguments: argparse.Namespace) -> None:
    from mezo_dist.distributed import doctor

    doctor.report(doctor.examine(arguments.files, arguments.folder.resolve(), arguments.timeout))


def plan(arguments: argparse.Namespace) -> None:
    from mezo_dist.planning import command

    command.run(arguments)


def simulate(arguments: argparse.Namespace) -> None:
    from mezo_dist.simulation import command

    command.run(arguments)


def study(arguments: argparse.Namespace) -> None:
    from mezo_dist.studies import command

    command.run(arguments)


def replay(arguments: argparse.Namespace) -> None:
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


def report(arguments: argparse.Namespace) -> None:
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


def announce_imports() -> None:
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
    announce_imports()
    with imports_at_once():
        from mezo_dist.distributed.connect import connect
        from mezo_dist.monitoring.console import configure_logging

    comm = connect(timeout_s, patience_s=patience_s)
    configure_logging(comm.rank, sys.stderr.isatty())
    with imports_at_once(for_good="mezo_dist.runs.build" not in sys.modules):  # of what all work needs
        import mezo_dist.runs.build  # noqa: F401
        from mezo_dist.models.load import import_models

        import_models()
    work(comm)
    comm.close()  # not after an error: other ranks may not be there to leave together
