"""The one communicator of a process, for code that has not been started by `mezo-dist`."""

from __future__ import annotations

import torch.distributed as dist

from mezo_dist.distributed.communicator import Communicator
from mezo_dist.distributed.connect import connect, store_holder
from mezo_dist.distributed.watchdog import Watchdog

_joined: Communicator | None = None


def join(timeout_s: float = 600.0, patience_s: float = 30.0) -> Communicator:
    """The processes of this job, as the launcher started them (torchrun, deepspeed, mpirun, srun), or this one alone.

    The first call connects to the others; later ones return the same communicator. If the program has a process group
    already (``torch.distributed.init_process_group``, accelerate), that is used; if it has no gloo for tensors on the
    CPU, where losses are added up, a group of gloo is made beside it. Collective at its first call.

    Args:
        timeout_s: seconds after which a collective gives up on a rank that does not answer.
        patience_s: seconds after which a rank that waits for another one says so, and for which.

    Returns:
        The communicator; ``rank`` and ``world_size`` are its attributes.

    Raises:
        UserError: what the launcher says of this process cannot be.
        LostRankError: the other ranks do not come in time.

    >>> join().world_size
    1
    """
    global _joined
    if _joined is None:
        _joined = _adopt(patience_s) if dist.is_initialized() else connect(timeout_s, patience_s=patience_s)
    return _joined


def _adopt(patience_s: float) -> Communicator:
    """A communicator over the process group that is there, or over one of gloo beside it."""
    group = None if "gloo" in str(dist.get_backend_config()) else dist.new_group(backend="gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    watchdog = Watchdog(store, rank, world_size, patience_s, store_holder(store))
    return Communicator(rank, world_size, watchdog, group=group)
