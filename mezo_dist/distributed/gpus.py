"""Which GPU a process works on: one process per GPU, and either all processes have one or none has.

Scalars travel through gloo on the CPU, weights through NCCL. A round is one message of 256 bytes, which is on the host
already when it is sent: NCCL would take it to the GPU and back, and wait for the GPU a second time. (This was reasoned,
not measured: several GPUs were never at hand.)
"""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist

from mezo_dist.distributed.environment import ClusterEnvironment
from mezo_dist.errors import UserError

log = logging.getLogger(__name__)


def choose_gpu(local_rank: int) -> torch.device | None:
    """The GPU of this process, which is made the current one; None if it sees none.

    Args:
        local_rank: number of the process among those of its host. Where it sees fewer GPUs (launchers may show each
            process its own alone), it takes the first.
    """
    if not torch.cuda.is_available():
        return None
    device = torch.device("cuda", local_rank if local_rank < torch.cuda.device_count() else 0)
    torch.cuda.set_device(device)
    return device


def name_of(device: torch.device | None) -> str:
    """What tells a GPU from all others; empty if there is none."""
    return "" if device is None else str(torch.cuda.get_device_properties(device).uuid)


def compare_gpus(store: dist.Store, me: ClusterEnvironment, name: str) -> None:
    """Hold the GPUs of all processes against one another. Collective.

    Args:
        store: where the processes meet.
        me: this process.
        name: of its GPU, see `name_of`.

    Raises:
        UserError: two processes have the same GPU, or some have one and others none.
    """
    store.set(f"gpu/{me.rank}", name or "none")
    names = [text.decode() for text in store.multi_get([f"gpu/{rank}" for rank in range(me.world_size)])]
    without = [rank for rank, other in enumerate(names) if other == "none"]
    if without and len(without) < len(names):
        raise UserError(
            f"rank(s) {_some(without)} see no GPU, but other ranks do: give every process one, or hide them from all "
            "(CUDA_VISIBLE_DEVICES='')"
        )
    for other in dict.fromkeys(names):
        sharing = [rank for rank, another in enumerate(names) if another == other != "none"]
        if len(sharing) > 1:
            raise UserError(f"ranks {_some(sharing)} are on the same GPU ({other}): start one process per GPU")
    if not without and me.rank == 0:
        log.info("one GPU per rank: weights travel through NCCL, scalars through gloo on the CPU")


def _some(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
