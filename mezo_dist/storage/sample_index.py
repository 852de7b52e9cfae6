"""What can be known of encoded samples without reading them: how long they are, and what tells their tokens apart."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol


class EncodedSample(Protocol):
    """A frozen dataclass of numbers, texts and tuples."""

    @property
    def num_tokens(self) -> int:
        """Length of its longest sequence."""

    @property
    def rows(self) -> Sequence[tuple[int, ...]]:
        """Token ids of its sequences."""


@dataclass(frozen=True)
class SampleIndex:
    """What can be known of samples without reading them, as unsigned 32-bit integers."""

    lengths: array[int]
    """``num_tokens`` of each sample."""
    counts: array[int]
    """Number of ``rows`` of each sample."""
    checksums: array[int]
    """`checksum` of all rows, sample by sample."""

    @staticmethod
    def of(samples: Iterable[EncodedSample]) -> SampleIndex:
        """The index of some samples."""
        index = SampleIndex(array("I"), array("I"), array("I"))
        for sample in samples:
            rows = sample.rows
            index.lengths.append(sample.num_tokens)
            index.counts.append(len(rows))
            for ids in rows:
                index.checksums.append(zlib.crc32(array("q", ids)))
        return index

    @property
    def parts(self) -> tuple[array[int], ...]:
        """In the order in which they stand in a file."""
        return self.lengths, self.counts, self.checksums

    def extend(self, other: SampleIndex) -> None:
        """Add what is known of further samples."""
        for part, more in zip(self.parts, other.parts, strict=True):
            part.extend(more)


def checksum(tokens: bytes) -> int:
    """32 bits that tell most sequences of tokens apart.

    Args:
        tokens: int64, as they lie in memory.
    """
    return zlib.crc32(tokens)
