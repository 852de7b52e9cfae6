"""Memory that glibc's malloc keeps instead of giving it back to the system after every layer."""

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
"""Bytes; larger tensors go back at once."""


@functools.cache
def keep_freed_memory() -> None:
    """Let freed activations be used again as they are; for this process, once.

    A fan-out holds the activations of all its passes at a time. By default malloc gives such blocks back to the system
    and gets them anew a layer later, every page of them by a fault: a quarter of a forward pass per MeZO-SVRG step
    of OPT-125M at 16 x 128 tokens. Settings that the user made (``MALLOC_...``) are left alone.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        log.debug("malloc stays as it is: no glibc, or set by environment variables")
        return
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and libc.mallopt(M_TRIM_THRESHOLD, KEPT)):
        log.info("malloc does not take its settings: steps on a CPU spend more time on page faults")
