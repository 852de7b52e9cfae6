"""Counts what engines gather, from the collectives themselves, whoever calls them."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


@final
class Meter(TorchDispatchMode):
    """While active (``with meter:``) it counts every collective that torch dispatches.

    Attributes:
        gathers: number of collectives.
        num_bytes: what they brought to this rank: bytes of their outputs, this rank's own share among them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gathers = 0
        self.num_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        if func.namespace == "c10d":
            self.gathers += 1
            outputs = pytree.tree_leaves(args[0])  # of c10d's collectives the first argument is what they write to
            self.num_bytes += sum(t.numel() * t.element_size() for t in outputs if isinstance(t, Tensor))
        return func(*args, **(kwargs or {}))
