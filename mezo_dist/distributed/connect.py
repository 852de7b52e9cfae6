"""Joining the process group that the launcher describes in the environment."""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch
import torch.distributed as dist

from mezo_dist.distributed import environment
from mezo_dist.distributed.communicator import Communicator, backend
from mezo_dist.distributed.rendezvous import rendezvous, wait_until_connected
from mezo_dist.distributed.watchdog import Watchdog
from mezo_dist.errors import UserError


def connect(timeout_s: float, init_method: str | None = None, patience_s: float = 30.0) -> Communicator:
    """Join the process group that the launcher describes in the environment; see `mezo_dist.distributed.environment`.

    In a world of one no process group is made. Scalars always travel through gloo on the CPU; NCCL is set up beside it
    where there are GPUs, for the engines that gather weights.

    Args:
        timeout_s: seconds after which a collective gives up on a rank that does not answer.
        patience_s: seconds after which a rank that waits for another one says so, and for which.
        init_method: where ranks meet, if not where the environment says (``file:///...`` in tests).

    Raises:
        UserError: the environment describes a rank only in part, or the other ranks do not answer in time.
    """
    defaults = {"MASTER_ADDR": "unused", "MASTER_PORT": "1"} if init_method else {}
    me = environment.discover({**defaults, **os.environ})
    if me.world_size == 1:
        return Communicator()
    share_cores(me.local_world_size)
    where = init_method or rendezvous_url(me)
    place: dict[str, Any] = {"rank": me.rank, "world_size": me.world_size}
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        store = rendezvous(next(dist.rendezvous(where, timeout=timeout, **place))[0], timeout_s=timeout_s, **place)
        dist.init_process_group(backend(), store=store, timeout=timeout, **place)
        wait_until_connected(store, me.world_size, timeout_s)
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {me.rank} of {me.world_size} (from {me.launcher}) could not join the others at {where} "
            f"within distributed.timeout_s = {timeout_s:g} s: {error}\n"
            "`mezo-dist doctor`, started the same way, says what is wrong"
        ) from error
    store = dist.distributed_c10d._get_default_store()
    watch = Watchdog(store, me.rank, me.world_size, min(patience_s, timeout_s / 4))
    return Communicator(me.rank, me.world_size, watch, me.local_world_size)


def rendezvous_url(me: environment.ClusterEnvironment) -> str:
    """A URL for `init_process_group`. torch knows by itself where torchrun has a store there already."""
    address, port = (me.address, me.port) if me.address else environment.rendezvous_through_mpi(me)
    if not me.on_one_host:
        choose_interface(address)
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


def choose_interface(address: str) -> str:
    """Have gloo talk through the network card that leads to ``address``, unless GLOO_SOCKET_IFNAME names one already.

    By itself gloo takes the card of this host's own name, which on many systems is the loopback: nobody else's.
    """
    if not os.environ.get("GLOO_SOCKET_IFNAME") and (interface := environment.interface_towards(address)):
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    return os.environ.get("GLOO_SOCKET_IFNAME", "")


def share_cores(ranks_here: int) -> None:
    """Give each of several ranks on this host its part of the cores, unless OMP_NUM_THREADS says how many it takes.

    torchrun does so, after its fashion (one thread each); other launchers leave every rank to take all cores, and two
    ranks that do are 20 times slower than two that share them.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // max(1, ranks_here))
    if ranks_here > 1 and "OMP_NUM_THREADS" not in os.environ and threads < torch.get_num_threads():
        torch.set_num_threads(threads)
