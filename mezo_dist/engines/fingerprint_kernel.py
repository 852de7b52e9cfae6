"""What weights in host memory contribute to a fingerprint, compiled by numba, on all of torch's threads.

The formula stands in `mezo_dist.engines.fingerprint`. An element takes 0.3 ns on one thread of an AMD EPYC
(2026-11-26); with numpy it took 17, which for half of a model of 6.7 billion weights was a minute, some times at every
start.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import carray
from numpy import uint64
from torch import Tensor

from mezo_dist.directions.kernels.numba_cache import compiled
from mezo_dist.engines import fingerprint
from mezo_dist.engines.fingerprint import FIRST, GOLDEN, SECOND

PIECE = 1 << 22
"""Elements that are worth a thread: about 5 ms of work."""


# mypy: disable-error-code="no-untyped-def"
def _contributions(elements, count, offset, base):
    """The sum over some elements, modulo 2**64.

    Args:
        elements: pointer to signed integers, the bits of the weights.
        count: int64, how many.
        offset: uint64, index of the first element in the flattened parameter.
        base: uint64, of the parameter.
    """
    values = carray(elements, (count,))
    total = uint64(0)
    for i in range(count):
        x = (offset + uint64(i) + uint64(1)) * uint64(GOLDEN) + base
        x = (x ^ (x >> uint64(30))) * uint64(FIRST)
        x = (x ^ (x >> uint64(27))) * uint64(SECOND)
        x = x ^ (x >> uint64(31)) | uint64(1)
        total += (uint64(np.int64(values[i])) + uint64(1)) * x
    return total


def contributions(bits: Tensor, base: int, offset: int) -> int:
    """The sum over all elements, modulo 2**64.

    Args:
        bits: contiguous, in host memory, signed integers of 8 to 64 bits.
        base: of the parameter, 0..2**64-1.
        offset: index of the first element in the flattened full parameter.
    """
    kernel, address, size = _kernel(bits.element_size()), bits.data_ptr(), bits.element_size()
    pieces = [*range(0, bits.numel(), PIECE), bits.numel()]

    def sum_of(piece: tuple[int, int]) -> int:
        start, end = piece
        return kernel(address + start * size, end - start, offset + start, base)

    threads = min(torch.get_num_threads(), len(pieces) - 1)
    if threads <= 1:
        return sum(map(sum_of, itertools.pairwise(pieces))) % 2**64
    with ThreadPoolExecutor(threads) as pool:  # ctypes lets go of the GIL
        return sum(pool.map(sum_of, itertools.pairwise(pieces))) % 2**64


@functools.cache
def _kernel(itemsize: int) -> Callable[[int, int, int, int], int]:
    """The C function for elements of so many bytes."""
    function = compiled(
        _contributions, f"uint64(CPointer(int{8 * itemsize}), int64, uint64, uint64)", uses=[fingerprint]
    )
    _COMPILED.append(function)
    types = (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64, ctypes.c_uint64)
    return ctypes.CFUNCTYPE(*types)(function.address)


_COMPILED: list[object] = []
"""Machine code lives as long as what it was compiled into."""
