"""Runs that do not learn say so, and what may help."""

from __future__ import annotations

from mezo_dist.algorithms.look_back import LEAST
from mezo_dist.runs.advice import CAUTIOUS, STANDS_STILL, STILL, Advice


def said(*steps: dict[str, float], is_calibrated: bool = False) -> list[tuple[int, str]]:
    """(number of the step, what was said after it)."""
    advice = Advice(is_calibrated=is_calibrated)
    return [(number, text) for number, metrics in enumerate(steps, 1) for text in advice.after(metrics)]


def test_steps_without_a_difference() -> None:
    none, some = {"zero_differences": 1.0}, {"zero_differences": 0.5}
    assert said(*[none] * 30) == [(STILL, STANDS_STILL)]
    assert said(*[none] * (STILL - 1), some, *[none] * (STILL - 1), {}, none) == []
    again = said(*[none] * STILL, some, *[none] * STILL)
    assert [number for number, _ in again] == [STILL, 2 * STILL + 1]


def test_a_share_that_stays_at_its_smallest() -> None:
    start, least = {"rate/share": 0.04}, {"rate/share": 0.04 * LEAST}
    ((number, text),) = said(start, start, *[least] * 200)
    assert number == 2 + CAUTIOUS
    assert "train.calibrate" in text
    assert "algorithm.eta: 0.04 keeps the share of the start" in text
    ((_, text),) = said(start, *[least] * CAUTIOUS, is_calibrated=True)
    assert "train.calibrate" not in text
    assert "more algorithm.directions" in text
    assert said(start, *[least] * (CAUTIOUS - 1), start, *[least] * (CAUTIOUS - 1)) == []
    assert said(*[start] * 200) == said(*[{"rate/share": 0.04 * 0.3}] * 200) == said(*[{}] * 200) == []
