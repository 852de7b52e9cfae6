"""A fingerprint of weights that does not depend on how they are laid out.

Every element contributes ``(bits + 1) * mix(parameter, index)`` modulo 2**64, and contributions are added: so shards
can be fingerprinted where they live and the sums added up in any order.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""Constants of splitmix64."""
VIEWS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
BLOCK = 1 << 23
"""Elements that are mixed at a time by torch, which takes some times 64 bits for each of them."""


def fingerprint_shard(tensor: Tensor, param_id: int, offset: int = 0) -> int:
    """Contribution (0..2**64-1) of a shard: ``tensor`` (any dtype of 8 to 64 bits) starts at flat index ``offset``.

    Args:
        tensor: the elements of the shard, of any dtype of 8 to 64 bits.
        param_id: see `mezo_dist.directions.seeds.param_id`.
        offset: index of the first element in the flattened full parameter.
    """
    flat = tensor.detach().reshape(-1)
    bits = flat.view(VIEWS[flat.element_size()])
    base = (param_id << 32) * GOLDEN % 2**64
    add_up = _compiled() if bits.device.type == "cpu" else by_torch
    return add_up(bits, base, offset)


@functools.cache
def _compiled() -> Callable[[Tensor, int, int], int]:
    """The compiled sum; torch's without numba, which `mezo_dist.directions.devices` warns of."""
    try:
        from mezo_dist.engines.fingerprint_kernel import contributions
    except ImportError:
        return by_torch
    return contributions


def by_torch(bits: Tensor, base: int, offset: int) -> int:
    """The sum of the contributions, by torch's operations where the weights are; the reference of
    `mezo_dist.engines.fingerprint_kernel`.

    Integers of 64 bits wrap around, so that signed ones serve.

    Args:
        bits: signed integers of 8 to 64 bits.
        base: of the parameter, 0..2**64-1.
        offset: index of the first element in the flattened full parameter.
    """
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), BLOCK):
        block = bits[start : start + BLOCK].to(torch.int64)
        index = torch.arange(offset + start, offset + start + len(block), device=bits.device)
        mixed = _mix((index + 1) * _signed(GOLDEN) + _signed(base))
        total += ((block + 1) * mixed).sum()
    return int(total) % 2**64


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser (Steele, Lea, Flood 2014), made odd."""
    x = (x ^ _shifted(x, 30)) * _signed(FIRST)
    x = (x ^ _shifted(x, 27)) * _signed(SECOND)
    return x ^ _shifted(x, 31) | 1


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, as if ``x`` were unsigned."""
    return x >> by & ((1 << (64 - by)) - 1)


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def to_text(total: int) -> str:
    """The fingerprint, 16 hexadecimal digits, from the sum of the contributions of all shards of all parameters."""
    return f"{total % 2**64:016x}"


def buffers_digest(model: nn.Module) -> str:
    """32 hexadecimal digits over the buffers that a model saves (running statistics, routing biases): no step changes
    them, and every loss depends on them."""
    digest = hashlib.blake2b(digest_size=16)
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None or buffer.is_meta or name in module._non_persistent_buffers_set:
                continue
            content = buffer.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            digest.update(f"{path}.{name} {buffer.dtype} {tuple(buffer.shape)}".encode() + content)
    return digest.hexdigest()
