"""Whole splits cut into micro-batches, each of which is made when somebody needs it.

A sample goes through the frozen blocks with the micro-batch that it is in when its whole split is cut
(`mezo_dist.models.frozen_cache`). To make all of them takes time and memory that grow with the samples; to know which
one a sample is in takes lengths and checksums, which the files of samples hold (`SampleIndex`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from mezo_dist.models.frozen_groups import Group
from mezo_dist.storage.sample_file import SampleFile
from mezo_dist.storage.sample_index import SampleIndex, checksum

Numbers = NDArray[Any]


@final
class SplitGroups:
    """The micro-batches of several splits, those of the first one first: `mezo_dist.models.frozen_groups.Groups`.

    Args:
        splits: samples.
        micro_batch: samples of a micro-batch; the last one of a split may have fewer.
        make: makes a micro-batch of samples.
    """

    def __init__(
        self, splits: Sequence[Sequence[Any]], micro_batch: int, make: Callable[[Sequence[Any]], Group]
    ) -> None:
        self._splits, self._size, self._make = splits, micro_batch, make
        counts = [-(-len(split) // micro_batch) for split in splits]
        self._starts = [0, *itertools.accumulate(counts)]

    def group(self, number: int) -> Group:
        """See `Groups`."""
        place = next(place for place, end in enumerate(self._starts[1:]) if number < end)
        first = (number - self._starts[place]) * self._size
        split, order = self._splits[place], self._orders[place]
        return self._make([split[int(index)] for index in order[first : first + self._size]])

    def numbers(self, tokens: bytes) -> list[int]:
        """See `Groups`: the last one counts."""
        checksums, numbers = self._table
        wanted = np.uint32(checksum(tokens))
        start, stop = (int(np.searchsorted(checksums, wanted, side)) for side in ("left", "right"))
        return list(dict.fromkeys(numbers[start:stop][::-1].tolist()))

    @functools.cached_property
    def _indices(self) -> list[SampleIndex]:
        return [split.table if isinstance(split, SampleFile) else SampleIndex.of(split) for split in self._splits]

    @functools.cached_property
    def _orders(self) -> list[Numbers]:
        """The order in which each split is cut: see `mezo_dist.tasks.batches.cut`."""
        return [np.argsort(np.frombuffer(index.lengths, np.uint32), kind="stable") for index in self._indices]

    @functools.cached_property
    def _table(self) -> tuple[Numbers, Numbers]:
        """Checksums of all rows, sorted, and the number of the micro-batch that each is in; equal ones in order."""
        checksums, numbers = [], []
        for start, index, order in zip(self._starts, self._indices, self._orders, strict=False):
            of_sample = np.empty(len(order), np.int64)
            of_sample[order] = start + np.arange(len(order)) // self._size
            numbers.append(np.repeat(of_sample, np.frombuffer(index.counts, np.uint32)))
            checksums.append(np.frombuffer(index.checksums, np.uint32))
        every, number = np.concatenate(checksums), np.concatenate(numbers)
        order = np.lexsort((number, every))
        return every[order], number[order]
