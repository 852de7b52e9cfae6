"""Orders of samples: those of the seeds of their numbers, whatever makes them."""

from __future__ import annotations

import pytest

from mezo_dist.directions.seeds import derive_seed, shuffled


@pytest.mark.parametrize(
    ("size", "seed", "purpose"),
    [(0, 0, ("a",)), (1, 3, ("order", 2)), (700, 0, ("split", "a/b\\c")), (999, -5, ("x", 0))],
)
def test_a_shuffle_is_the_order_of_seeds(size: int, seed: int, purpose: tuple[str | int, ...]) -> None:
    expected = sorted(range(size), key=lambda number: derive_seed(seed, *purpose, number))
    assert list(shuffled(size, seed, *purpose)) == expected


def test_a_shuffle_is_what_it_always_was() -> None:
    assert list(shuffled(8, 0, "order", 0)) == [1, 2, 3, 4, 5, 6, 0, 7]
