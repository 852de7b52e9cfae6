"""Scalings of projected gradients against numpy, and groups that are too small for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata

from mezo_dist.algorithms.base import Losses, Problem, Update
from mezo_dist.algorithms.mezo import MeZO, MeZOPlanner
from mezo_dist.algorithms.scaling import Scaling, scaled

FEW_VALUES = st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.5, 1.0, 3.0]), min_size=3, max_size=12)
MANY_VALUES = st.lists(
    st.floats(-1e6, 1e6, allow_subnormal=False).filter(lambda v: v == 0 or abs(v) > 1e-6), min_size=3
)


def z_scores(p: np.ndarray, one_sided: bool) -> np.ndarray:
    deviation = p.std(ddof=1) if one_sided else np.sqrt((p**2).mean())
    return p / deviation if deviation > 1e-12 else 0 * p


def ranks(p: np.ndarray, one_sided: bool) -> np.ndarray:
    if one_sided:
        r = rankdata(p) - (len(p) + 1) / 2
    else:
        r = np.zeros_like(p)
        r[p != 0] = np.sign(p[p != 0]) * rankdata(abs(p[p != 0]))
    size = np.sqrt((r**2).mean())
    return r / size if size else r


@given(values=FEW_VALUES | MANY_VALUES, one_sided=st.booleans())
def test_against_numpy(values: list[float], one_sided: bool) -> None:
    p = np.array(values)
    np.testing.assert_allclose(scaled(values, "ranks", one_sided=one_sided), ranks(p, one_sided), rtol=1e-12)
    if not one_sided or p.std() > 1e-9 * abs(p).max():  # else a deviation is all rounding
        np.testing.assert_allclose(scaled(values, "normalised", one_sided=one_sided), z_scores(p, one_sided), rtol=1e-6)
    np.testing.assert_array_equal(scaled(values, "sign", one_sided=one_sided), np.sign(p))
    assert scaled(values, "plain", one_sided=one_sided) == values


def test_ranks_by_hand() -> None:
    size = np.sqrt((1.5**2 + 1.5**2 + 3**2) / 4)
    assert scaled([0.1, 0.0, -0.1, 900.0], "ranks", one_sided=False) == [1.5 / size, 0.0, -1.5 / size, 3 / size]
    assert scaled([5.0, 7.0, 7.0, 8.0], "ranks", one_sided=True) == pytest.approx(
        np.array([-1.5, 0, 0, 1.5]) * 2**0.5 / 1.5
    )


@pytest.mark.parametrize("one_sided", [False, True])
def test_ranks_are_those_of_the_order_alone(one_sided: bool) -> None:
    planner = MeZOPlanner(MeZO(lr=1.0, eps=0.5, directions=4, scaling="ranks", one_sided=one_sided), Problem(seed=1))
    losses = [1.0, 1.5, 2.5, 1.25, 1.0, 1.0, 0.5, 4.0]
    losses = losses[:5] if one_sided else losses

    def update(losses: list[float]) -> Update[Any]:
        done = planner.update(planner.init(), 0, [Losses(tuple(losses))])
        assert isinstance(done, Update)
        return done

    once = update(losses)
    assert once.combination
    assert once.combination == update([8 * loss - 3 for loss in losses]).combination
    worst = losses.index(max(losses))
    outlier = [*losses[:worst], 1e6, *losses[worst + 1 :]]
    assert once.combination == update(outlier).combination, "an outlier is the largest one, and no more"


def test_a_group_is_all_samples_of_a_step() -> None:
    config = MeZO(lr=1.0, eps=0.5, per_sample=True, scaling="ranks")
    planner = MeZOPlanner(config, Problem(seed=1, batch_size=3))
    each = ((0.0, 1.0, 5.0), (1.0, 1.0, 2.0))  # slopes -1, 0 and 3
    done = planner.update(planner.init(), 0, [Losses((2.0, 4 / 3), each)])
    assert isinstance(done, Update)
    size = np.sqrt((1 + 4) / 3)
    coefficients = {planner.problem.direction_seed(0, i): -rank / size / 3 for i, rank in ((0, -1), (2, 2))}
    assert dict(done.combination.terms) == pytest.approx(coefficients)


@pytest.mark.parametrize(
    ("settings", "batch_size", "least"),
    [
        ({"scaling": "normalised"}, 8, 2),
        ({"scaling": "normalised", "one_sided": True}, 8, 2),
        ({"scaling": "ranks"}, 8, 2),
        ({"scaling": "ranks", "one_sided": True, "directions": 2}, 8, 3),
        ({"scaling": "ranks", "per_sample": True}, 1, 2),
        ({"scaling": "ranks", "per_sample": True, "one_sided": True}, 2, 3),
    ],
)
def test_groups_that_are_too_small(settings: dict[str, Any], batch_size: int, least: int) -> None:
    problem = Problem(batch_size=batch_size)
    with pytest.raises(
        ValueError, match=f"algorithm.directions: must be at least {least} for scaling: {settings['scaling']}"
    ):
        MeZOPlanner(MeZO(**settings), problem)
    enough = {"directions": least} if not settings.get("per_sample") else {}
    MeZOPlanner(MeZO(**settings | enough), replace(problem, batch_size=max(batch_size, least)))


def test_no_change_moves_nothing() -> None:
    scalings: tuple[Scaling, ...] = ("normalised", "ranks")
    for scaling in scalings:
        assert scaled([0.0] * 4, scaling, one_sided=False) == [0.0] * 4
        assert scaled([0.25] * 4, scaling, one_sided=True) == [0.0] * 4
