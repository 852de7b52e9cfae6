"""Rank, world size and rendezvous of this process, read from the environment variables that the launcher set.

This is the one place that knows launchers. It is torch-free and looks at nothing but the environment (`discover`), the
network cards (`interface_towards`) and, if nothing else tells where rank 0 is, MPI (`rendezvous_through_mpi`).
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import mezo_dist
from mezo_dist.errors import UserError

FIRST_PORT, NUM_PORTS = 15000, 15000
"""Range of the port of a SLURM job: below those that systems hand out by themselves."""


@dataclass(frozen=True)
class ClusterEnvironment:
    """Rank, world size and rendezvous of this process."""

    launcher: str
    """Name of the launcher, for people; empty if there is none."""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Among the ranks of this host; 0 if the launcher does not say."""
    local_world_size: int = 0
    """Number of ranks on this host; 0 if the launcher does not say."""
    address: str = ""
    """Where rank 0 listens; empty if ranks have to agree on that through MPI."""
    port: int = 0
    """Its port."""
    hint: str = field(default="", compare=False)
    """Why other ranks may never come, to be added to a message about that; empty if nothing is suspicious."""

    @property
    def on_one_host(self) -> bool:
        """Whether all ranks are known to be on this host."""
        return self.local_world_size == self.world_size


@dataclass(frozen=True)
class _Source:
    """The names of the environment variables of one family of launchers."""

    launcher: str
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str


TORCH = _Source("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
SLURM = _Source("SLURM's srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "")
MPICH = _Source("MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
# The innermost launcher comes first: mpirun inside a SLURM job starts its helpers with srun, and torchrun may be
# started by any of them, so the variables of the outer ones describe the inner one and not this process.
SOURCES = (
    TORCH,
    _Source(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    MPICH,
    SLURM,
)
WAYS = "torchrun, deepspeed, mpirun or srun"


def discover(environment: Mapping[str, str]) -> ClusterEnvironment:
    """Read rank, world size and rendezvous from ``environment``; a world of one if no launcher set any.

    ``MASTER_ADDR`` and ``MASTER_PORT`` count under every launcher, if given.

    Raises:
        UserError: the environment describes a rank only in part, or what it says cannot be; the message names the
            variables and what probably happened.
    """
    source = _complete_source(environment)
    if source is None:
        return ClusterEnvironment("")
    rank, world_size = _number(environment, source.rank), _number(environment, source.world_size)
    if not 0 <= rank < world_size:
        raise UserError(
            f"environment: {source.rank}={rank} is not a rank of {source.world_size}={world_size}; ranks count from 0. "
            f"Was one of them set by hand or left over in this shell? Start with {WAYS}"
        )
    if world_size == 1:
        return ClusterEnvironment(_name(source, environment), local_world_size=1)
    address, port = _rendezvous_address(source, environment)
    local_rank = _number(environment, source.local_rank, 0)
    one_node = source is SLURM and environment.get("SLURM_STEP_NUM_NODES") == "1"
    local_world_size = world_size if one_node else _number(environment, source.local_world_size, 0)
    name, hint = _name(source, environment), _hint(source, environment, world_size)
    return ClusterEnvironment(name, rank, world_size, local_rank, local_world_size, address, port, hint)


def _complete_source(environment: Mapping[str, str]) -> _Source | None:
    """The innermost launcher that gives both rank and world size; None if there is none."""
    for source in SOURCES:
        given = [bool(environment.get(name)) for name in (source.rank, source.world_size)]
        if all(given):
            return SLURM if source is MPICH and _is_from_srun(environment) else source
        if any(given):
            _explain_half(source, environment)
    return None


def _is_from_srun(environment: Mapping[str, str]) -> bool:
    """Whether srun itself gave MPICH's variables (its plug-in PMI2 does): then it says more about them than they do."""
    pairs = ((SLURM.rank, MPICH.rank), (SLURM.world_size, MPICH.world_size))
    return all(environment.get(slurm) == environment[mpich] for slurm, mpich in pairs)


def _hint(source: _Source, environment: Mapping[str, str], world_size: int) -> str:
    """See `ClusterEnvironment.hint`."""
    if source is SLURM and environment.get("SLURM_PTY_PORT"):
        return (
            f". This is an interactive shell, one of {world_size} tasks that `srun --pty` started, and a command typed "
            f"here starts no others: leave the shell, and put `srun -n {world_size}` before the command; or start the "
            "shell with `srun -n 1 --pty`, for one process"
        )
    return ""


def _explain_half(source: _Source, environment: Mapping[str, str]) -> None:
    """Raises UserError unless a description that is not complete can be ignored."""
    rank, world_size = (environment.get(name, "") for name in (source.rank, source.world_size))
    if source is SLURM:
        # A batch script has a rank too, but only what srun starts has a step.
        num_tasks = environment.get("SLURM_NTASKS", "1")
        if not world_size and num_tasks != "1":
            raise UserError(
                f"environment: this is the batch script of a SLURM job of {num_tasks} tasks, not one of its tasks; put "
                "srun before the command (srun -n 1 for one process)"
            )
        return
    if rank in ("", "0") and world_size in ("", "1"):
        return  # a world of one
    if any(environment.get(s.rank) and environment.get(s.world_size) for s in SOURCES[SOURCES.index(source) + 1 :]):
        return  # left over from something else: another launcher says all
    names = [source.rank, source.world_size, *(("MASTER_ADDR", "MASTER_PORT") if source is TORCH else ())]
    raise UserError(f"environment: {_missing(names, environment)}; start all ranks with {WAYS}, or unset what is set")


def _rendezvous_address(source: _Source, environment: Mapping[str, str]) -> tuple[str, int]:
    """Where rank 0 listens; empty and 0 if only MPI can tell."""
    address, port = environment.get("MASTER_ADDR", ""), environment.get("MASTER_PORT", "")
    if source is TORCH and not (address and port):
        names = [source.rank, source.world_size, "MASTER_ADDR", "MASTER_PORT"]
        raise UserError(f"environment: {_missing(names, environment)}; start all ranks with {WAYS}")
    if source is SLURM:
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
        address = address or first_host(nodes)
        port = port or str(_slurm_port(environment))
    if port and not 0 < _number({"MASTER_PORT": port}, "MASTER_PORT") < 2**16:
        raise UserError(f"environment: MASTER_PORT={port} is no port; 1 to 65535")
    return (address, int(port)) if address and port else ("", 0)


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list such as ``gpu[003-7,12]-ib,login1``.

    Raises:
        UserError: ``nodes`` is no node list.
    """
    first = re.match(r"([^\[\],]+|\[(\d+)[^\[\]]*\])+", nodes)
    if first is None:
        raise UserError(f"environment: SLURM_STEP_NODELIST={nodes!r} names no host; set MASTER_ADDR and MASTER_PORT")
    return re.sub(r"\[(\d+)[^\[\]]*\]", r"\1", first[0])


def _slurm_port(environment: Mapping[str, str]) -> int:
    """The same on all ranks, another one for each step of each job: steps may share a host."""
    job, step = (_number(environment, name, 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return FIRST_PORT + (job * 131 + step) % NUM_PORTS


def _name(source: _Source, environment: Mapping[str, str]) -> str:
    if source is not TORCH:
        return source.launcher
    if "TORCHELASTIC_RUN_ID" in environment:
        return "torchrun"
    return "DeepSpeed" if "CROSS_RANK" in environment else "RANK and WORLD_SIZE"


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    """The variable as an integer; ``default`` if it is not set or empty.

    Args:
        environment: the environment variables.
        name: of the variable.
        default: its value if it is not set.
    """
    text = environment.get(name, "")
    if default is not None and not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise UserError(f"environment: {name}={text} must be a number") from None


def _missing(names: list[str], environment: Mapping[str, str]) -> str:
    """``A, B not set, but C=1``."""
    given = ", ".join(f"{name}={environment[name]}" for name in names if environment.get(name))
    return f"{', '.join(name for name in names if not environment.get(name))} not set, but {given}"


def rendezvous_through_mpi(ranks: ClusterEnvironment) -> tuple[str, int]:
    """Agree through MPI on rank 0's address, as another host reaches it, and a port that was free there just now.

    MPI is left again at once: a rank that fails later must not hang in MPI's own farewell.

    Raises:
        UserError: mpi4py is missing, or belongs to another MPI than the one that started the ranks.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py found no MPI library
        raise UserError(
            f"{ranks.launcher} started {ranks.world_size} ranks, but nothing says where they meet ({error}); install "
            "mpi4py (pip install 'mezo_dist[mpi]'), or set MASTER_ADDR and MASTER_PORT on all ranks"
        ) from error
    world = MPI.COMM_WORLD
    if (world.Get_rank(), world.Get_size()) != (ranks.rank, ranks.world_size):
        raise UserError(
            f"{ranks.launcher} says this is rank {ranks.rank} of {ranks.world_size}, but mpi4py says "
            f"{world.Get_rank()} of {world.Get_size()}: it uses another MPI "
            f"({MPI.Get_library_version().split(',')[0]}) than the one that started the ranks; use the mpirun of that "
            "one, or set MASTER_ADDR and MASTER_PORT on all ranks"
        )
    hosts: list[str] = world.allgather(socket.gethostname())
    others = [host for host in hosts if host != hosts[0]]
    address = _address_towards(others[0]) if others else "127.0.0.1"
    with socket.create_server(("", 0)) as probe:
        port = probe.getsockname()[1]
    address, port = world.bcast((address, port))
    MPI.Finalize()
    return address, port


def interface_towards(host: str) -> str:
    """Name of the network card through which ``host`` is reached from here; empty if that cannot be told.

    If ``host`` is this machine, it is the card that holds the address by which others know it.
    """
    address = _address_towards(host)
    return next((name for name, held in _addresses() if held == address), "")


def outward_interface() -> str:
    """Name of the network card that leads away from this machine: that of the default route, or else the first one
    with an address; empty if there is only the loopback."""
    cards = [name for name, _ in _addresses() if name != "lo"]
    for far in ("192.0.2.1", "2001:db8::1"):  # addresses reserved for documentation
        if (card := interface_towards(far)) in cards:
            return card
    return cards[0] if cards else ""


def names_this_machine(host: str) -> bool:
    """Whether ``host`` is a word for "this machine" everywhere: localhost, or an address of the loopback."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host.split(".")[0] in ("localhost", "localhost4", "localhost6", "ip6-localhost", "ip6-loopback")


def _address_towards(host: str) -> str:
    """The address that connections to ``host`` come from; ``host`` itself if there is none. Nothing is sent."""
    with contextlib.suppress(OSError, UnicodeError):  # UnicodeError: no name at all
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    return host


def _addresses() -> Iterator[tuple[str, str]]:
    """(network card, address) of this machine: a card's IPv4 address, and its IPv6 addresses."""
    for _, name in socket.if_nameindex():
        with contextlib.suppress(OSError):
            yield name, _ipv4_address(name)
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, *_, name = line.split()
            yield name, str(ipaddress.IPv6Address(bytes.fromhex(digits)))


def _ipv4_address(interface: str) -> str:
    """Raises OSError if it has none."""
    import fcntl

    get_address = 0x8915  # SIOCGIFADDR, Linux
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe.fileno(), get_address, interface.encode()[:15].ljust(256, b"\0"))
    return socket.inet_ntoa(answer[20:24])


def code_digest() -> str:
    """SHA-256 of the package's sources: a host with an older checkout has the same version number."""
    folder = Path(mezo_dist.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()
