"""`Combination`: a finite sum of coefficient x direction (torch-free).

Invariant: a combination is canonical. Its terms are sorted by seed, no seed occurs twice, every coefficient is a
finite non-zero number that fp32 holds exactly. So equal sums compare equal, hash equal, serialise equal, and
"the terms in order" means the same on every rank, in every kernel and after every reload.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass


class CoefficientError(ValueError):
    """A coefficient is not finite in fp32."""


def to_fp32(value: float) -> float:
    """``value`` rounded to the nearest fp32, as a Python float.

    Raises:
        CoefficientError: the value is not finite in fp32.
    """
    try:
        rounded = struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        rounded = math.inf
    if not math.isfinite(rounded):
        raise CoefficientError(f"a coefficient must be finite in fp32, not {value!r}")
    return rounded


@dataclass(frozen=True)
class Combination:
    """``sum_k c_k z(seed_k)`` as ``terms = ((seed_k, c_k), ...)``; build it with `Combination.of`.

    Seeds are 64-bit unsigned integers, coefficients fp32 values kept as Python floats.

    >>> step = Combination.of([(7, -0.5), (3, 0.25), (7, 0.25)])
    >>> step.terms
    ((3, 0.25), (7, -0.25))
    >>> (step + -step).terms
    ()
    """

    terms: tuple[tuple[int, float], ...] = ()

    @staticmethod
    def of(terms: Iterable[tuple[int, float]]) -> Combination:
        """The canonical combination of ``terms``: coefficients of equal seeds are added in fp64, then rounded once.

        Raises:
            CoefficientError: a coefficient is not finite in fp32.
            ValueError: a seed is not a 64-bit unsigned integer.
        """
        total: dict[int, float] = {}
        for seed, coefficient in terms:
            if not 0 <= seed < 2**64:
                raise ValueError(f"a seed must be a 64-bit unsigned integer, not {seed!r}")
            total[seed] = total.get(seed, 0.0) + coefficient
        rounded = ((seed, to_fp32(c)) for seed, c in sorted(total.items()))
        return Combination(tuple((seed, c) for seed, c in rounded if c != 0.0))

    @staticmethod
    def single(seed: int, coefficient: float) -> Combination:
        """``coefficient * z(seed)``."""
        return Combination.of([(seed, coefficient)])

    def __add__(self, other: Combination) -> Combination:
        return Combination.of([*self.terms, *other.terms])

    def __neg__(self) -> Combination:
        return Combination(tuple((seed, -c) for seed, c in self.terms))

    def __sub__(self, other: Combination) -> Combination:
        return self + -other

    def __mul__(self, factor: float) -> Combination:
        return Combination.of((seed, factor * c) for seed, c in self.terms)

    __rmul__ = __mul__

    def __bool__(self) -> bool:
        return bool(self.terms)

    def __len__(self) -> int:
        return len(self.terms)

    def to_json(self) -> list[list[int | float]]:
        """``[[seed, coefficient], ...]``; `from_json` gives back an equal combination."""
        return [[seed, c] for seed, c in self.terms]

    @staticmethod
    def from_json(data: Iterable[Iterable[int | float]]) -> Combination:
        """Read what `to_json` wrote.

        Raises:
            ValueError: anything but a list of [seed, coefficient].
        """
        terms = []
        for pair in data:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise ValueError(f"a term must be [seed, coefficient], not {pair!r}")
            seed, coefficient = pair
            if not isinstance(seed, int) or isinstance(seed, bool) or not isinstance(coefficient, (int, float)):
                raise ValueError(f"a term must be [integer seed, number], not {pair!r}")
            terms.append((seed, float(coefficient)))
        return Combination.of(terms)


ZERO = Combination()
