"""The algorithms in a training loop of your own, on any torch module and any loss."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Generic, cast, final

import torch
from torch import Tensor, nn

from mezo_dist import algorithms
from mezo_dist.algorithms import Settings
from mezo_dist.algorithms.base import Evaluation, Losses, Problem, state_from_json, state_to_json
from mezo_dist.algorithms.decay import check_something_decays
from mezo_dist.algorithms.operations import apply_updates
from mezo_dist.algorithms.step import Progress, run_step
from mezo_dist.config.schema import differences
from mezo_dist.directions.law import Law, LawName
from mezo_dist.distributed.communicator import Communicator, fingerprint
from mezo_dist.distributed.join import join
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.layouts.base import Layout
from mezo_dist.engines.lockstep.passes import is_inside
from mezo_dist.engines.survival import settle_eps
from mezo_dist.errors import UserError
from mezo_dist.json_types import JsonObject
from mezo_dist.optim.checks import KnownWeights, check_arguments
from mezo_dist.optim.log import TrajectoryLog, describe
from mezo_dist.optim.losses import BatchT, LossFunction, num_samples_of
from mezo_dist.optim.rounds import Rounds

log = logging.getLogger(__name__)
STATE_FORMAT = "mezo_dist/optimizer/1"


@final
class Optimizer(Generic[BatchT]):
    """Trains a module by forward passes only: MeZO, MeZO-SVRG and their options, in a loop of your own.

    A step evaluates your loss function at several variants of the weights, on the same batch, and moves the weights
    along random directions by what the losses say. No gradient is computed, nothing is stored for a backward pass, and
    nothing but the update changes the weights: after an exception they have the bits that they had before.

    The forward passes of all variants and micro-batches run as coroutines through your unmodified code, layer by layer,
    so the loss function must be free of side effects that one pass could see of another, and must call the model (not
    read its weights). The model is put into eval mode: dropout would give the sides of an estimate different masks.

    Under torchrun, deepspeed, mpirun or srun every process makes an Optimizer with the same arguments and calls `step`
    with its own part of the batch. Processes exchange the losses, as exact sums, and nothing else; all of them make the
    same update. Weights may be whole in every process or cut over them (`mezo_dist.shard`).

    Args:
        model: any module; parameters with ``requires_grad`` are trained. fp32 weights, or bf16 (rounded
            stochastically).
        algorithm: settings of the algorithm: `mezo_dist.MeZO`, `mezo_dist.MeZOSVRG`.
        full_batch: for MeZO-SVRG: the micro-batches of the full batch (this process's part of it), evaluated at every
            anchor step.
        num_steps: steps of the whole training; needed where a schedule falls to its end.
        batch_size: samples of a batch over all processes; needed for ``per_sample`` directions only.
        num_samples: number of samples of a micro-batch, for ``per_sample`` and ``lr="auto"``; by default the first
            dimension of the first tensor in it.
        law: of the directions; ``lowrank`` for ``per_sample``.
        direction_rank: rank of ``lowrank`` directions.
        seed: of the directions. Runs with the same seed, data and weights have the same bits.
        layout: where the weights live, from `mezo_dist.shard`; whole in every process if None.
        comm: the processes; those of the launcher if None.
        compute_dtype: dtype of the forward passes; that of the weights if None.
        width: micro-batches that go through the model in lock step; all of a step if None. Takes memory for hidden
            states of ``width`` times the number of variants, and changes no result.
        trajectory: file to which every step is logged (by rank 0): base model + this file = the trained model, see
            `mezo_dist.replay`. It must not exist.
        resume: go on with ``trajectory``, if it exists: the model, which must have its base weights, is brought to
            where it was, and `num_steps_done` says how far that is.
        max_skipped: steps in a row that may be skipped for a loss that is not finite.
        probe: before the first step, hold the losses of one micro-batch under a shift of the weights against those of
            really changed weights, in five more forward passes (nine, if there are several): a model that uses weights
            in a way that cannot be followed is refused, by the name of the weight. Sharded layouts are not probed here.

    Attributes:
        engine: evaluates variants and owns the weights (`mezo_dist.engines.engine.Engine`).
        metrics: scalars of the last step, such as ``projected_gradient`` and ``lr``; empty if it was skipped.

    Raises:
        UserError: settings that contradict each other, a full batch that is missing, or a trajectory that cannot be
            gone on with.

    The algorithms: MeZO (Malladi et al. 2023, arXiv 2305.17333), MeZO-SVRG (Gautam et al. 2024, arXiv 2404.08080).

    >>> import torch
    >>> from mezo_dist import MeZO, Optimizer
    >>> model = torch.nn.Linear(3, 1)
    >>> x, y = torch.randn(64, 3), torch.randn(64, 1)
    >>> def loss(model, batch):
    ...     return torch.nn.functional.mse_loss(model(batch[0]), batch[1])
    >>> opt = Optimizer(model, MeZO(lr=0.05, directions=4))
    >>> before = opt.step(loss, (x, y))
    >>> for _ in range(100):
    ...     after = opt.step(loss, (x, y))
    >>> after < before, opt.num_steps_done
    (True, 101)
    """

    def __init__(
        self,
        model: nn.Module,
        algorithm: Settings,
        *,
        full_batch: Sequence[BatchT] | None = None,
        num_steps: int | None = None,
        batch_size: int | None = None,
        num_samples: Callable[[BatchT], int] = num_samples_of,
        law: LawName = "gaussian",
        direction_rank: int = 1,
        seed: int = 0,
        layout: Layout | None = None,
        comm: Communicator | None = None,
        compute_dtype: torch.dtype | None = None,
        width: int | None = None,
        trajectory: str | Path | None = None,
        resume: bool = False,
        max_skipped: int = 10,
        probe: bool = True,
    ) -> None:
        self._comm = comm = comm or join()
        check_arguments(model, algorithm, law, batch_size, num_steps, full_batch)
        per_sample = bool(getattr(algorithm, "per_sample", False))
        self._full_batch, self._max_skipped = full_batch, max_skipped
        stochastic = any(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters())
        self.engine = Engine(
            model,
            Law(law, direction_rank),
            layout,
            compute_dtype=compute_dtype,
            stochastic_rounding=stochastic,
            width=width,
        )
        self._rounds = Rounds(self.engine, comm, num_samples, probe=probe)
        full_size = self._rounds.count(full_batch)[1] if full_batch is not None and per_sample else 1
        check_something_decays(algorithm, ((s.name, len(s.shape)) for s in self.engine.trainable_shards()))
        eps = settle_eps(self.engine, comm, algorithm, seed)
        problem = Problem(seed, num_steps or 1, batch_size or 1, full_size, has_16bit_weights=stochastic, eps=eps)
        self._seed, self._planner = seed, algorithms.build(algorithm.name, algorithm, problem)
        self._settings = describe(algorithm, self.engine.law, problem)
        self._progress: Progress[object] = Progress(self._planner.init())
        if full_batch is None and self._planner.plan(self._progress.state, 0).batch == "full":
            raise UserError(
                f"full_batch: {algorithm.name} evaluates the full batch at its anchors; give its micro-batches"
            )
        self._num_steps = num_steps
        weights = self._agreed_weights(trainable=repr(self.engine.trainable), settings=repr(self._settings))
        self.metrics: dict[str, float] = {}
        self._known = KnownWeights(model)
        self._log = None
        if trajectory is not None:
            self._log = TrajectoryLog.open(Path(trajectory), self._settings, self.engine, weights, comm, resume=resume)
            self._progress = self._log.replay(self.engine, self._planner)

    @property
    def num_steps_done(self) -> int:
        """Steps so far, skipped ones and those of a trajectory that was resumed among them."""
        return self._progress.step

    def step(
        self,
        loss: LossFunction[BatchT],
        batch: BatchT | None = None,
        *,
        micro_batches: Sequence[BatchT] | None = None,
    ) -> float:
        """Take one step. Collective: every process calls it, each with its own part of the batch.

        Args:
            loss: called with the model and a micro-batch, several times. It returns the mean loss (a scalar tensor or a
                float), one loss per sample (a vector), or a pair (mean loss, number of samples or target tokens that it
                is the mean of; or both for each sample). Scalars of several micro-batches count equally unless they
                come in such pairs. ``lr="auto"`` needs cross-entropies of single samples, with their numbers of tokens
                if they are means over several.
            batch: what ``loss`` gets; one forward pass for every variant.
            micro_batches: in place of ``batch``, several of them (gradient accumulation): the step is that of all of
                them together. Where weights are cut over the processes, each must have at least one.

        Returns:
            The mean loss over the batches of all processes, at the weights before the step up to order eps^2; nan if
            the step was skipped, because a loss was not finite.

        Raises:
            UserError: the loss function returned nothing usable, or takes a step itself; too many steps in a row had no
                finite loss; the model's parameters are not those that the optimizer was made for.
            OutOfStepError: processes take different steps.
            LostRankError: another process stopped, failed in its loss function, or does not answer.
        """
        if (batch is None) == (micro_batches is None):
            raise UserError("step: give a batch, or micro_batches=[...], and not both")
        items: Sequence[BatchT] = [cast(BatchT, batch)] if micro_batches is None else list(micro_batches)
        if self._progress.step == self._num_steps:
            log.warning("num_steps: %d steps are done, and schedules stay where they have ended", self._num_steps)

        def evaluate(request: Evaluation, round_number: int) -> Losses | None:
            chosen = items if request.batch == "minibatch" else self._full_batch
            mark = fingerprint(self._settings, self._progress.step, round_number)
            return self._rounds.losses(request, loss, chosen or [], mark)

        if is_inside():
            raise UserError("step: called by the loss function of a step that is not over; the loss function must not")
        self._known.check()
        self._comm.place = f"step {self._progress.step + 1}"
        result = run_step(self._planner, self._progress.state, self._progress.step, evaluate)
        if self._log is not None:
            self._log.append(result)
        update = result.update
        if update is not None:
            apply_updates(self.engine, self._seed, [(result.step, update.operations)])
        self._progress.after(update)
        if self._progress.skipped_in_a_row >= self._max_skipped:
            raise UserError(
                f"max_skipped: {self._max_skipped} steps in a row had no finite loss, the last one step "
                f"{self._progress.step}; the learning rate or eps is probably too large"
            )
        for text in update.notes if update is not None else ():
            log.info("step %d: %s", self._progress.step, text)
        self.metrics = update.metrics if update is not None else {}
        return self.metrics.get("loss", math.nan)

    def state_dict(self) -> JsonObject:
        """Where the optimizer is, in JSON types (a few numbers): save it beside ``model.state_dict()``. Collective.

        It holds no weights and no copy of any; their fingerprint makes sure that the right ones come back with it.
        """
        progress = self._progress
        weights = self._agreed_weights()
        return {
            "format": STATE_FORMAT,
            "settings": self._settings,
            "step": progress.step,
            "skipped": progress.skipped,
            "skipped_in_a_row": progress.skipped_in_a_row,
            "state": state_to_json(progress.state),
            "weights": weights,
        }

    def load_state_dict(self, state: JsonObject) -> None:
        """Go on where `state_dict` was called. The model's weights must have been restored before. Collective.

        Raises:
            UserError: it is of another algorithm, law, seed or of other weights; or the algorithm needs a copy of the
                anchor (``anchor: stored``), which a state does not hold: resume from a trajectory instead.
        """
        if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
            raise UserError("load_state_dict: this is no state of a mezo_dist.Optimizer of this version")
        differing = differences(self._settings, state.get("settings"))
        if differing:
            raise UserError(f"load_state_dict: the state was saved with other settings: {', '.join(differing)}")
        if (weights := self.engine.fingerprint()) != state["weights"]:
            raise UserError(
                f"load_state_dict: the model's weights have the fingerprint {weights}, but {state['weights']} when the "
                "state was saved; load the model's state_dict of that step first"
            )
        planner_state: object = state_from_json(self._planner.State, state["state"])
        if any(variant.base == "anchor" for variant in self._planner.plan(planner_state, state["step"]).variants):
            raise UserError(
                "load_state_dict: anchor: stored keeps a copy of the weights, which a state does not hold; resume from "
                "a trajectory (Optimizer(trajectory=..., resume=True)), or save right before an anchor step"
            )
        self._progress = Progress(planner_state, state["step"], state["skipped"], state["skipped_in_a_row"])

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and whole tensor of every parameter, one after another, on any layout (to save them). Collective.

        A tensor is valid until the next one is asked for.
        """
        return self.engine.named_weights()

    def fingerprint(self) -> str:
        """16 hexadecimal digits that depend on the bits of all weights, and not on their layout. Collective."""
        return self.engine.fingerprint()

    def close(self) -> None:
        """Check that all processes have the same weights; log their fingerprint, and close the trajectory. Collective.

        Raises:
            UserError: processes have other weights than the first: some were changed beside the optimizer.
        """
        weights = self._agreed_weights()
        if self._log is not None:
            self._log.close(self._progress.step, weights)
            self._log = None

    def _agreed_weights(self, **more: str) -> str:
        """The fingerprint of the weights.

        Raises:
            UserError: processes have different weights, or disagree about a fact in ``more``.
        """
        weights = self.engine.fingerprint()
        self._comm.agree({"weights": weights, **more})
        return weights

    def __enter__(self) -> Optimizer[BatchT]:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
