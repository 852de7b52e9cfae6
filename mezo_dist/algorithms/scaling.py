"""How far a step goes along each of its directions, given the projected gradients of all of them (torch-free).

The projected gradients p_1 .. p_n of a step, one per direction (with ``per_sample``, per sample and direction), are its
group. What is not `plain` looks at each of them relative to its group, so that the learning rate is the length of a
step: n numbers whose root mean square is near 1.

* ``sign``: the sign of p_k.
* ``normalised``: the z-score, p_k over the standard deviation of the group.
* ``ranks``: the place of p_k in the order of the group. One outlier counts no more than any other largest one, and a
  reward means the same under any transformation that keeps the order of its differences (Salimans et al. 2017, arXiv
  1703.03864, rank losses for the same reason).

One-sided estimates all have the same error of curvature, which their mean has too: z-scores and ranks of these are
centred. Two-sided ones lie around 0 and are not: there ranks are those of |p_k|, with the sign of p_k, and a difference
that is exactly zero, as discrete losses have many, stays zero and has no rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Scaling = Literal["plain", "sign", "normalised", "ranks"]
GROUPED = ("normalised", "ranks")
"""Scalings that compare a projected gradient with others of its step."""


def scaled(projected: Sequence[float], scaling: Scaling, *, one_sided: bool) -> list[float]:
    """What takes the place of the projected gradients of a step.

    Args:
        projected: those of the whole group.
        scaling: how.
        one_sided: they are one-sided estimates.
    """
    if scaling == "plain":
        return list(projected)
    if scaling == "sign":
        return [math.copysign(1.0, p) if p else 0.0 for p in projected]
    if scaling == "normalised":
        centre = sum(projected) / len(projected) if one_sided else 0.0
        deviation = math.sqrt(sum((p - centre) ** 2 for p in projected) / (len(projected) - one_sided))
        return [p / deviation if deviation else 0.0 for p in projected]
    ranks = _centred_ranks(projected) if one_sided else _signed_ranks(projected)
    size = math.sqrt(sum(rank * rank for rank in ranks) / len(ranks))
    return [rank / size if size else 0.0 for rank in ranks]


def check_group(scaling: Scaling, members: int, *, one_sided: bool) -> None:
    """Check that a group is large enough for a scaling.

    Args:
        scaling: how.
        members: projected gradients of a step.
        one_sided: they are one-sided estimates.

    Raises:
        ValueError: it is not; the message names the settings.
    """
    least = 3 if scaling == "ranks" and one_sided else 2  # two centred ranks are two signs
    if scaling in GROUPED and members < least:
        sides = " with one_sided" if one_sided else ""
        raise ValueError(
            f"algorithm.directions: must be at least {least} for scaling: {scaling}{sides}, which compares the "
            "projected gradients of a step (with per_sample, those of all its samples); choose scaling: sign for less"
        )


def _ranks(values: Sequence[float]) -> list[float]:
    """Places in ascending order, from 1; equal values share the mean of theirs."""
    order = sorted(values)
    first: dict[float, int] = {}
    last: dict[float, int] = {}
    for place, value in enumerate(order, 1):
        first.setdefault(value, place)
        last[value] = place
    return [(first[value] + last[value]) / 2 for value in values]


def _centred_ranks(values: Sequence[float]) -> list[float]:
    middle = (len(values) + 1) / 2
    return [rank - middle for rank in _ranks(values)]


def _signed_ranks(values: Sequence[float]) -> list[float]:
    sizes = iter(_ranks([abs(value) for value in values if value]))
    return [math.copysign(next(sizes), value) if value else 0.0 for value in values]
