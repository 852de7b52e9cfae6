"""What a planner is, and the small records that pass between planners and the training loop (torch-free).

An algorithm decides which variants are evaluated on which batch, and turns the losses into an update. It is pure:
`plan` and `update` depend on their arguments and on nothing else, and its state is a frozen dataclass that survives
JSON. So every rank runs its own copy and all agree without talking, and a run is resumed by feeding the logged
losses through `update` again.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

from mezo_dist.algorithms.operations import CopyAnchor, Operation, total_added
from mezo_dist.directions.combination import ZERO, Combination
from mezo_dist.directions.seeds import derive_seed
from mezo_dist.errors import UserError
from mezo_dist.json_types import Json, JsonObject

Batch = Literal["minibatch", "full"]
Base = Literal["current", "anchor"]
"""The weights as they are now, or a kept copy of them (`CopyAnchor`)."""
UNKNOWN_EPOCH = 8
"""Steps that stand for an epoch in loops that do not tell how long theirs are, and for functions without data."""


@dataclass(frozen=True)
class Variant:
    """The weights that a forward pass is evaluated at: current weights (or the kept copy, see `Base`) + ``shift``.

    With ``per_sample`` (as long as the batch), sample i is evaluated at these + shift + per_sample[i].
    """

    shift: Combination = ZERO
    per_sample: tuple[Combination, ...] = ()
    base: Base = "current"

    def moved(self, by: Combination) -> Variant:
        """This one, further along."""
        return replace(self, shift=self.shift + by)


@dataclass(frozen=True)
class Pair:
    """Two variants of a round that differ by ``distance`` times a direction."""

    ahead: int
    """Place of the one that is further along, among the variants of the round."""
    behind: int
    """Place of the other one."""
    distance: float


@dataclass(frozen=True)
class Evaluation:
    """One round of forward passes: every variant on every sample of one batch.

    ``minibatch`` is the batch of this step, ``full`` all training samples (or the stated subset). With
    ``each_sample`` the losses come back for each sample, in batch order, otherwise as one mean. With ``pairs``, the
    mean curvature of the loss along their directions comes with them.
    """

    variants: tuple[Variant, ...]
    batch: Batch = "minibatch"
    each_sample: bool = False
    pairs: tuple[Pair, ...] = ()
    gradient: bool = False
    """Back-propagate the mean loss of the one variant, which is the current weights: its gradient is kept beside the
    weights for `OptimizerStep`, and its norm comes back."""

    @property
    def tells_samples_apart(self) -> bool:
        """The losses of single samples are needed, if only for the curvature."""
        return self.each_sample or bool(self.pairs)


@dataclass(frozen=True)
class Losses:
    """The losses of a round, equal on all ranks.

    ``mean[v]`` is the mean loss of variant v (sum of losses / sum of weights, exact before the one rounding).
    ``each[v][i]`` is the loss of sample i under variant v; empty unless the evaluation asked for it.
    ``curvature`` is the mean of z' H z over the directions z of the evaluation's pairs (None if it has none). H is the
    Gauss-Newton matrix of the loss, or what stands for it, the empirical Fisher matrix of single samples.
    """

    mean: tuple[float, ...]
    each: tuple[tuple[float, ...], ...] = ()
    curvature: float | None = None
    gradient_norm: float | None = None
    """Euclidean norm of the gradient of all trainable weights; None unless the evaluation asked for the gradient."""


StateT = TypeVar("StateT")
"""State of a planner: a frozen dataclass of JSON types, `Combination`, tuples, and nested such dataclasses."""


@dataclass(frozen=True)
class Update(Generic[StateT]):
    """The end of a step: the new state, what to do to the weights, and scalars worth a curve."""

    state: StateT
    operations: tuple[Operation, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """What people should be told in the log, such as a division of the learning rates."""

    @property
    def combination(self) -> Combination:
        """The sum of all that is added to the weights."""
        return total_added(self.operations)

    @property
    def copies_anchor(self) -> bool:
        """The weights are copied before they change."""
        return CopyAnchor() in self.operations


@dataclass(frozen=True)
class Problem:
    """What an algorithm may know about the run: its seed, the number of steps, the sizes of batches, the weights."""

    seed: int = 0
    num_steps: int = 1
    batch_size: int = 1
    full_size: int = 1
    """Samples of a full batch."""
    has_16bit_weights: bool = False
    """Adding to weights of 16 bits rounds, so that what was added cannot be taken off again exactly."""
    num_train: int | None = None
    """Training samples; None: there are no epochs, or their length is not known."""
    eps: float | None = None
    """For ``eps: auto``: the size of the perturbation that was chosen at start-up."""
    is_discrete: bool = False
    """The objective is a metric or a reward: it takes few values, and has no curvature."""

    @property
    def epoch(self) -> int:
        """Steps in which minibatches go through all training samples; `UNKNOWN_EPOCH` if that is not known."""
        return math.ceil(self.num_train / self.batch_size) if self.num_train else UNKNOWN_EPOCH

    def perturbation(self, eps: float | Literal["auto"]) -> float:
        """The size of the perturbation, given the setting ``eps``.

        Raises:
            UserError: it is ``auto``, and none was chosen.
        """
        if eps != "auto":
            return eps
        if self.eps is None:
            raise UserError("algorithm.eps: auto is chosen when a run begins, and none was chosen here; give a number")
        return self.eps

    def direction_seed(self, step: int, index: int = 0, pool: int | None = None) -> int:
        """Seed of the ``index``-th direction drawn at ``step``; every rank derives it, nobody sends it.

        With ``pool``, one of a pool of so many seeds, the same at all steps.

        Args:
            step: number of the step.
            index: number of the direction in the step.
            pool: size of a fixed pool of seeds to draw from, the same at all steps; None: every direction has a
                seed of its own.
        """
        seed = derive_seed(self.seed, "direction", step, index)
        return seed if pool is None else derive_seed(self.seed, "pool", seed % pool)


class Algorithm(Protocol[StateT]):
    """A planner. ``State`` is the class of its state."""

    State: ClassVar[type]

    def init(self) -> StateT:
        """The state before step 0."""

    def plan(self, state: StateT, step: int) -> Evaluation:
        """The first round of forward passes of ``step``."""

    def update(self, state: StateT, step: int, rounds: Sequence[Losses]) -> Update[StateT] | Evaluation:
        """The update, given the losses of the rounds so far; or a further round, if those were not enough.

        Args:
            state: the state before the step.
            step: number of the step.
            rounds: losses of the rounds so far.
        """


def state_to_json(state: Any) -> Json:
    """A frozen dataclass of JSON types, `Combination`, tuples and nested such dataclasses, as JSON."""
    if isinstance(state, Combination):
        return state.to_json()
    if dataclasses.is_dataclass(state):
        return {f.name: state_to_json(getattr(state, f.name)) for f in dataclasses.fields(state)}
    if isinstance(state, tuple):
        return [state_to_json(item) for item in state]
    return state


def state_from_json(kind: type[StateT], data: JsonObject) -> StateT:
    """Read `state_to_json` back; field types tell what each value was."""
    hints = typing.get_type_hints(kind)
    return kind(**{name: _value_from_json(hints[name], value) for name, value in data.items()})


def _value_from_json(kind: object, value: Any) -> object:
    if kind is Combination:
        return Combination.from_json(value)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return state_from_json(kind, value)
    if typing.get_origin(kind) is tuple:
        return tuple(_value_from_json(typing.get_args(kind)[0], item) for item in value)
    return value
