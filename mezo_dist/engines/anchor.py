"""A kept copy of the trainable weights, such as SVRG's anchor: each rank has one of its own shards, in their dtype.

To evaluate variants of the copy, it changes places with the weights, and changes back afterwards. Nothing is added or
rounded, so both have the same bits as before, wherever the weights live and whatever a forward pass does with them. On
sharded layouts a step takes one gather more: the weights at both of its ends have to be gathered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from mezo_dist.engines.layouts.base import Layout, Shard

ANCHOR_PREFIX = "anchor:"
"""Prefix of the names under which the copy is saved; no parameter's name has a colon."""


@final
class Anchor:
    """A copy of the weights called ``names``, once `copy` was called."""

    def __init__(self, layout: Layout, names: Collection[str]) -> None:
        self._layout = layout
        self._names = frozenset(names)
        self._copies: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        """Whether there is a copy."""
        return bool(self._copies)

    def copy(self) -> None:
        """Copy the weights as they are now. Shards on NVMe are copied to host memory."""
        on_device: list[tuple[Tensor, Tensor]] = []
        for shard in self._copied_shards():
            copy = self._copies.get(shard.name)
            if copy is None:
                self._copies[shard.name] = shard.tensor.clone()
            elif shard.stays and copy.device.type != "cpu":
                on_device.append((copy, shard.tensor))
            else:
                copy.copy_(shard.tensor)
        if on_device:  # few launches
            torch._foreach_copy_([copy for copy, _ in on_device], [tensor for _, tensor in on_device])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the weights have the contents of the copy, and the copy those of the weights.

        Raises:
            RuntimeError: there is no copy.
        """
        if not self:
            raise RuntimeError("a variant is based on the anchor, but none was kept (Engine.copy_anchor)")
        self._layout.exchange(self._copies)
        try:
            yield
        finally:
            self._layout.exchange(self._copies)

    def shards(self) -> Iterator[Shard]:
        """The copy, under names of its own (to be saved, or filled); nothing if none was kept."""
        for shard in self._copied_shards() if self else ():
            yield replace(shard, name=ANCHOR_PREFIX + shard.name, tensor=self._copies[shard.name])

    def _copied_shards(self) -> Iterator[Shard]:
        return (shard for shard in self._layout.shards() if shard.name in self._names)
