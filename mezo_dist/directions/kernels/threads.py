"""Run a compiled job on as many threads as torch computes with: on torch's own ones, where they can be had.

Torch's OpenMP threads keep their cores busy for about a millisecond after every parallel operation, waiting for the
next one. Other threads that want these cores in that time get half of them at best. So work is given to the very team
that waits: through the entry point that compilers of OpenMP programs call, in the library that torch brought along.
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

from mezo_dist.directions.kernels.cpu_jobs import Array

log = logging.getLogger(__name__)
Parallel = Callable[[int, int, int, int], None]
"""``GOMP_parallel(function, argument, threads, flags)``: every thread of a team calls the function."""


def in_threads(function: int, job: Array, num_tasks: int, least: int) -> None:
    """Do the ``num_tasks`` tasks of a job, with ``least`` of them or more for every thread.

    Args:
        function: address of a C function that is given the job's address, and works until all is claimed.
        job: its first three words are filled in here.
    """
    threads = min(torch.get_num_threads(), num_tasks // least)
    pieces = 4 * threads if threads > 1 else 1  # small ones, so that a thread that is held up can do fewer
    job.values[:3] = 0, num_tasks, num_tasks // pieces + 1
    if threads <= 1:
        _callable(function)(job.address)
    # A forked process must not touch OpenMP, which would wait for ever for threads that did not come along.
    elif os.getpid() == _BEGAN_AS and (parallel := torch_team()):
        # As many as torch has, whether or not there is work for all: a team of another size would be a new one.
        parallel(function, job.address, torch.get_num_threads(), 0)
    else:
        _on_own_threads(_callable(function), job.address, threads)


@functools.cache
def _callable(function: int) -> Callable[[int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)


def _on_own_threads(body: Callable[[int], None], job: int, threads: int) -> None:
    others = [_pool(threads - 1).submit(body, job) for _ in range(threads - 1)]
    try:
        body(job)
    finally:
        wait(others)  # also on Ctrl-C: nobody may write to tensors that the caller has given up


@functools.cache
def torch_team() -> Parallel | None:
    """The entry point to torch's own threads; None, and a line in the log, if it is not found."""
    library = _openmp_of_torch()
    try:
        if library is None:
            raise OSError("it brought no OpenMP library along")
        parallel = ctypes.CDLL(str(library)).GOMP_parallel  # of GNU's library; Intel's and LLVM's have it, too
    except (OSError, AttributeError) as error:
        log.info("directions are made on threads beside torch's, which is slower (%s)", error)
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
    found = sorted(path for path in mapped if re.match(r"lib(gomp|iomp5|omp)\b.*\.so", path.name))
    packages = Path(torch.__file__).parents[1]
    own = [path for path in found if {packages / "torch", packages / "torch.libs"} & set(path.parents)]
    return own[0] if own else found[0] if len(found) == 1 else None


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="mezo_dist-add")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
_BEGAN_AS = os.getpid()
