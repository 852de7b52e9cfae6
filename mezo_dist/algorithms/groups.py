"""Groups of weights with learning rates from outside: the param groups of a torch optimizer, as planners see them.

A planner computes its learning rate from its settings and the step. Where a scheduler of another framework decides
(that of Hugging Face's Trainer), the rates of each step are an input instead, and are logged beside the losses. Weights
that share a rate and a weight decay are a `Group`; each group has its planner and its state, and all of them see the
same losses. As long as groups differ in nothing, their update is that of the plain planner, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

from mezo_dist.algorithms.base import Algorithm, Evaluation, Losses, Problem, StateT, Update
from mezo_dist.algorithms.mezo import MeZO, MeZOPlanner, MeZOState
from mezo_dist.algorithms.operations import Add, CopyAnchor, Operation, Scale
from mezo_dist.algorithms.svrg import MeZOSVRG, SVRGPlanner, SVRGState
from mezo_dist.errors import UserError


@dataclass(frozen=True)
class Group:
    """Weights that share a learning rate and a weight decay."""

    names: tuple[str, ...]
    """Canonical names of the weights."""
    weight_decay: float = 0.0
    """Decay of all of them, vectors too."""


@dataclass(frozen=True)
class GroupedState:
    """The state of each group's planner."""

    states: tuple[MeZOState | SVRGState, ...]


@dataclass(frozen=True)
class GroupedPlanner:
    """Planner of MeZO or MeZO-SVRG on several groups of weights. `at` gives the one for a step.

    Raises:
        ValueError: a weight decay does not go together with the settings.
    """

    settings: MeZO | MeZOSVRG
    """``lr`` is the rate to which those of a step are held; for MeZO-SVRG ``anchor_lr`` changes with it."""
    problem: Problem
    groups: tuple[Group, ...]
    rates: tuple[float, ...] = ()
    """Learning rate of each group at this step; empty: ``settings.lr``."""
    State: ClassVar[type[GroupedState]] = GroupedState

    def __post_init__(self) -> None:
        self._planners()

    def at(self, rates: Sequence[float]) -> GroupedPlanner:
        """The planner of a step at which groups have these learning ``rates``."""
        if len(rates) != len(self.groups):
            raise UserError(f"{len(rates)} learning rates for {len(self.groups)} groups of weights")
        return replace(self, rates=tuple(rates))

    def init(self) -> GroupedState:
        return GroupedState(tuple(planner.init() for planner in self._planners()))

    def plan(self, state: GroupedState, step: int) -> Evaluation:
        first, *others = (p.plan(s, step) for p, s in zip(self._planners(), state.states, strict=True))  # type: ignore[arg-type]
        if any(other != first for other in others):
            raise UserError(
                "algorithm.anchor: groups of weights have moved by different learning rates, so that no combination "
                "leads back to the anchor; set anchor='stored', which keeps a copy of it"
            )
        return first

    def update(self, state: GroupedState, step: int, rounds: Sequence[Losses]) -> Update[GroupedState] | Evaluation:
        pairs = zip(self._planners(), state.states, strict=True)
        answers = [p.update(s, step, rounds) for p, s in pairs]  # type: ignore[arg-type]
        if isinstance(answers[0], Evaluation):  # for eps: auto, and the same for all: they have one seed
            return answers[0]
        updates: list[Update[MeZOState | SVRGState]] = answers  # type: ignore[assignment]
        new, first = GroupedState(tuple(update.state for update in updates)), updates[0]
        return Update(new, self._together([u.operations for u in updates]), first.metrics, first.notes)

    def _planners(self) -> list[MeZOPlanner | SVRGPlanner]:
        settings, whole = self.settings, self.settings.lr
        if whole == "auto":
            raise ValueError(
                "algorithm.lr: auto finds a rate for all weights, and these have rates of groups; give one"
            )
        if isinstance(settings, MeZOSVRG) and settings.anchor == "auto" and any(g.weight_decay for g in self.groups):
            settings = replace(settings, anchor="stored")  # what auto comes to where any weight decays
        planners: list[MeZOPlanner | SVRGPlanner] = []
        for group, rate in zip(self.groups, self.rates or [whole] * len(self.groups), strict=True):
            config = replace(settings, weight_decay=group.weight_decay, weight_decay_all=True)
            planner = MeZOPlanner if isinstance(config, MeZO) else SVRGPlanner
            planners.append(planner(config, self.problem, rate / whole))  # type: ignore[arg-type]
        return planners

    def _together(self, lists: Sequence[Sequence[Operation]]) -> tuple[Operation, ...]:
        """The operations of all groups as those of one update: whole where all groups do the same.

        Args:
            lists: operations of each group: perhaps a copy of the anchor, perhaps a `Scale`, and an `Add`.
        """
        copies: list[Operation] = [CopyAnchor()] if any(CopyAnchor() in operations for operations in lists) else []
        scales, additions = (
            [
                replace(operation, only=group.names)
                for group, operations in zip(self.groups, lists, strict=True)
                for operation in operations
                if isinstance(operation, kind) and group.names
            ]
            for kind in (Scale, Add)
        )
        if len({replace(operation, only=None) for operation in additions}) == 1:
            additions = [replace(additions[0], only=None)]
        return (*copies, *scales, *additions)


def at_rates(algorithm: Algorithm[StateT], rates: Sequence[float]) -> Algorithm[StateT]:
    """The planner of a step that was taken at these ``rates``; ``algorithm`` itself if none are given.

    Raises:
        UserError: its rates follow from its settings, or it has another number of groups.
    """
    if not rates:
        return algorithm
    grouped: object = algorithm
    if not isinstance(grouped, GroupedPlanner):
        raise UserError("a step names learning rates, but those of this algorithm follow from its settings")
    return cast("Algorithm[StateT]", grouped.at(rates))
