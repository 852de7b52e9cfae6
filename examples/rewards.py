"""Rewards of written texts, for `train.objective: reward` (configs/reward.yaml, examples/studies/rewards.py).

A function gets the row and the text, and gives a number. Nothing needs to be differentiable.
"""

from __future__ import annotations

from collections.abc import Mapping

TOPICS = ("business", "entertainment", "politics", "sports", "tech")


def one_topic(row: Mapping[str, str], text: str) -> float:
    """What an answer is worth that must be the name of a topic and not a word more: 1 for the right one, 0.25 for
    another one, 0 for all else."""
    if text.lower() not in TOPICS:
        return 0.0
    return 1.0 if text.lower() == row["topic"] else 0.25


def two_keywords(row: Mapping[str, str], text: str) -> float:
    """What an answer is worth that must be two words of the headline with a comma between, and no more: its different
    words of the headline, two at most, over all that it lists, or over two if it lists less."""
    listed = text.lower().split(", ")
    headline = {word.strip("'\"?!.,:;-()") for word in row["headline"].lower().split()}
    return min(len(headline.intersection(listed)), 2) / max(len(listed), 2)
