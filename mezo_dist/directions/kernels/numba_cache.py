"""Compile a function with numba, or take its machine code from numba's cache, whose entries may be damaged or old.

Invariant: machine code from the cache belongs to these sources, this numba and this processor, or is not used.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import llvmlite.binding as llvm  # type: ignore[import-untyped]
import numba

from mezo_dist.patience import patience

log = logging.getLogger(__name__)


def compiled(function: Callable[..., None], signature: str, uses: list[ModuleType]) -> Any:
    """``function`` as a C function (numba's `CFunc`: keep it as long as its ``address`` is in use).

    numba keeps it in NUMBA_CACHE_DIR, beside the function's file or in the user's cache directory, whichever can be
    written. With none of them, with a full disk or a damaged entry: compiled for this process alone.

    Args:
        function: from a module of its own, for the cache knows nothing of compiled functions in other modules.
        signature: the function's types, in numba's notation.
        uses: other modules whose functions or constants are compiled in.
    """
    try:
        # numba's files are named after the function, and it writes an index first, then the code. With one name for
        # ever, a process that starts in between, after an update or on another processor, could load foreign code.
        sources = [function.__code__.co_filename, *(str(module.__file__) for module in uses)]
        function.__qualname__ = f"{function.__name__}_{_fingerprint(sources)}"
        with patience("compiling the CPU kernels, once for this machine"):
            return numba.cfunc(signature, cache=True)(function)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        log.warning(
            "numba's cache cannot be used (%s): the CPU kernels are compiled at every start, which takes seconds; "
            "NUMBA_CACHE_DIR can name another directory",
            error,
        )
        with patience("compiling the CPU kernels"):
            return numba.cfunc(signature)(function)


def _fingerprint(sources: list[str]) -> str:
    """A digest of all that machine code depends on: the sources, numba, the processor."""
    compiler = (numba.__version__, llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten())
    text = b"".join(Path(source).read_bytes() for source in sources) + repr(compiler).encode()
    return hashlib.sha256(text).hexdigest()[:16]
