"""Every setting of a run, typed and documented; read from YAML with command-line overrides (torch-free).

A config is strict: unknown keys, wrong types and contradictory settings are errors that name the key, before any
model is loaded. The resolved config (every setting, defaults included) is saved with the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

from mezo_dist.algorithms import ALGORITHMS
from mezo_dist.errors import UserError
from mezo_dist.tasks.task import Task

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ModelConfig:
    """Which model, with which head, in which precision."""

    name: str
    """Hub name, local folder, or ``demo:NAME`` (``python -m mezo_dist.assets`` lists those)."""
    revision: Union[str, None] = None  # noqa: UP007 (jsonargparse reads it on Python 3.10 too)
    """Branch, tag or commit of a hub model."""
    head: Literal["label-words", "classifier"] = "label-words"
    """``label-words``: the language-model head read at the task's label words (prompted, causal or masked);
    ``classifier``: a fresh classification head on unprompted text (the paper's main setting)."""
    kind: Literal["auto", "causal", "masked"] = "auto"
    """For ``label-words``: which head the model has; ``auto`` asks its config."""
    weights: Dtype = "float32"
    """dtype in which weights are kept and updated. bfloat16 weights are updated with stochastic rounding; float16
    ones are not offered for updates."""
    compute: Union[Dtype, None] = None  # noqa: UP007
    """dtype of the forward passes; that of the weights if null."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint. Off, as it is anybody's code."""

    def __post_init__(self) -> None:
        if self.weights == "float16":
            raise ValueError("model.weights: float16 weights lose small updates; use float32 or bfloat16")


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = 1000
    """Steps, anchor steps included."""
    batch_size: int = 16
    """Samples of a minibatch, over all ranks."""
    full_size: Union[int, None] = None  # noqa: UP007
    """Samples of a full batch (anchors): the first this many of the training split; all if null."""
    micro_batch: int = 8
    """Samples per forward pass. Micro-batches are the unit of work dealt to ranks, the same on any number of them."""
    width: int = 8
    """Micro-batches that go through the model in lock step, sharing one making of the variants' weights."""
    max_tokens: Union[int, None] = None  # noqa: UP007
    """Longest sequence; the model's window if null."""
    evaluate_every: int = 0
    """Steps between evaluations on the validation split; 0: only at the end."""
    max_skipped: int = 10
    """Steps in a row that may be skipped for a loss that is not finite before the run gives up."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch", "width", "max_skipped"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}: must be at least 1, not {getattr(self, name)}")
        if self.full_size is not None and self.full_size < self.batch_size:
            raise ValueError(f"train.full_size: {self.full_size} is less than train.batch_size {self.batch_size}")


@dataclass(frozen=True)
class OutputConfig:
    """The run folder."""

    dir: str = "runs/run"
    """Folder for the trajectory, logs, resolved config and results."""
    if_exists: Literal["error", "new", "resume"] = "error"
    """What to do when the folder holds a run: stop, use the next free name (run-2, run-3 ...), or go on with it."""
    export: bool = True
    """Write the fine-tuned model as a Hugging Face folder at the end."""
    test: bool = True
    """Evaluate on the test split before and after training."""


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes talk."""

    timeout_s: float = 600.0
    """Seconds after which a rank that does not answer ends the run."""


@dataclass(frozen=True)
class RunConfig:
    """A run of mezo_dist."""

    model: ModelConfig
    task: Task
    algorithm: Any
    """``name`` picks the algorithm; its other settings depend on which (see `mezo_dist.algorithms.ALGORITHMS`)."""
    law: Literal["gaussian", "rademacher", "lowrank"] = "gaussian"
    """Law of the directions. ``lowrank`` makes those of matrices products of thin gaussian factors, which allows
    ``algorithm.per_sample``."""
    rank: int = 1
    """Rank of low-rank directions."""
    engine: Literal["replicated"] = "replicated"
    """What owns the weights: ``replicated`` keeps a copy in every process."""
    seed: int = 0
    """Seed of directions and batch order."""
    train: TrainConfig = field(default_factory=TrainConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank: must be at least 1, not {self.rank}")
        if self.algorithm.per_sample and self.law != "lowrank":
            raise ValueError(f"algorithm.per_sample: a direction per sample needs law: lowrank, not {self.law}")

    def to_dict(self) -> dict[str, Any]:
        """Every setting as nested dicts of JSON types, in the shape of a config file."""
        data: dict[str, Any] = _plain(dataclasses.asdict(self))
        return data

    def digest(self) -> str:
        """SHA-256 of all settings except ``output`` and ``distributed``, which do not change what is computed."""
        data = self.to_dict()
        del data["output"], data["distributed"]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def parser(algorithm: str) -> ArgumentParser:
    """The parser of configs whose ``algorithm.name`` is ``algorithm``."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    made = jsonargparse.ArgumentParser(prog="mezo-dist train CONFIG", exit_on_error=False)
    made.add_argument("--config", action="config", help="YAML file with any of the settings below")
    made.add_class_arguments(RunConfig, skip={"algorithm"})
    made.add_class_arguments(ALGORITHMS[algorithm][0], "algorithm")
    return made


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config file and apply command-line overrides (``--train.steps=10`` or ``train.steps=10``).

    Raises:
        UserError: the file is missing or not YAML, a key is unknown, a value has the wrong type or contradicts
            another one. The message names the key.
    """
    arguments = [item if item.startswith("-") else f"--{item}" for item in overrides]
    data: Any = None
    if path is not None:
        if not Path(path).is_file():
            raise UserError(f"config file {path} does not exist")
        data = _read_yaml(Path(path))
        arguments = [f"--config={path}", *arguments]
    with _user_errors(f"{path} or the command line" if path is not None else "the command line"):
        made = parser(_algorithm_name(data, arguments))
        return _build(made, made.parse_args(arguments))


def from_dict(data: dict[str, Any], source: str) -> RunConfig:
    """`RunConfig.to_dict` read back; errors, the same as those of `load`, name ``source``."""
    with _user_errors(source):
        made = parser(_algorithm_name(data, ()))
        return _build(made, made.parse_object(data))


def _build(made: ArgumentParser, parsed: Namespace) -> RunConfig:
    values = made.instantiate(parsed)
    return RunConfig(**{field.name: values[field.name] for field in dataclasses.fields(RunConfig)})


def _read_yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} is not YAML: {error}") from error


@contextlib.contextmanager
def _user_errors(source: str) -> Iterator[None]:
    from jsonargparse import ArgumentError

    try:
        yield
    except (ArgumentError, ValueError, TypeError) as error:
        message = str(error)
        unknown = re.search(r"unrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'", message)
        if unknown:
            name = unknown[1] or unknown[2]
            near = difflib.get_close_matches(name, _all_keys(), n=1) or difflib.get_close_matches(
                name.rpartition(".")[2], [key.rpartition(".")[2] for key in _all_keys()], n=1
            )
            message = f"unknown setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        raise UserError(f"config ({source}): {message}\n`mezo-dist train --help` lists every setting") from error


def _all_keys() -> list[str]:
    """Names of all settings, of any algorithm."""
    return sorted({action.dest for name in ALGORITHMS for action in parser(name)._actions})


def _algorithm_name(data: Any, arguments: Sequence[str]) -> str:
    """``algorithm.name``, looked up before the parser is built, since the algorithm's settings depend on it."""
    section = data.get("algorithm") if isinstance(data, dict) else None
    name = section.get("name") if isinstance(section, dict) else None
    for flag, value in zip(arguments, [*arguments, ""][1:], strict=True):
        key, _, inline = flag.partition("=")
        if key == "--algorithm.name":
            name = inline or value
    known = ", ".join(sorted(ALGORITHMS))
    if name not in ALGORITHMS:
        raise ValueError(f"algorithm.name: {name!r} is not one of {known}" if name else f"set algorithm.name: {known}")
    return str(name)
