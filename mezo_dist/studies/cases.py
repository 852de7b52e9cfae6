"""The file of a study: its cases, and how often each is run."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from mezo_dist.config import yaml_file
from mezo_dist.errors import UserError
from mezo_dist.planning.named import NAMED

MOST_CASES = 1000
CHOICES = {
    "layout": ("replicated", "fsdp", "zero"),
    "algorithm": ("mezo", "mezo-svrg", "sgd", "adamw"),
    "dtype": ("float32", "bfloat16"),
}


@dataclass(frozen=True)
class Case:
    """One way to run. Every field may stand in ``base``, ``matrix`` or ``cases`` of a study."""

    model: str = "opt-125m"
    """A named shape (`mezo-dist plan` lists them), or a config.json, whose path starts at the folder of the study.
    Weights are random."""
    layers: int | None = None
    """Blocks to which the shape is cut. Null: all."""
    hosts: int = 1
    """More than one: virtual hosts, or nodes of SLURM."""
    ranks: int = 1
    """Processes on each host."""
    layout: str = "replicated"
    replicate: int = 1
    """Copies of the weights, for ``fsdp``."""
    algorithm: str = "mezo"
    directions: int = 1
    batch: int = 8
    """Samples of a step, over all ranks."""
    batch_per_rank: int | None = None
    """In place of ``batch``: it grows with the ranks."""
    full: int | None = None
    """Samples of a full batch of ``mezo-svrg``. Null: four minibatches."""
    micro_batch: int = 4
    width: int | None = None
    """Micro-batches in lock step. Null: what the engine chooses."""
    tokens: int = 32
    """Of every sample."""
    dtype: str = "float32"
    link: str | None = None
    """Rate of the virtual hosts' links, such as ``1mbit``. Null: no limit. Needs ``hosts`` above 1."""

    @property
    def all_ranks(self) -> int:
        """Processes on all hosts."""
        return self.hosts * self.ranks

    @property
    def samples(self) -> int:
        """Of a step."""
        return self.batch if self.batch_per_rank is None else self.batch_per_rank * self.all_ranks

    @property
    def full_samples(self) -> int:
        """Of a full batch."""
        return 4 * self.samples if self.full is None else self.full

    @property
    def key(self) -> str:
        """Names the case; another case has another one."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """For people: what is not as ever."""
        usual = Case()
        parts = [f"{name} {value}" for name, value in dataclasses.asdict(self).items()
                 if value != getattr(usual, name) or name == "model"]  # fmt: skip
        return ", ".join(parts).replace("model ", "", 1)


@dataclass(frozen=True)
class Study:
    """All cases of a file."""

    name: str
    cases: tuple[Case, ...]
    folder: Path
    """Of the file, at which paths start."""
    repeats: int = 3
    """How often each case is run, the cases taking turns."""
    steps: int = 8
    """Measured in each run, or a few more, up to whole cycles of the algorithm."""
    warmup: int = 2
    """Steps before them."""
    timeout: int = 1800
    """Seconds for a run."""
    x: str = "ranks"
    """The column that plots stand over."""


def read_study(path: Path) -> Study:
    """A study from its file.

    Raises:
        UserError: the file is none, or names something that does not exist or does not go together.
    """
    data = dict(yaml_file.read(path, "study"))
    base, matrix, more = (data.pop(name, default) for name, default in (("base", {}), ("matrix", {}), ("cases", [{}])))
    if not isinstance(base, dict) or not isinstance(matrix, dict) or not isinstance(more, list) or not more:
        raise UserError(f"{path}: base and matrix are settings by name, and cases a list of such")
    for name, values in matrix.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{path}: matrix.{name} is a list of values")
    cases = [
        _case({**base, **dict(zip(matrix, values, strict=True)), **_settings(one, path)}, path)
        for one in more
        for values in itertools.product(*matrix.values())
    ]
    if len(cases) > MOST_CASES:
        raise UserError(f"{path}: {len(cases)} cases; at most {MOST_CASES}")
    options = _checked(data, Study, path, leave_out=("cases", "folder"))
    options.setdefault("name", path.stem)
    study = Study(cases=tuple(dict.fromkeys(cases)), folder=path.resolve().parent, **options)
    if not re.fullmatch(r"[A-Za-z0-9._-]+", study.name):
        raise UserError(f"{path}: name: letters, digits, dots, dashes and underscores, not {study.name!r}")
    for name in ("repeats", "steps", "timeout"):
        if getattr(study, name) < 1:
            raise UserError(f"{path}: {name}: must be at least 1, not {getattr(study, name)}")
    return study


def _settings(one: object, path: Path) -> dict[str, Any]:
    if not isinstance(one, dict):
        raise UserError(f"{path}: cases: each is settings by name, not {yaml_file.shown(one)}")
    return one


def _case(data: Mapping[str, Any], path: Path) -> Case:
    """A checked case."""
    case = Case(**_checked(data, Case, path))
    for name, choices in CHOICES.items():
        if getattr(case, name) not in choices:
            raise UserError(f"{path}: {name}: one of {', '.join(choices)}, not {getattr(case, name)!r}")
    for field_ in dataclasses.fields(Case):
        value = getattr(case, field_.name)
        if isinstance(value, int) and value < 1:
            raise UserError(f"{path}: {field_.name}: must be at least 1, not {value}")
    if case.model not in NAMED and not _config_file(case, path.resolve().parent).is_file():
        raise UserError(f"{path}: model: {case.model!r} is no named shape, and no config.json lies there")
    problem = _contradiction(case)
    if problem:
        raise UserError(f"{path}: {problem}")
    return case


def _contradiction(case: Case) -> str:
    """What does not go together in a case; empty if all does."""
    if case.link is not None and case.hosts == 1:
        return "link: is between hosts, of which there is one (hosts)"
    if case.link is not None and not re.fullmatch(r"[1-9][0-9]*(kbit|mbit|gbit)", case.link):
        return f"link: a whole number and kbit, mbit or gbit, as in 1mbit, not {case.link!r}"
    if case.replicate > 1 and (case.layout != "fsdp" or case.all_ranks % case.replicate):
        return f"replicate: {case.replicate} copies need layout fsdp, and ranks that divide by it"
    if case.samples < case.micro_batch:
        return f"micro_batch: {case.micro_batch} samples are more than a step has ({case.samples})"
    if case.full_samples < case.samples:
        return f"full: {case.full} samples are fewer than a step has ({case.samples})"
    if case.tokens < 8:
        return f"tokens: at least 8, not {case.tokens}"
    return ""


def _config_file(case: Case, folder: Path) -> Path:
    path = folder / case.model
    return path / "config.json" if path.is_dir() else path


def model_config(case: Case, folder: Path) -> dict[str, Any]:
    """Contents of the config.json of a case's model.

    Args:
        case: the case.
        folder: of the study.

    Raises:
        UserError: the file cannot be read.
    """
    if case.model in NAMED:
        config = dict(NAMED[case.model])
    else:
        path = _config_file(case, folder)
        try:
            config = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UserError(f"model: {path} is no readable config.json ({error})") from error
    if case.layers is not None:
        config["num_hidden_layers"] = case.layers
    return config


def _checked(
    data: Mapping[str, Any], kind: type[Case] | type[Study], path: Path, leave_out: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Settings whose names and types are those of a dataclass.

    Args:
        data: the settings.
        kind: the dataclass.
        path: of the study, for messages.
        leave_out: fields that are no settings.
    """
    hints = get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind) if f.name not in leave_out]
    for name, value in data.items():
        if name not in names:
            raise UserError(f"{path}: {name!r} is no setting; there are {', '.join(names)}")
        allowed = get_args(hints[name]) if get_origin(hints[name]) is not None else (hints[name],)
        if type(value) not in allowed:
            raise UserError(f"{path}: {name}: {yaml_file.shown(value)} is not of the right type")
    return dict(data)
