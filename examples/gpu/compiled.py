"""The part `compile` of the first half hour: what `train.compile` gains, and what becomes of the losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from shapes import make_batch
from torch import nn

from mezo_dist.algorithms.base import Evaluation, Variant
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.law import Law
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines import compiled
from mezo_dist.engines.engine import Engine
from mezo_dist.runs.evaluation import Evaluator
from mezo_dist.tasks.classification.label_words import LabelWords


class Machine(Protocol):
    """See `parts.Machine`."""

    rehearse: bool

    def seconds(self, run: Any) -> float:
        """Median time of a call."""

    def peak_gib(self, run: Any) -> float | None:
        """Most memory during a call."""

    def model(self, shape: str) -> nn.Module:
        """Random weights."""


def compile_modes(machine: Machine, shapes: list[str]) -> Iterator[dict[str, Any]]:
    """Both signs of a direction, with each setting of `train.compile`: time, memory, losses beside those of `off`."""
    if machine.rehearse:
        compiled.BACKEND = "eager"  # torch's own way without a compiler
    for shape in shapes:
        model, usual = machine.model(shape), None
        with torch.no_grad():
            objective = LabelWords(model, [100, 200], make_batch(1, 2))
        for mode in ("off", "units") if machine.rehearse else ("off", "units", "graphs"):
            run = both_signs(machine, model, objective, mode)
            try:
                losses = run(1)
            except Exception as error:  # noqa: BLE001 - other modes still count
                yield {"shape": shape, "compile": mode, "fails": f"{type(error).__name__}: {error}"[:600]}
                continue
            usual = usual or losses
            row = {"shape": shape, "compile": mode, "ms": 1000 * machine.seconds(lambda run=run: run(2))}
            row |= {"GiB": machine.peak_gib(lambda run=run: run(2)), "same again": run(1) == losses}
            yield row | {"largest difference of losses": max(abs(a - b) for a, b in zip(losses, usual, strict=True))}
        del model


def both_signs(machine: Machine, model: nn.Module, objective: LabelWords, mode: Any) -> Callable[[int], list[float]]:
    """Losses of both signs of the direction with the seed that it is called with.

    Args:
        machine: where.
        model: whose losses.
        objective: the losses.
        mode: of `train.compile`.
    """
    samples, tokens = (2, 8) if machine.rehearse else (16, 40)
    engine = Engine(model, Law("rademacher"), compile=mode)
    evaluator, batch = Evaluator(engine, objective, Communicator()), [make_batch(samples, tokens)]

    def run(seed: int) -> list[float]:
        shift = Combination.single(seed, 1e-3)
        found = evaluator.losses(Evaluation((Variant(shift), Variant(-shift))), batch, (seed, 0))
        assert found is not None
        return list(found.mean)

    return run
