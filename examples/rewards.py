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
    """What an answer is worth that must be two words of the headline with a comma between, and not a word more: 0.25
    for two words, 0.375 more for each of them that stands in the headline, 0 for all else."""
    words = text.lower().split(", ")
    if len(words) != 2 or not all(word.isalpha() for word in words):
        return 0.0
    headline = {word.strip("'\"?!.,:;-()") for word in row["headline"].lower().split()}
    return 0.25 + 0.375 * len(headline.intersection(words))
