"""The buffer in which variants are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, final

import torch
from torch import Tensor

from mezo_dist.engines.scratch import padded


class Allocate(Protocol):
    """Makes a tensor."""

    def __call__(self, like: Tensor, /, *, dtype: torch.dtype) -> Tensor:
        """A tensor of the shape, and on the device, of another one."""


@final
class ScratchBuffer:
    """One buffer, of which pieces are handed out. It is kept from one hooked module to the next, because fresh memory
    costs page faults.

    Args:
        on_release: called when the buffer goes, so that nobody keeps pieces of it.

    Attributes:
        buffer: the present one, uint8.
    """

    def __init__(self, on_release: Callable[[], None]) -> None:
        self.buffer = torch.empty(0)
        self._most = 0
        self._on_release = on_release

    def release(self) -> None:
        """Give the memory back."""
        self.buffer = torch.empty(0)
        self._on_release()

    def pieces(self, need: int, device: torch.device) -> Allocate:
        """An allocator that hands out pieces, from the beginning of the buffer on.

        Args:
            need: bytes of all that will be handed out, each piece padded.
            device: where.
        """
        self.use(need)
        if self.buffer.numel() < need or self.buffer.device != device:
            self.release()  # before the new one comes
            self.buffer = torch.empty(need, dtype=torch.uint8, device=device)
        used = 0

        def allocate(like: Tensor, /, *, dtype: torch.dtype) -> Tensor:
            nonlocal used
            num_bytes = like.numel() * dtype.itemsize
            piece = self.buffer[used : used + num_bytes].view(dtype).view(like.shape)
            used += padded(num_bytes)
            return piece

        return allocate

    def use(self, num_bytes: int) -> None:
        """Somebody needs so much of the buffer."""
        self._most = max(self._most, num_bytes)

    def end(self) -> None:
        """The passes are over. The buffer stays for the next ones, unless these needed less than half of it: then
        others before them (those that tried out whole logits, say) were the last to need it all."""
        if 2 * self._most < self.buffer.numel():
            self.release()
        self._most = 0
