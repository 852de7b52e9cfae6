"""``mezo-dist plan``: options and config files to settings and machines, and these to an answer."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mezo_dist.algorithms import FirstOrder, Settings
from mezo_dist.algorithms.mezo import MeZO
from mezo_dist.algorithms.svrg import MeZOSVRG
from mezo_dist.config import reader
from mezo_dist.config.schema import RunConfig
from mezo_dist.errors import UserError
from mezo_dist.planning import report
from mezo_dist.planning.calibration import measure, remember, remembered, with_rates
from mezo_dist.planning.choice import find, layouts, plan
from mezo_dist.planning.first_order import first_order
from mezo_dist.planning.from_config import setting_of
from mezo_dist.planning.lookup import find_shape
from mezo_dist.planning.machine import Machine, as_h200, parse_bytes, parse_flops, parse_rate
from mezo_dist.planning.named import NAMED
from mezo_dist.planning.rounds import rounds_of
from mezo_dist.planning.setting import Setting
from mezo_dist.planning.shapes import ModelShape

RANDOM = "random:"
MOST_RANKS = 100_000
POSITIVE = ("hosts", "ranks_per_host", "directions", "batch", "full", "micro_batch", "width", "tokens", "targets")


@dataclass(frozen=True)
class Question:
    """What is asked, all of it checked."""

    shape: ModelShape | None
    settings: list[Setting]
    machine: Machine
    notes: list[str]
    """What people must know about the answer."""


def run(arguments: argparse.Namespace) -> None:
    """Answer on standard output.

    Raises:
        UserError: an option or file that is wrong, or contradicts another.
    """
    if arguments.calibrate:
        measured = measure()
        remember(measured)
        if arguments.model is None and arguments.find is None:
            print(json.dumps(measured, indent=1) if arguments.json else report.of_rates(measured))
            return
    question = question_of(arguments)
    shape, machine = question.shape, question.machine
    if arguments.find:
        what, best = find(arguments.find, shape, question.settings, machine)
        answer = report.answer_to_find(arguments.find, what, best, question.notes)
    else:
        assert shape is not None
        plans = [plan(shape, setting, machine) for setting in question.settings]
        others = first_order(shape, question.settings[0], machine)
        answer = report.answer(shape, plans, others, question.notes)
    print(json.dumps(answer.data) if arguments.json else report.text(answer))


def question_of(arguments: argparse.Namespace) -> Question:
    """The question that the command line asks.

    Raises:
        UserError: see `run`.
    """
    for name in POSITIVE:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1, not {value}")
    if arguments.model is None and arguments.find != "model":
        raise UserError(f"MODEL: name a model, a config, or one of the shapes {', '.join(NAMED)}")
    config = None
    name = arguments.model
    if name is not None and Path(name).suffix in (".yaml", ".yml"):
        config = reader.load(name)
        name = config.located().model.name.removeprefix(RANDOM)
    notes: list[str] = []
    shape = None if arguments.find == "model" else find_shape(name, notes)
    settings = _settings(arguments, config, notes)
    has_losses = config is None or config.train.objective == "loss"  # metrics and rewards are not looked back at
    if has_losses and any(_looks_back(setting.algorithm) for setting in settings):
        notes.append("lr: auto looks back every 8 to 16 steps, in two more forward passes of the minibatch (at most 6 "
                     "% of a run's), which are left out here")  # fmt: skip
    if shape is not None:
        if arguments.tokens is None and (config is None or config.train.max_tokens is None):
            settings = _assumed_tokens(settings, shape, config is not None, notes)
        trainable = tuple(arguments.trainable or (config.model.trainable if config else ("*",)))
        shape = shape.trained(trainable, config.model.freeze if config else ())
        _check_model(arguments, shape, trainable, settings)
        if config is not None and config.model.head == "classifier":
            notes.append("the fresh classification head is not counted")
    machine = _machine(arguments, settings[0])
    fewest = min(one.passes for setting in settings for one in rounds_of(setting, 1))
    if machine.ranks > fewest:
        notes.append(
            f"{machine.ranks - fewest:,} of the {machine.ranks:,} ranks only gather and wait in a step of {fewest} "
            "forward passes (micro-batches x variants); a smaller --micro-batch, a larger --batch or more --directions "
            "use them"
        )
    if shape is not None and shape.block_kind == "unknown":
        notes.append("what passes hold is an upper estimate for this architecture")
    settings = _on_layouts(arguments, settings, machine)
    _check_used(arguments, settings, notes)
    return Question(shape, settings, machine, notes)


def _looks_back(algorithm: object) -> bool:
    return isinstance(algorithm, MeZO | MeZOSVRG) and algorithm.lr == "auto" and algorithm.eta is None


def _assumed_tokens(
    settings: Sequence[Setting], shape: ModelShape, has_config: bool, notes: list[str]
) -> list[Setting]:
    """The settings with as many tokens, of those that nobody asked for, as the model has places for.

    Args:
        settings: ways to run, which differ by their algorithm.
        shape: the model.
        has_config: a config is planned; of its samples nothing is known.
        notes: gets a sentence that says how many, where that is fewer than usual, and for a config.
    """
    usual, reads, targets = settings[0].tokens, settings[0].reads, settings[0].targets
    places = shape.window - (targets if reads == "texts" else 0)
    if places < 1:
        return list(settings)  # which is refused
    tokens = min(usual, places)
    why = f", which fill the window of {shape.name}" if tokens < usual else ""
    if has_config or why:
        notes.append(f"samples of {tokens} tokens are assumed{why} (--tokens, or train.max_tokens of a config)")
    targets = min(targets, tokens) if reads == "tokens" else targets
    return [replace(setting, tokens=tokens, targets=targets) for setting in settings]


def _check_used(arguments: argparse.Namespace, settings: Sequence[Setting], notes: list[str]) -> None:
    """Raise UserError for an option of sharded layouts where no layout that is considered has it.

    Args:
        arguments: the options.
        settings: ways to run.
        notes: gets a sentence where only some layouts have it.
    """
    owners = {"offload": "fsdp", "gather": "fsdp", "prefetch": "fsdp and zero"}
    for name, owner in owners.items():
        value = getattr(arguments, name)
        others = [setting.layout for setting in settings if getattr(setting, name) != value]
        if value is not None and len(others) == len(settings):
            raise UserError(
                f"--{name}: is an option of layout {owner}, and only {', '.join(dict.fromkeys(others))} is considered "
                "(--layout; with one rank there is nothing to cut); leave it out, or give --ranks-per-host, --hosts"
            )
        if value is not None and others:
            notes.append(f"--{name} goes with {owner}, not with {' and '.join(dict.fromkeys(others))}")


def _check_model(
    arguments: argparse.Namespace, shape: ModelShape, trainable: Sequence[str], settings: Sequence[Setting]
) -> None:
    """Raise UserError if the run asks for what the model does not have.

    Args:
        arguments: the options.
        shape: the model.
        trainable: patterns of the weights that are trained.
        settings: how it is to run.
    """
    if not shape.num_trainable:
        raise UserError(f"--trainable: {' '.join(trainable)} leaves no weight to train; names look like "
                        f"{shape.weights[0].name}")  # fmt: skip
    length = settings[0].tokens + (settings[0].targets if settings[0].reads == "texts" else 0)
    if arguments.find != "context" and length > shape.window:
        raise UserError(f"--tokens: {length} tokens are more than the window of {shape.name}, which is {shape.window}")


def _on_layouts(arguments: argparse.Namespace, settings: Sequence[Setting], machine: Machine) -> list[Setting]:
    names = arguments.layout or ["replicated", "fsdp", "zero"]
    return [option for setting in settings for option in layouts(setting, machine.ranks, names)]


def _machine(arguments: argparse.Namespace, setting: Setting) -> Machine:
    machine = Machine(arguments.hosts, arguments.ranks_per_host, parse_bytes(arguments.memory, "--memory"))
    if machine.ranks > MOST_RANKS:
        raise UserError(f"--hosts: {machine.ranks:,} ranks in all; a plan is made for at most {MOST_RANKS:,}")
    if arguments.link and arguments.hosts == 1:
        raise UserError("--link: is the link between hosts, of which there is one; give --hosts, or --host-link")
    if arguments.host_link and arguments.ranks_per_host == 1:
        raise UserError(
            "--host-link: links the ranks of a host, of which there is one; give --ranks-per-host, or --link"
        )
    data = None if arguments.rates in ("h100", "h200") else remembered()
    if arguments.rates == "h200":
        machine = as_h200(machine)
    if data is None and arguments.rates == "here":
        raise UserError("--rates: nothing was measured on this machine yet; add --calibrate")
    if data is not None:
        machine = with_rates(machine, data, setting.compute or setting.weights)
    parsers = {"link": parse_rate, "host_link": parse_rate, "flops": parse_flops, "bandwidth": parse_rate}
    given: dict[str, Any] = {name: parse(getattr(arguments, name), f"--{name.replace('_', '-')}")
             for name, parse in parsers.items() if getattr(arguments, name)}  # fmt: skip
    machine = replace(machine, **given)
    if machine.memory <= machine.runtime:
        raise UserError(f"--memory: {arguments.memory} is not even enough for Python, torch and the device's context")
    return machine


def _settings(arguments: argparse.Namespace, config: RunConfig | None, notes: list[str]) -> list[Setting]:
    """A setting for each algorithm that is considered.

    Args:
        arguments: the options.
        config: the run's, if one was named.
        notes: gets what people must know.
    """
    base = Setting(targets=128) if config is None else setting_of(config, notes)
    names = {"batch": "batch_size", "full": "full_size", "micro_batch": "micro_batch", "width": "width",
             "tokens": "tokens", "reads": "reads", "targets": "targets", "dtype": "weights", "compute": "compute",
             "gather": "gather", "prefetch": "prefetch", "offload": "offload"}  # fmt: skip
    given = {setting: value for option, setting in names.items() if (value := getattr(arguments, option)) is not None}
    base = replace(base, **given)
    if base.reads == "labels":
        if arguments.targets is not None:
            raise UserError("--targets: goes with --reads tokens or texts; at labels one token is read")
        base = replace(base, targets=1)
    elif base.reads == "tokens":
        base = replace(base, targets=min(base.targets, base.tokens))
    if base.full_size < base.batch_size:
        if arguments.full is not None:
            raise UserError(f"--full: {base.full_size} samples are fewer than a minibatch has ({base.batch_size})")
        base = replace(base, full_size=base.batch_size)
    if base.micro_batch > base.batch_size:
        if arguments.micro_batch is not None:
            raise UserError(f"--micro-batch: {base.micro_batch} samples are more than --batch has ({base.batch_size})")
        base = replace(base, micro_batch=base.batch_size)
    if arguments.per_sample:
        base = replace(base, law="lowrank")
    return [replace(base, algorithm=algorithm) for algorithm in _algorithms(arguments, base, config)]


def _algorithms(arguments: argparse.Namespace, base: Setting, config: RunConfig | None) -> list[Settings]:
    options: dict[str, Any] = {"directions": arguments.directions, "one_sided": arguments.one_sided}
    options = {name: value for name, value in (options | {"per_sample": arguments.per_sample}).items() if value}
    if config is not None and not isinstance(config.algorithm, FirstOrder) and arguments.algorithm is None:
        chosen: list[Any] = [base.algorithm]
    else:
        kinds = {"mezo": MeZO(), "mezo-svrg": MeZOSVRG()}
        chosen = [kinds[name] for name in arguments.algorithm or kinds]
    if arguments.anchor is not None and not any(isinstance(item, MeZOSVRG) for item in chosen):
        raise UserError("--anchor: is an option of --algorithm mezo-svrg")
    anchor = {} if arguments.anchor is None else {"anchor": arguments.anchor}
    try:
        return [replace(item, **options, **(anchor if isinstance(item, MeZOSVRG) else {})) for item in chosen]
    except (TypeError, ValueError) as error:
        raise UserError(f"plan: the options of the algorithm contradict one another: {error}") from error
