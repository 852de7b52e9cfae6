"""Host memory: the size of its pages, and what glibc's malloc does with freed blocks.

Weights stream through the CPU several times a step, and on pages of 4 KB much of that is waiting for their addresses,
on virtual machines above all. Where the system gives pages of 2 MB to those who ask (``transparent_hugepage`` is
``madvise``, a common default), torch asks if it is told to.

malloc keeps freed blocks for the next layer, or gives them back to the system. By default it decides from the blocks
that it has seen, and is wrong in two cases (figures from two cores, OPT shapes).

* With whole weights, the blocks that come and go are the activations of all passes of a fan-out, in the same sizes
  layer after layer. If they are given back, every page of them comes with a fault the next time: a quarter of a forward
  pass per MeZO-SVRG step of OPT-125M at 16 x 128 tokens. So they are kept.
* With sharded weights, gathered weights of many sizes are among these blocks, and what is kept is in pieces too small
  for the next one: OPT-1.3B on two ranks took 6.2 GiB, where 4.7 are in use (9 to 11 GiB, if kept as above). So all but
  small blocks are given back.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform

log = logging.getLogger(__name__)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT = 2**31 - 1
"""Bytes of freed memory that stay with the process at most (the largest value that mallopt takes)."""
LARGEST_KEPT = 2**30
"""Bytes; larger blocks go back at once."""
LARGEST_KEPT_IF_SHARDED = 2**20
"""Bytes. Once this is set, malloc stops adapting it to the blocks that it sees."""


def ask_for_huge_pages() -> None:
    """Have torch ask for large pages for its tensors. It has no effect after torch has made the first tensor."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


@functools.cache
def tune_malloc(*, is_sharded: bool) -> None:
    """Set, once for this process, what malloc does with freed blocks: keep them with whole weights, give them back with
    sharded ones.

    The command line calls this. A library must not change the memory of somebody else's process.
    """
    if is_sharded:
        _set("hold more memory than they use", (M_MMAP_THRESHOLD, LARGEST_KEPT_IF_SHARDED))
    else:
        _set("spend more time on page faults", (M_MMAP_THRESHOLD, LARGEST_KEPT), (M_TRIM_THRESHOLD, KEPT))


def _set(otherwise: str, *settings: tuple[int, int]) -> None:
    """Settings that the user made (``MALLOC_...``) are left alone."""
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        log.debug("malloc stays as it is: no glibc, or set by environment variables")
        return
    libc = ctypes.CDLL(None)
    if not all(libc.mallopt(*setting) for setting in settings):
        log.info("malloc does not take its settings: steps on a CPU %s", otherwise)
