"""The torch optimizer of a `MeZOTrainer`: it stages an estimate of a step, and applies it when `step` is called."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from mezo_dist.algorithms.base import Batch, Evaluation, Losses, Problem
from mezo_dist.algorithms.groups import Group, GroupedPlanner, GroupedState
from mezo_dist.algorithms.mezo import MeZO
from mezo_dist.algorithms.operations import apply_updates
from mezo_dist.algorithms.step import Progress, StepResult, run_step
from mezo_dist.algorithms.svrg import MeZOSVRG
from mezo_dist.config.schema import differences
from mezo_dist.distributed.communicator import Communicator, fingerprint
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.survival import settle_eps
from mezo_dist.errors import UserError
from mezo_dist.json_types import JsonObject
from mezo_dist.optim.checks import KnownWeights
from mezo_dist.optim.log import describe, header_of
from mezo_dist.optim.losses import LossFunction, num_samples_of
from mezo_dist.optim.rounds import Rounds
from mezo_dist.storage.replay import logged_step, replay_updates
from mezo_dist.storage.trajectory import Mark, parse
from mezo_dist.trainer.record import Record

log = logging.getLogger(__name__)
KEY = "mezo_dist"
"""Where a state dict has what torch's own does not."""
FORMAT = "mezo_dist/trainer/1"
_AS_ARGUMENTS = {"algorithm.lr": "learning_rate", "problem.seed": "seed", "groups": "weight_decay"}
"""Setting -> the argument of Trainer that it comes from."""

Inputs = Mapping[str, Any]
"""What the model is called with."""
BatchOf = Callable[[Batch, int], "tuple[Sequence[Inputs], LossFunction[Inputs]]"]
"""(which batch, number of the step) -> this rank's micro-batches, and their loss."""


@final
class StagedOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose steps need no gradients: `stage` evaluates losses, `step` moves the weights.

    Every param group moves by its own ``lr`` at the time of `step`, so that any scheduler works on it; the rates are
    logged with the step. ``zero_grad`` does nothing.

    Args:
        model: owns the parameters.
        param_groups: as for any torch optimizer, with ``lr`` and ``weight_decay`` each.
        settings: of the algorithm; ``lr`` is the rate that groups begin with.
        problem: what the algorithm may know about the run; ``eps`` is filled in here.
        engine: owns the model's weights.
        comm: the processes.
        probe: hold the model against really changed weights before the first step.
        max_skipped: steps in a row that may be skipped for a loss that is not finite.
        trajectory: file to which every step is logged, by rank 0.

    Attributes:
        metrics: scalars of the last estimate; empty if it was skipped.
        num_skipped: steps skipped so far.

    Raises:
        UserError: settings that contradict each other.
    """

    def __init__(
        self,
        model: nn.Module,
        param_groups: Sequence[dict[str, Any]],
        settings: MeZO | MeZOSVRG,
        *,
        problem: Problem,
        engine: Engine,
        comm: Communicator,
        probe: bool,
        max_skipped: int,
        trajectory: Path,
    ) -> None:
        super().__init__(param_groups, {"lr": settings.lr, "weight_decay": 0.0})
        self._comm, self._max_skipped, self._path = comm, max_skipped, trajectory
        self.engine = engine
        self._rounds: Rounds[Inputs] = Rounds(self.engine, comm, num_samples_of, probe=probe)
        eps = settle_eps(self.engine, comm, settings, problem.seed)
        self._problem = Problem(**{**vars(problem), "eps": eps})
        groups = self._groups(model)
        try:
            self._planner = GroupedPlanner(settings, self._problem, groups)
        except ValueError as error:
            raise UserError(f"weight_decay: {error}") from error
        self._settings = describe(settings, engine.law, self._problem, groups)
        weights = self.engine.fingerprint()
        comm.agree({"weights": weights, "trainable": repr(self.engine.trainable), "settings": repr(self._settings)})
        self._known = KnownWeights(model)
        self._record = Record(header_of(self._settings, self.engine, weights))
        self._progress: Progress[GroupedState] = Progress(self._planner.init())
        self._staged: StepResult[GroupedState] | None = None
        self.metrics: dict[str, float] = {}

    @property
    def num_steps_done(self) -> int:
        """Steps so far, skipped ones among them."""
        return self._progress.step

    @property
    def num_skipped(self) -> int:
        """Steps that were skipped so far."""
        return self._progress.skipped

    def stage(self, batch_of: BatchOf) -> float:
        """Evaluate the losses of the next step. Collective.

        Args:
            batch_of: gives the batch of the step, or the full batch of an anchor.

        Returns:
            The mean loss over all processes, at the weights as they are, up to order eps^2; nan if one is not finite.
        """
        self._known.check()
        number = self._progress.step
        self._comm.place = f"step {number + 1}"

        def evaluate(request: Evaluation, round_number: int) -> Losses | None:
            items, loss = batch_of(request.batch, number)
            mark = fingerprint(self._settings, number, round_number)
            return self._rounds.losses(request, loss, items, mark)

        planner = self._planner.at(self._rates())
        self._staged = run_step(planner, self._progress.state, number, evaluate)
        self.metrics = self._staged.update.metrics if self._staged.update is not None else {}
        return self.metrics.get("loss", math.nan)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Apply what `stage` estimated, with the learning rates as they are now; log it first.

        Args:
            closure: must be None: losses are evaluated by `stage`.

        Raises:
            UserError: nothing was staged, or too many steps in a row had no finite loss.
        """
        staged, self._staged = self._staged, None
        if staged is None or closure is not None:
            raise UserError("step: there is no estimate to apply; MeZOTrainer.training_step stages one")
        rates = self._rates()
        result = staged
        if staged.update is not None:  # callbacks may have changed a rate since
            rounds, planner = staged.rounds, self._planner.at(rates)
            result = run_step(planner, self._progress.state, staged.step, lambda _, number: rounds[number])
        if self._comm.rank == 0:
            self._record.open(self._path)
        self._record.append(logged_step(result, rates))
        if result.update is not None:
            apply_updates(self.engine, self._problem.seed, [(result.step, result.update.operations)])
            for text in result.update.notes:
                log.info("step %d: %s", result.step + 1, text)
        self._progress.after(result.update)
        if result.skipped:
            log.warning("step %d was skipped: %s", self._progress.step, result.skipped)
        if self._progress.skipped_in_a_row >= self._max_skipped:
            raise UserError(
                f"max_skipped: {self._max_skipped} steps in a row had no finite loss, the last one step "
                f"{self._progress.step}; the learning rate or eps is probably too large"
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: there are no gradients."""

    def state_dict(self) -> dict[str, Any]:
        """torch's own (the param groups), and under ``mezo_dist`` the trajectory, from which all else follows."""
        here: JsonObject = {"format": FORMAT, "step": self._progress.step, "seed": self._problem.seed}
        if self._progress.step:
            is_sharded = self.engine.layout.is_sharded
            # Trainer asks rank 0 alone, which cannot ask the others; `write_trajectory` did before.
            known = self._record.marks.get(self._progress.step) if is_sharded else None
            here |= {"weights": known or self.engine.fingerprint(), "trajectory": self._record.text()}
            shards = [] if is_sharded else self.engine.anchor_shards()  # `mezo_dist.trainer.sharded` saves those
            here["anchor"] = {shard.name: shard.tensor for shard in shards}
        return {**super().state_dict(), KEY: here}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called; the model's weights must have been restored before.

        Raises:
            UserError: it is the state of another optimizer, of other settings, or of other weights.
        """
        here = state_dict.get(KEY, {})
        if here.get("format") != FORMAT:
            raise UserError(
                "optimizer.pt: this checkpoint was written by another trainer or optimizer, and holds no trajectory; "
                "begin a new run from its weights"
            )
        super().load_state_dict({name: value for name, value in state_dict.items() if name != KEY})
        if not here["step"]:
            return
        recorded = parse(here["trajectory"].encode(), Path("optimizer.pt"))
        if recorded is None:
            raise UserError("optimizer.pt: its trajectory is empty")
        if others := differences(self._settings, recorded.header.config):
            named = (_AS_ARGUMENTS.get(name, name) for name in sorted(others))
            raise UserError(
                f"this checkpoint was made with other settings: {', '.join(named)}; give those again to go on"
            )
        if (weights := self.engine.fingerprint()) != here["weights"]:
            raise UserError(
                f"the model's weights have the fingerprint {weights}, but {here['weights']} when the checkpoint was "
                "saved: model and optimizer.pt do not belong together"
            )
        progress: Progress[GroupedState] = Progress(self._planner.init())
        for _ in replay_updates(self._planner, recorded.steps, progress):
            pass
        self._progress, self._record = progress, Record.of(recorded)
        self._mark(weights)
        if here["anchor"]:
            self._restore_anchor(here["anchor"])

    def write_trajectory(self, folder: Path) -> None:
        """Put the trajectory that leads to the weights as they are into ``folder``, beside the model.

        After training they may be those of an earlier checkpoint (the best one): then it is cut there.
        """
        weights = self.engine.fingerprint()
        self._mark(weights)
        done = next((done for done, mark in reversed(self._record.marks.items()) if mark == weights), None)
        if done is None:
            log.warning("%s: these weights are not of this run's steps, so there is no trajectory of them", folder)
        elif self._comm.rank == 0 and folder.resolve() != self._path.parent.resolve():
            self._record.write(folder, done)

    def check_agreement(self) -> None:
        """Raises UserError if processes have different weights. Collective."""
        self._comm.agree({"weights": self.engine.fingerprint()})

    def mark(self) -> None:
        """Log the fingerprint of the weights, which must be those after the last step."""
        if self._progress.step:
            self._mark(self.engine.fingerprint())

    def close(self) -> None:
        """Close the trajectory's file."""
        self._record.close()

    def _mark(self, weights: str) -> None:
        if self._progress.step not in self._record.marks:
            self._record.append(Mark(self._progress.step, weights))

    def _groups(self, model: nn.Module) -> tuple[Group, ...]:
        names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
        groups = []
        for group in self.param_groups:
            parts = tuple(names[id(parameter)] for parameter in group["params"])
            groups.append(Group(parts, group["weight_decay"]))
        return tuple(groups)

    def _rates(self) -> tuple[float, ...]:
        """Learning rates of the groups as they are now. Raises UserError if a weight decay was changed."""
        for group, known in zip(self.param_groups, self._planner.groups, strict=True):
            if group["weight_decay"] != known.weight_decay:
                raise UserError("weight_decay: was changed during training, where it is a setting of the whole run")
        return tuple(float(group["lr"]) for group in self.param_groups)

    def _restore_anchor(self, saved: Mapping[str, Tensor]) -> None:
        self.engine.copy_anchor()  # makes the places
        for shard in self.engine.anchor_shards():
            shard.tensor.copy_(saved[shard.name])
