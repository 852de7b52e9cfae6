"""A fingerprint of weights that does not depend on how they are laid out.

Every element contributes ``(bits + 1) * mix(parameter, index)`` modulo 2**64, and contributions are added: so shards
can be fingerprinted where they live and the sums added up in any order.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor, nn

BLOCK = 1 << 18


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea, Flood 2014), made odd, on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31)) | np.uint64(1)


def fingerprint_shard(tensor: Tensor, param_id: int, offset: int = 0) -> int:
    """Contribution (0..2**64-1) of a shard: ``tensor`` (any dtype of 8 to 64 bits) starts at flat index ``offset``.

    Args:
        tensor: the elements of the shard, of any dtype of 8 to 64 bits.
        param_id: see `mezo_dist.directions.seeds.param_id`.
        offset: index of the first element in the flattened full parameter.
    """
    flat = tensor.detach().reshape(-1)
    view = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[flat.element_size()]
    total = np.uint64(0)
    base = np.uint64((param_id << 32) * 0x9E3779B97F4A7C15 % 2**64)
    for start in range(0, flat.numel(), BLOCK):
        bits = flat[start : start + BLOCK].cpu().view(view).numpy().astype(np.int64).view(np.uint64)
        index = np.arange(offset + start, offset + start + len(bits), dtype=np.uint64)
        golden = (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        with np.errstate(over="ignore"):
            total = np.add(total, np.sum((bits + np.uint64(1)) * _mix(golden + base), dtype=np.uint64))
    return int(total)


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
