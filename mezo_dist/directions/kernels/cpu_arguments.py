"""Arguments of the compiled kernel: one record that Python writes by name and every thread reads by name.

Invariant: `Arguments` is the only definition of the layout. Python fills it in as a C structure; the kernel sees the
same bytes as a numpy record (`RECORD`). A structure is written in 1.2 us and its address is free, where a record made
by numpy takes 5 us written by position and 15 us written by name: as long as adding to a small weight.

The kernel is a C function of one address, so threads run it without the GIL. A thread that waits for the GIL is asleep
when it gets it, and to wake takes as long as adding to a small weight.
"""

from __future__ import annotations

import ctypes

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray, njit
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy import uint64

SIGNATURE = "void(uint64)"
"""Signature of a kernel: its argument is the address of an `Arguments`."""


class Arguments(ctypes.Structure):
    """What a call of the kernel computes, and how far it is.

    A call takes each of ``num_rows`` equally long pieces of a weight through ``num_updates`` updates; see `cpu_kernel`.
    Addresses point to arrays that the caller keeps until all threads are done.
    """

    _fields_ = (
        # How threads share the tasks; `threads.in_threads` fills these in. A task is one chunk of one row.
        ("num_claimed", ctypes.c_uint64),  # pieces of work that threads have claimed so far
        ("num_tasks", ctypes.c_int64),
        ("tasks_per_piece", ctypes.c_int64),
        # The weight
        ("weight", ctypes.c_uint64),  # its address
        ("weight_kind", ctypes.c_int64),  # its dtype: FP32, BF16 or FP16 of `cpu_kernel`
        # Sizes
        ("num_outputs", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        ("row_length", ctypes.c_int64),  # elements
        ("chunks_per_row", ctypes.c_int64),  # chunks that a row can touch, at worst
        ("num_updates", ctypes.c_int64),
        ("num_terms", ctypes.c_int64),  # all updates together
        # Directions
        ("param_id", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),  # the generator's
        ("is_gaussian", ctypes.c_bool),  # else rademacher
        ("is_stochastic", ctypes.c_bool),  # bf16 outputs are rounded stochastically
        # Addresses of arrays
        ("outputs", ctypes.c_uint64),  # uint64 [num_outputs]: their addresses
        ("kinds", ctypes.c_uint64),  # int64 [num_outputs]: their dtypes, as weight_kind
        ("offsets", ctypes.c_uint64),  # int64 [num_rows]: index of each row's first element in the full parameter
        ("seeds", ctypes.c_uint64),  # uint64 [num_terms]
        ("coefficients", ctypes.c_uint64),  # fp32 [num_terms, num_outputs]; zero: this output has no such term
        ("ends", ctypes.c_uint64),  # int64 [num_updates]: update u has the terms ends[u - 1] .. ends[u]
        ("rounding_seeds", ctypes.c_uint64),  # uint64 [num_updates], read only if is_stochastic
        ("table", ctypes.c_uint64),  # fp32 [65536]: the values of the gaussian law
    )


RECORD = np.dtype(Arguments)
NUM_CLAIMED = uint64(Arguments.num_claimed.offset)

# mypy: disable-error-code="no-untyped-def"


@intrinsic
def _pointer(typing_context, address):
    """An integer as a pointer, for `carray`: one compiled kernel serves every mix of dtypes."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.uint64), generate


@intrinsic
def _fetch_and_add(typing_context, address, amount):
    """Add to the 64-bit word at ``address`` and return what it was before. No two threads get the same value.

    Args:
        typing_context: numba's.
        address: of the word.
        amount: what is added to it.
    """

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "monotonic")

    return types.uint64(types.uint64, types.uint64), generate


@njit
def view(address, dtype, start, stop):
    """Elements [start, stop) of the array at ``address``.

    Args:
        address: uint64.
        dtype: the elements' dtype.
        start: first element.
        stop: the element after the last one.
    """
    return carray(_pointer(address), stop, dtype)[start:]


@njit
def arguments_at(address):
    """The record at ``address``: its fields can be read as attributes."""
    return carray(_pointer(address), 1, RECORD)[0]


@njit
def claim(address):
    """Claim a piece of the tasks for the calling thread alone.

    Args:
        address: uint64, that of an `Arguments`.

    Returns:
        (first task, task after the last one); the first is not below the second when all tasks are claimed.
    """
    arguments = arguments_at(address)
    first = np.int64(_fetch_and_add(address + NUM_CLAIMED, uint64(1))) * arguments.tasks_per_piece
    return first, min(first + arguments.tasks_per_piece, arguments.num_tasks)
