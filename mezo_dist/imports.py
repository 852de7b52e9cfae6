"""Large packages are imported without searches for unused objects, which take a tenth of the time of a start."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def imports_at_once(*, for_good: bool = False) -> Iterator[None]:
    """Context manager around imports of large packages.

    While a million objects come that all stay, Python looks through all of them over and over again for those that
    only use each other. Within, it does not. Weights should not be loaded here: what uses only itself would stay.

    Args:
        for_good: nor does Python look at what is there now later: for the main program, all of whose objects stay.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if for_good:
            gc.freeze()
        if was_on:
            gc.enable()
