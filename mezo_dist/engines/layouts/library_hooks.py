"""Forward hooks that FSDP2 and DeepSpeed put on modules: off while the engine gathers, on while gradients are computed.

Such hooks gather a module when its forward begins and free it when that ends. The engine lets many forward passes
share one gather, so it gathers by itself, without them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, final

from torch import nn

_KINDS = (
    "forward_pre_hooks",
    "forward_pre_hooks_with_kwargs",
    "forward_hooks",
    "forward_hooks_with_kwargs",
    "forward_hooks_always_called",
)
"""Where a module keeps forward hooks, and what it knows of them."""


@final
class LibraryHooks:
    """Hooks that a library put on modules within `taken_off`, and that are on within `put_back`."""

    def __init__(self) -> None:
        self._hooks: list[tuple[dict[int, Any], int, Any]] = []  # where torch keeps it, its key there, what is kept

    @contextlib.contextmanager
    def taken_off(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Take off what is put on ``modules`` within."""
        registries: list[dict[int, Any]] = [getattr(module, f"_{kind}") for module in modules for kind in _KINDS]
        before = [set(registry) for registry in registries]
        yield
        added = [
            (registry, key, hook)
            for registry, keys in zip(registries, before, strict=True)
            for key, hook in registry.items()
            if key not in keys
        ]
        for registry, key, _ in added:
            del registry[key]
        self._hooks += added

    @contextlib.contextmanager
    def put_back(self) -> Iterator[None]:
        """Within, all of them are on."""
        for registry, key, hook in self._hooks:
            registry[key] = hook
        try:
            yield
        finally:
            for registry, key, _ in self._hooks:
                del registry[key]
