"""Joining the process group that the launcher describes in the environment."""

from __future__ import annotations

import datetime
import logging
import os
import socket
import time

import torch
import torch.distributed as dist

from mezo_dist.distributed import environment
from mezo_dist.distributed.bounded import bounded
from mezo_dist.distributed.communicator import Communicator, backend
from mezo_dist.distributed.environment import ClusterEnvironment
from mezo_dist.distributed.gpus import choose_gpu, compare_gpus, name_of
from mezo_dist.distributed.orphans import end_with_launcher
from mezo_dist.distributed.rendezvous import rendezvous, wait_until_connected
from mezo_dist.distributed.watchdog import Watchdog
from mezo_dist.errors import LostRankError, UserError

log = logging.getLogger(__name__)
HINT_S = 5.0
"""Seconds of waiting for other ranks at the start after which a rank says for whom it waits."""
MARGIN_S = 5.0
"""What a call that has a time-out of its own may take beyond it."""


def connect(timeout_s: float, init_method: str | None = None, patience_s: float = 30.0) -> Communicator:
    """Join the process group that the launcher describes in the environment; see `mezo_dist.distributed.environment`.

    In a world of one no process group is made. Scalars always travel through gloo on the CPU; where there are GPUs
    (`mezo_dist.distributed.gpus`), NCCL is set up beside it, for the layouts that gather weights. A process that a
    launcher started ends with it from now on; see `mezo_dist.distributed.orphans`.

    Args:
        timeout_s: seconds after which a collective gives up on a rank that does not answer.
        init_method: where ranks meet, if not where the environment says (``file:///...`` in tests).
        patience_s: seconds after which a rank that waits for another one says so, and for which.

    Raises:
        UserError: the environment describes a rank only in part, or what it says cannot be; some ranks have no GPU, and
            others do.
        LostRankError: the other ranks do not come in time.
    """
    defaults = {"MASTER_ADDR": "unused", "MASTER_PORT": "1"} if init_method else {}
    me = environment.discover({**defaults, **os.environ})
    gpu = choose_gpu(me.local_rank)
    if me.world_size == 1:
        comm = Communicator()
        end_with_launcher(me.launcher, lambda: comm.wants_stop)
        return comm
    share_cores(me.local_world_size)
    deadline = time.monotonic() + timeout_s
    where = init_method or rendezvous_url(me, timeout_s)
    try:
        store = bounded(lambda: open_store(me, where, deadline), timeout_s + MARGIN_S)
        fresh_store = bounded(lambda: _rendezvous(store, me, deadline, where), timeout_s + MARGIN_S)
        timeout = datetime.timedelta(seconds=timeout_s)
        bounded(lambda: compare_gpus(fresh_store, me, name_of(gpu)), timeout_s + MARGIN_S)
        dist.init_process_group(
            backend(), store=fresh_store, timeout=timeout, rank=me.rank, world_size=me.world_size, device_id=gpu
        )
        wait_until_connected(fresh_store, me.world_size, timeout_s)
    except TimeoutError as error:
        raise UserError(
            f"{_joining(me, where, timeout_s)}: something there takes connections and says nothing. Either another "
            "service has this port (set MASTER_PORT to a free one, the same on all ranks), or rank 0 hangs"
        ) from error
    except UserError:
        raise
    except (LostRankError, RuntimeError, ValueError) as error:  # torch's own are RuntimeErrors
        raise _explained(error, me, where, timeout_s) from error
    store = dist.distributed_c10d._get_default_store()
    watchdog = Watchdog(store, me.rank, me.world_size, min(patience_s, timeout_s / 4), store_holder(store))
    comm = Communicator(me.rank, me.world_size, watchdog, me.local_world_size, timeout_s=timeout_s)
    end_with_launcher(me.launcher, lambda: comm.wants_stop)
    return comm


def open_store(me: ClusterEnvironment, where: str, deadline: float) -> dist.Store:
    """The key-value store where the ranks meet: rank 0 holds it, but under torchrun, whose agent does.

    Args:
        me: what the launcher said about this process.
        where: URL at which ranks meet.
        deadline: time (`time.monotonic`) at which to give up.
    """
    left = datetime.timedelta(seconds=max(1.0, deadline - time.monotonic()))
    if not where.startswith("tcp://") or _has_agent():
        return next(dist.rendezvous(where, timeout=left, rank=me.rank, world_size=me.world_size))[0]
    address, _, port = where.removeprefix("tcp://").rpartition(":")
    if me.rank:
        _wait_for_listener(address.strip("[]"), int(port), deadline)
        left = datetime.timedelta(seconds=max(1.0, deadline - time.monotonic()))
    # Not torch's own rendezvous: that waits for all ranks at once, without a word about who is missing.
    return dist.TCPStore(address.strip("[]"), int(port), is_master=me.rank == 0, timeout=left, wait_for_workers=False)


def _wait_for_listener(address: str, port: int, deadline: float) -> None:
    """Raises LostRankError if nobody listens there until ``deadline``; says after a while that nobody does.

    Args:
        address: host name or address.
        port: TCP port.
        deadline: time (`time.monotonic`) at which to give up.
    """
    hint_at = min(time.monotonic() + HINT_S, deadline)
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((address, port), timeout=max(0.1, left)).close()
            return
        except OSError as error:
            if left <= 0:
                raise LostRankError(
                    f"nothing listens at {address}:{port} ({error}): rank 0 is not running there, or a firewall is in "
                    "the way"
                ) from error
        if time.monotonic() > hint_at:
            hint_at = float("inf")
            log.warning("rank 0 does not listen at %s:%d yet; waiting for up to %.0f s more", address, port, left)
        time.sleep(min(0.2, max(0.0, left)))


def _rendezvous(store: dist.Store, me: ClusterEnvironment, deadline: float, where: str) -> dist.Store:
    """`rendezvous` until the deadline.

    Args:
        store: where the ranks meet.
        me: what the launcher said about this process.
        deadline: time (`time.monotonic`) at which to give up.
        where: URL of the store, for messages.
    """
    left = max(0.0, deadline - time.monotonic())
    return rendezvous(store, me.rank, me.world_size, left, min(HINT_S, left / 2), f" at {where}{me.hint}")


def _has_agent() -> bool:
    """Whether torchrun's agent holds the store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def store_holder(store: dist.Store) -> tuple[str, int] | None:
    """Where rank 0 holds ``store``; None if a file or torchrun's agent does."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return (store.host, store.port) if isinstance(store, dist.TCPStore) and not _has_agent() else None


def _joining(me: ClusterEnvironment, where: str, timeout_s: float) -> str:
    """What failed, for the begin of a message.

    Args:
        me: what the launcher said about this process.
        where: URL at which ranks meet.
        timeout_s: seconds that were waited.
    """
    return (
        f"rank {me.rank} of {me.world_size} (from {me.launcher}) could not join the others at {where} within "
        f"distributed.timeout_s = {timeout_s:g} s"
    )


def _explained(error: Exception, me: ClusterEnvironment, where: str, timeout_s: float) -> UserError | LostRankError:
    """What torch's failure to connect means: an error of the user's, or a rank that is not there.

    Args:
        error: torch's.
        me: what the launcher said about this process.
        where: URL at which ranks meet.
        timeout_s: seconds that were waited.
    """
    joining, doctor = _joining(me, where, timeout_s), "`mezo-dist doctor`, started the same way, says what is wrong"
    if "EADDRINUSE" in str(error):
        return UserError(
            f"{joining}: the port is taken on {socket.gethostname()}, by another program or another job; set "
            "MASTER_PORT to a free one, the same on all ranks"
        )
    if "Ping failed" in str(error):
        return UserError(
            f"{joining}: what answers there is no rank 0, but another service; set MASTER_PORT to a free port, the "
            "same on all ranks"
        )
    return LostRankError(f"{joining}: {error}{me.hint}\n{doctor}")


def rendezvous_url(me: ClusterEnvironment, timeout_s: float) -> str:
    """A URL for `init_process_group`. torch knows by itself where torchrun has a store there already.

    Raises:
        UserError: no such host is known here, and none became known within ``timeout_s`` seconds.
    """
    address, port = (me.address, me.port) if me.address else environment.rendezvous_through_mpi(me)
    wait_for_name(address, timeout_s)
    if not me.on_one_host:
        choose_interface(address)
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


def wait_for_name(host: str, timeout_s: float) -> None:
    """Wait until ``host`` can be resolved: in Kubernetes a name appears with its pod.

    Raises:
        UserError: that did not happen within ``timeout_s`` seconds.
    """
    began, has_said = time.monotonic(), False
    while True:
        left = began + timeout_s - time.monotonic()
        try:
            bounded(lambda: socket.getaddrinfo(host, None), max(0.1, left))
            return
        except (OSError, UnicodeError, TimeoutError) as error:  # UnicodeError: no name at all
            if left <= 0:
                raise UserError(
                    f"MASTER_ADDR: {host} is not known on {socket.gethostname()} ({error}), and was not for "
                    f"distributed.timeout_s = {timeout_s:g} s; set it to a name or an address of rank 0's host that "
                    "all hosts know"
                ) from error
            if not has_said and timeout_s - left > HINT_S:
                has_said = True
                log.warning("%s (MASTER_ADDR) is not known here yet; trying for up to %g s", host, timeout_s)
        time.sleep(min(0.5, max(0.0, left)))


def choose_interface(address: str) -> str:
    """Have gloo talk through the network card that leads to ``address``, unless GLOO_SOCKET_IFNAME names one already.

    By itself gloo takes the card of this host's own name, which on many systems is the loopback: nobody else's.
    Returns the card's name; empty if it is left to gloo.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return os.environ["GLOO_SOCKET_IFNAME"]
    interface = environment.interface_towards(address)
    if interface == "lo" and not environment.names_this_machine(address):
        # Rank 0's own host often has its name in /etc/hosts as 127.0.1.1; the other hosts see another address.
        outward = environment.outward_interface()
        if outward:
            log.warning(
                "%s is the loopback's address on %s: using the network card %s (GLOO_SOCKET_IFNAME chooses another)",
                address,
                socket.gethostname(),
                outward,
            )
        interface = outward or interface
    if interface:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    return interface


def share_cores(ranks_here: int) -> None:
    """Give each of several ranks on this host its part of the cores, unless OMP_NUM_THREADS says how many it takes.

    torchrun does so, after its fashion (one thread each); other launchers leave every rank to take all cores, and two
    ranks that do are 20 times slower than two that share them.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // max(1, ranks_here))
    if ranks_here > 1 and "OMP_NUM_THREADS" not in os.environ and threads < torch.get_num_threads():
        torch.set_num_threads(threads)
