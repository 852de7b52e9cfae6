"""Jobs of the compiled kernels: what a thread gets to know, and how threads share out the pieces of a job.

A job is an array of 64-bit words: three that `threads.in_threads` fills in (see `claim`), then the kernel's own:
numbers, and addresses of arrays. A kernel is a C function of the address of the job, so that threads need not the GIL:
one that waits for it is asleep when it gets it, and to wake costs as much as a small weight.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray, njit
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy import int64, uint64

JOB = "void(uint64)"
"""Signature of a kernel: its argument is the address of the job."""

# mypy: disable-error-code="no-untyped-def"


@intrinsic
def _pointer(typing_context, address):
    """An integer as a pointer, for `carray`: so one compiled kernel serves every mix of dtypes."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.uint64), generate


@intrinsic
def _fetch_and_add(typing_context, address, amount):
    """Add to the 64-bit word at ``address``; what was there before. No two threads get the same."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "monotonic")

    return types.uint64(types.uint64, types.uint64), generate


@njit
def view(address, dtype, start, stop):
    """Elements [start, stop) of the array at ``address``."""
    return carray(_pointer(address), stop, dtype)[start:]


@njit
def claim(job):
    """(first, stop) of a piece of the tasks of the job at ``job`` that is nobody else's; first >= stop: all are taken.

    Its first words are: number of pieces that were claimed, number of tasks, tasks of a piece.
    """
    words = view(job, np.uint64, 0, 3)
    first = int64(_fetch_and_add(uint64(job), uint64(1)) * words[2])
    return first, min(first + int64(words[2]), int64(words[1]))


class Array:
    """An array that a job points to. Asking numpy for an address takes as long as a small weight: it is asked once."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self.address: int = values.ctypes.data

    def __len__(self) -> int:
        return len(self.values)


def job_of(*words: int) -> Array:
    """A job; the caller keeps the arrays to whose addresses it points."""
    return Array(np.array([0, 0, 0, *words], dtype=np.uint64))
