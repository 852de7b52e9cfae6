"""Groups of weights: the plain update while they are alike, updates of their own where they differ."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mezo_dist.algorithms import build
from mezo_dist.algorithms.base import Losses, Problem
from mezo_dist.algorithms.groups import Group, GroupedPlanner, at_rates
from mezo_dist.algorithms.mezo import MeZO, MeZOPlanner
from mezo_dist.algorithms.momentum import Momentum
from mezo_dist.algorithms.operations import Add, CopyAnchor, Scale
from mezo_dist.algorithms.svrg import MeZOSVRG
from mezo_dist.errors import UserError

PROBLEM = Problem(seed=3)
NAMES = (("a.weight", "b.weight"), ("norm.weight",))
GROUPS = tuple(map(Group, NAMES))
TWO, FOUR = Losses((1.5, 1.25)), Losses((1.5, 1.25, 1.0, 1.125))


@pytest.mark.parametrize(
    "settings", [MeZO(lr=1e-3, momentum=Momentum(0.5)), MeZOSVRG(lr=1e-3, q=3)], ids=["mezo", "svrg"]
)
def test_groups_that_are_alike_are_one(settings: MeZO | MeZOSVRG) -> None:
    """At the settings' own rates the plain planner makes the same steps; at half of them those of half the rate."""
    plain, grouped = build(settings.name, settings, PROBLEM), GroupedPlanner(settings, PROBLEM, GROUPS)
    state, states = plain.init(), grouped.init()
    for step in range(5):
        assert plain.plan(state, step) == grouped.plan(states, step)
        losses = TWO if len(plain.plan(state, step).variants) == 2 else FOUR
        one, other = plain.update(state, step, [losses]), grouped.at([1e-3, 1e-3]).update(states, step, [losses])
        assert one.operations == other.operations  # type: ignore[union-attr]
        assert one.metrics == other.metrics  # type: ignore[union-attr]
        state, states = one.state, other.state  # type: ignore[union-attr]
    halved = grouped.at([5e-4, 5e-4]).update(grouped.init(), 0, [TWO])
    rates = {name: getattr(settings, name) / 2 for name in ("lr", "anchor_lr") if hasattr(settings, name)}
    at_half = build(settings.name, dataclasses.replace(settings, **rates), PROBLEM)
    assert halved.operations == at_half.update(at_half.init(), 0, [TWO]).operations  # type: ignore[union-attr]


def test_groups_that_differ_have_updates_of_their_own() -> None:
    planner: Any = GroupedPlanner(MeZO(lr=1.0), PROBLEM, (Group(NAMES[0], weight_decay=0.25), GROUPS[1]))
    scale, *additions = planner.at([0.5, 0.0]).update(planner.init(), 0, [TWO]).operations
    assert scale == Scale(0.875, exempt_vectors=False, only=NAMES[0])
    alone: Any = MeZOPlanner(MeZO(lr=0.5), PROBLEM)
    whole = alone.update(alone.init(), 0, [TWO])
    assert additions == [Add(whole.combination, NAMES[0]), Add(0.0 * whole.combination, NAMES[1])]
    assert planner.at([1.0, 1.0]).update(planner.init(), 0, [TWO]).operations[1] == Add(2.0 * whole.combination)


def test_any_decay_keeps_a_copy_of_the_anchor() -> None:
    planner: Any = GroupedPlanner(MeZOSVRG(), PROBLEM, (Group(NAMES[0], weight_decay=0.25), GROUPS[1]))
    update = planner.update(planner.init(), 0, [TWO])
    assert update.operations[0] == CopyAnchor()
    assert CopyAnchor() not in update.operations[1:]
    with pytest.raises(ValueError, match=r"algorithm\.anchor"):
        GroupedPlanner(MeZOSVRG(anchor="replay"), PROBLEM, (Group(NAMES[0], weight_decay=0.25), GROUPS[1]))


def test_a_replayed_anchor_has_one_way_back() -> None:
    planner: Any = GroupedPlanner(MeZOSVRG(), PROBLEM, GROUPS)
    moved = planner.at([1e-6, 5e-7]).update(planner.init(), 0, [TWO])
    with pytest.raises(UserError, match="set anchor='stored'"):
        planner.plan(moved.state, 1)


def test_rates_that_nobody_asked_for() -> None:
    plain = MeZOPlanner(MeZO(), PROBLEM)
    assert at_rates(plain, ()) is plain
    with pytest.raises(UserError, match="a step names learning rates"):
        at_rates(plain, (1e-6,))
    with pytest.raises(UserError, match="1 learning rates for 2 groups"):
        at_rates(GroupedPlanner(MeZO(), PROBLEM, GROUPS), (1e-6,))
