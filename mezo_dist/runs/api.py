"""Runs from Python: what the commands `train`, `evaluate` and `export` do, as functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from mezo_dist.config import reader
from mezo_dist.config.schema import RunConfig
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.distributed.join import join
from mezo_dist.errors import UserError
from mezo_dist.json_types import Json
from mezo_dist.monitoring.console import Monitor
from mezo_dist.runs import load, looks, training
from mezo_dist.runs.build import Run
from mezo_dist.runs.export import export_model


def train(
    config: RunConfig | str | Path | Mapping[str, Json],
    overrides: Sequence[str] = (),
    *,
    comm: Communicator | None = None,
    quiet: bool = False,
) -> Path:
    """Train as a config says: evaluate, take the steps, evaluate again, export. Collective.

    The same as ``mezo-dist train CONFIG [OVERRIDES]``: the same checks, run folder, trajectory and bits.

    Args:
        config: path of a config file, a mapping in the shape of one, or settings that were read already.
        overrides: settings that count more than those of the file, such as ``"train.steps=10"``.
        comm: the processes; those of the launcher if None.
        quiet: show nothing on the console; files are written all the same.

    Returns:
        The run folder.

    Raises:
        UserError: bad settings or data, a run folder that is in use or holds another run, too many steps in a row
            without a finite loss.
        Stopped: SIGTERM came; the run can go on later.
        LostRankError: another process stopped or does not answer.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from mezo_dist import evaluate, load_run, train
    >>> from mezo_dist.testing import write_tiny_config
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run_folder = train(write_tiny_config(Path(folder)), ["train.steps=2"], quiet=True)
    ...     result = evaluate(load_run(run_folder), "validation")
    >>> sorted(result)
    ['accuracy', 'loss']
    """
    if isinstance(config, RunConfig):
        if overrides:
            raise UserError("overrides: go with a config file, not with settings that were read already")
        settings = config
    elif isinstance(config, Mapping):
        settings = reader.from_dict(config, "the config")
        if overrides:
            raise UserError("overrides: go with a config file; change the mapping instead")
    else:
        settings = reader.load(config, overrides)
    distributed = settings.distributed
    comm = comm or join(distributed.timeout_s, distributed.patience_s)
    return training.train(settings, comm, quiet=quiet)


def load_run(
    folder: str | Path,
    step: int | None = None,
    *,
    comm: Communicator | None = None,
    trust_remote_code: bool = False,
) -> Run:
    """The run in a folder, with the weights that it had after some of its steps. Collective.

    They are made of the base model and the trajectory, from the newest snapshot on if there is one.

    Args:
        folder: the run folder.
        step: number of steps; all of the run if None, and 0 for the base model.
        comm: the processes; those of the launcher if None.
        trust_remote_code: let the model's own code run, if the run did.

    Returns:
        The run: ``run.pretrained.model`` and ``.tokenizer`` are Hugging Face's, ``run.engine`` owns the weights,
        ``run.config`` has the settings, ``run.step`` the number of steps.

    Raises:
        UserError: no run there, damaged, shorter than asked for, or its base model, data or settings are not what they
            were.
    """
    comm = comm or join()
    return load.load_run(load.open_run(Path(folder), step, comm, trust_remote_code=trust_remote_code), comm)


def evaluate(
    run: Run | str | Path, split: Literal["train", "validation", "test"] = "test", *, comm: Communicator | None = None
) -> dict[str, float]:
    """Loss and metric of a run's model on one of its splits. Collective.

    Args:
        run: from `load_run`, or a run folder.
        split: which one.
        comm: the processes; those of the launcher if None.

    Returns:
        ``{"loss": ..., METRIC: ...}``, the metric by its name (``accuracy``, ``f1``, ...), and what else the kind of
        task reports.

    Raises:
        UserError: see `load_run`; or there is no such split.
    """
    loaded = run if isinstance(run, Run) else load_run(run, comm=comm)
    if split not in loaded.splits:
        raise UserError(f"split: {split!r} is not one of {', '.join(loaded.splits)}")
    with Monitor.open(None, is_main=False, num_steps=loaded.step) as quiet:
        return looks.score(loaded, split, quiet, loaded.step, looks.calibrate(loaded, quiet))


def export(run: Run | str | Path, folder: str | Path, *, comm: Communicator | None = None) -> Path:
    """Write a run's model as a folder that ``from_pretrained`` loads (of peft, if the run trained adapters).
    Collective.

    Args:
        run: from `load_run`, or a run folder.
        folder: must not exist; it appears under its name only when it is complete.
        comm: the processes; those of the launcher if None.

    Returns:
        The folder.

    Raises:
        UserError: see `load_run`; or the folder exists, or cannot be written.
    """
    target = Path(folder)
    if target.exists():
        raise UserError(f"{target} exists; name a folder that does not")
    loaded = run if isinstance(run, Run) else load_run(run, comm=comm)
    calibration = loaded.calibration()
    export_model(loaded.engine, loaded.pretrained.tokenizer, target, loaded.comm, calibration=calibration)
    return target
