"""Plans: what it takes to make some weights under some variants, found out once and kept from one step to the next.

To find out costs the host a hundred times what it costs to look whether it still holds; on a GPU, which waits for the
host then, that is most of a step of a small model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn

from mezo_dist.directions.combination import ZERO, Combination
from mezo_dist.directions.law import Law
from mezo_dist.directions.parts import KeptParts
from mezo_dist.engines.lockstep.fanout import Served
from mezo_dist.engines.whereabouts import Whereabouts

MOST_PLANS = 4096
"""Plans that are kept: those of a few kinds of rounds, for models of some hundred modules."""
UNMOVED = -1
"""In place of the number of a variant: no shift."""


@dataclass(frozen=True, eq=False)
class Plan:
    """How some modules' weights are made under some variants, in one go."""

    made: Mapping[nn.Module, Served]
    """For each module where its weights are made, or the weights themselves."""
    fills: Sequence[tuple[tuple[int, ...], KeptParts]]
    """Numbers of the variants (or `UNMOVED`) whose shifts are added, and weights with an output for each of them."""
    num_bytes: int
    """Of scratch."""
    scratch: Tensor
    """Memory that they are made in."""
    whereabouts: Whereabouts
    """Of the weights, the frozen ones too."""

    def run(self, law: Law, shifts: Sequence[Combination]) -> None:
        """Make them.

        Args:
            law: what the directions are.
            shifts: of each variant.
        """
        for numbers, parts in self.fills:
            law.add_parts(parts, shifts_of(numbers, shifts))


@final
class Plans:
    """Plans by what they are for."""

    def __init__(self) -> None:
        self._plans: dict[Any, Plan] = {}

    def clear(self) -> None:
        """Forget them all: they hold the scratch."""
        self._plans.clear()

    def find(self, key: object, scratch: Tensor) -> Plan | None:
        """The plan for ``key``, if it still holds.

        Args:
            key: what it is for.
            scratch: the present one.
        """
        plan = self._plans.get(key)
        if plan is None or plan.scratch is not scratch or not plan.whereabouts.unchanged():
            return None
        return plan

    def keep(self, key: object, plan: Plan) -> None:
        """Remember a plan."""
        if len(self._plans) >= MOST_PLANS:
            self._plans.clear()
        self._plans[key] = plan


def same_shifts(shifts: Sequence[Combination]) -> tuple[int, ...]:
    """For each variant, the number of the first one with the same shift; `UNMOVED` if it has none."""
    first: dict[Combination, int] = {}
    return tuple(first.setdefault(shift, number) if shift else UNMOVED for number, shift in enumerate(shifts))


def shifts_of(numbers: Iterable[int], shifts: Sequence[Combination]) -> list[Combination]:
    """The shifts of some variants.

    Args:
        numbers: of the variants, or `UNMOVED`.
        shifts: of all variants.
    """
    return [ZERO if number == UNMOVED else shifts[number] for number in numbers]
