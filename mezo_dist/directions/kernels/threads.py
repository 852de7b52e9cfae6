"""Run the compiled kernel on as many threads as torch computes with: on torch's own threads, where possible.

Torch's OpenMP threads keep their cores busy for about a millisecond after every parallel operation, waiting for the
next one. Other threads that want these cores in that time get half of them at best. So the work goes to the team that
waits, through the entry point that compilers of OpenMP programs call, in the library that torch ships.

The plain alternative is a pool of Python threads that run the kernel without the GIL; `_in_pool` is that, for where
torch brought no such library. ``examples/benchmarks/step_cost.py --nogil-pool --repeats 16`` compares the two in one
run: for OPT-125m's shape at 16 x 32 tokens, on two idle cores (AMD EPYC), 2026-11-26, torch 2.13.0, with the pool a
MeZO step takes 1.11 times as long (median of 16 rounds, quartiles 1.05 to 1.16), an inner step of MeZO-SVRG 1.05 times
(1.02 to 1.12).
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import torch

from mezo_dist.directions.kernels.cpu_arguments import Arguments

log = logging.getLogger(__name__)
Parallel = Callable[[int, int, int, int], None]
"""``GOMP_parallel(function, argument, threads, flags)``: every thread of a team calls the function."""


def in_threads(kernel: int, arguments: Arguments, num_tasks: int, min_tasks: int) -> None:
    """Do all tasks of a call of the kernel.

    Args:
        kernel: address of a C function that takes the address of the arguments and works until all tasks are claimed.
        arguments: what the call computes.
        num_tasks: tasks of the call, numbered from 0.
        min_tasks: a thread is used only if there are as many tasks as this for every thread.
    """
    num_threads = share_out(arguments, num_tasks, min_tasks)
    address = ctypes.addressof(arguments)
    if num_threads == 1:
        _callable(kernel)(address)
    # A forked process must not touch OpenMP, which would wait for ever for threads that did not come along.
    elif os.getpid() == _PID_AT_IMPORT and (parallel := torch_team()):
        # As many as torch has, whether or not there is work for all: a team of another size would be a new one.
        parallel(kernel, address, torch.get_num_threads(), 0)
    else:
        _in_pool(_callable(kernel), address, num_threads)


def share_out(arguments: Arguments, num_tasks: int, min_tasks: int) -> int:
    """Cut the tasks into pieces for threads to claim, and return the number of threads that there is work for.

    Args:
        arguments: the pieces are written here.
        num_tasks: tasks of the call, numbered from 0.
        min_tasks: a thread is used only if there are as many tasks as this for every thread.
    """
    num_threads = max(1, min(torch.get_num_threads(), num_tasks // min_tasks))
    num_pieces = 4 * num_threads if num_threads > 1 else 1  # small ones, so that a thread that is held up can do fewer
    arguments.num_claimed = 0
    arguments.num_tasks = num_tasks
    arguments.tasks_per_piece = num_tasks // num_pieces + 1
    return num_threads


@functools.cache
def _callable(kernel: int) -> Callable[[int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(kernel)


def _in_pool(kernel: Callable[[int], None], address: int, num_threads: int) -> None:
    """Call the kernel on ``num_threads`` threads, the caller's among them, each with the address of the arguments.

    Args:
        kernel: a C function.
        address: of its arguments.
        num_threads: how many, the caller's among them.
    """
    others = [_pool(num_threads - 1).submit(kernel, address) for _ in range(num_threads - 1)]
    try:
        kernel(address)
    finally:
        wait(others)  # also on Ctrl-C: nobody may write to tensors that the caller has given up


@functools.cache
def torch_team() -> Parallel | None:
    """The entry point to torch's own threads; None, and a line in the log, if there is none."""
    library = _openmp_of_torch()
    try:
        if library is None:
            raise OSError("it brought no OpenMP library along")
        parallel = ctypes.CDLL(str(library)).GOMP_parallel  # of GNU's library; Intel's and LLVM's have it, too
    except (OSError, AttributeError) as error:
        log.info("directions are generated on threads beside torch's, which is slower (%s)", error)
        return None
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return parallel


def _openmp_of_torch() -> Path | None:
    """The library that this process has loaded for torch: others (of scikit-learn, say) have other threads."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    mapped = {Path(line.split(maxsplit=5)[-1]) for line in maps.read_text().splitlines() if "/" in line}
    libraries = sorted(path for path in mapped if re.match(r"lib(gomp|iomp5|omp)\b.*\.so", path.name))
    packages = Path(torch.__file__).parents[1]
    torchs = [path for path in libraries if {packages / "torch", packages / "torch.libs"} & set(path.parents)]
    return torchs[0] if torchs else libraries[0] if len(libraries) == 1 else None


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="mezo_dist-add")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
_PID_AT_IMPORT = os.getpid()
