"""A cluster of virtual hosts on one Linux machine, for trying out how a job starts, and what it does when it breaks.

A host is a set of namespaces (network, processes, mounts, name): it has its own address on a bridge, its own loopback,
/run and /dev/shm, its own sshd, and shares all other files with the machine. All hosts live inside one more set, the
rack, which holds the bridge and the cables.

Nothing has to be cleaned up. The rack's first process waits on a pipe from this Python process; when that closes, for
whatever reason (kill -9 included), it ends, and the kernel ends all processes inside and removes networks and mounts.
Several clusters at a time do not see each other.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

TOOLS = {
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "ip": "iproute2",
    "tc": "iproute2",
    "ssh": "openssh-client",
    "sshd": "openssh-server",
}
"""Commands that a cluster needs, and the Debian packages that bring them."""
NETWORK = "10.77.0"
BURST = 3000
"""Bytes that a limited link lets through at once (two packets), where a timer tick brings fewer."""
HOSTFILE = "/run/cluster/hostfile"
"""On every host: a line ``host1 slots=1`` per host, as DeepSpeed and Open MPI read it."""
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
"""Everything on virtual hosts runs as root, which Open MPI wants to be told twice."""
HOST_NAMESPACES = ["--net", "--mount", "--uts", "--ipc", "--pid"]
SSH_CONFIG = """
Host *
    IdentityFile /run/cluster/key
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""
SSHD_CONFIG = """
HostKey /run/cluster/key
AuthorizedKeysFile /run/cluster/key.pub
PermitRootLogin yes
StrictModes no
UsePAM no
PidFile none
SetEnv PATH={path}
"""
_WAIT = "read -r"  # bash's own `read`: as the first process of a namespace it also has to reap orphans


class ClusterError(RuntimeError):
    """The cluster cannot be made here, or one of its set-up commands failed."""


@dataclass(frozen=True)
class Counters:
    """What a host's network card has sent and received so far, headers included."""

    sent_bytes: int
    sent_packets: int
    received_bytes: int
    received_packets: int

    def __sub__(self, before: Counters) -> Counters:
        return Counters(*(now - then for now, then in zip(_values(self), _values(before), strict=True)))


def missing(tools: Mapping[str, str] = TOOLS) -> str:
    """Why no cluster can be made here, in a few words; empty if it can.

    Args:
        tools: commands that must be there, with the Debian packages that bring them.
    """
    if os.geteuid() != 0:
        return "needs root (network namespaces)"
    packages = sorted({package for tool, package in tools.items() if shutil.which(tool) is None})
    if packages:
        return f"needs the system packages {' '.join(packages)} (launcher/system_packages.sh install)"
    tried = subprocess.run(["unshare", "--net", "--pid", "--fork", "true"], capture_output=True, text=True, check=False)
    return f"namespaces are not allowed here ({tried.stderr.strip()})" if tried.returncode else ""


@final
class Cluster:
    """Hosts ``host1`` to ``hostN``, made by `cluster`.

    Attributes:
        hosts: their names.
    """

    def __init__(self, rack: int, pids: dict[str, int], started: list[subprocess.Popen[str]]) -> None:
        self._rack = rack
        self._pids = pids
        self._started = started
        self.hosts = list(pids)

    def popen(self, host: str, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start ``command`` on a host, in the current folder and environment; ``options`` as for `subprocess.Popen`.

        The scripts of this Python (torchrun, deepspeed) come first on the PATH, here and for what comes by ssh.
        """
        folder = options.pop("cwd", os.getcwd())
        environment = {**options.pop("env", os.environ), **AS_ROOT, "PATH": _path()}
        inside = ["nsenter", f"--target={self._pids[host]}", *HOST_NAMESPACES, f"--wd={folder}"]
        process = subprocess.Popen([*inside, *map(str, command)], text=True, env=environment, **options)
        self._started.append(process)
        return process

    def run(self, host: str, command: Sequence[str], timeout_s: float = 300, **options: Any) -> str:
        """What ``command`` prints on a host, standard error included.

        Raises:
            ClusterError: it failed, or took more than ``timeout_s`` seconds; the message holds what it printed.
        """
        process = self.popen(host, command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            raise ClusterError(f"{' '.join(command)} on {host}: not done after {timeout_s:g} s\n{output}") from None
        if process.returncode:
            raise ClusterError(f"{' '.join(command)} on {host}: exit status {process.returncode}\n{output}")
        return output

    def address(self, host: str) -> str:
        """IPv4 address of a host."""
        return f"{NETWORK}.{self.hosts.index(host) + 1}"

    def pid(self, host: str) -> int:
        """Process id of the host's first process; ``/proc/PID/root`` is the host's view of all files."""
        return self._pids[host]

    def rate(self, rate: str | None) -> None:
        """Limit every host's link in both directions to ``rate``, in the words of tc ("1mbit"); None: no limit."""
        for number, host in enumerate(self.hosts, start=1):
            for enter, card in ((self._in(self._pids[host]), "eth0"), (self._in(self._rack), f"port{number}")):
                subprocess.run([*enter, "tc", "qdisc", "del", "dev", card, "root"], capture_output=True, check=False)
                if rate is not None:
                    # The burst must hold what a timer tick lets through at the highest rate; small ones are exact.
                    burst = max(BURST, _bits_per_second(rate) // 8 // 250)
                    limit = ["tbf", "rate", rate, "burst", str(burst), "latency", "400ms"]
                    _call([*enter, "tc", "qdisc", "add", "dev", card, "root", *limit])

    def cut(self, host: str) -> None:
        """Pull a host's cable: nothing goes in or out, and nobody is told."""
        self._cable(host, "down")

    def mend(self, host: str) -> None:
        """Put the cable back."""
        self._cable(host, "up")

    def kill(self, host: str) -> None:
        """A host loses its power: cable first, so that no connection is closed, then every process at once."""
        self.cut(host)
        os.kill(self._pids[host], 9)  # the first process of its namespace takes all others along

    def counters(self, host: str) -> Counters:
        """What the host's eth0 has sent and received so far."""
        folder = "/sys/class/net/eth0/statistics"
        names = [f"{folder}/{way}_{unit}" for way in ("tx", "rx") for unit in ("bytes", "packets")]
        return Counters(*map(int, _call([*self._in(self._pids[host], "--mount"), "cat", *names]).split()))

    def _cable(self, host: str, state: str) -> None:
        _call([*self._in(self._rack), "ip", "link", "set", f"port{self.hosts.index(host) + 1}", state])

    @staticmethod
    def _in(pid: int, *more: str) -> list[str]:
        return ["nsenter", f"--target={pid}", "--net", *more]


@contextlib.contextmanager
def cluster(num_hosts: int, rate: str | None = None) -> Iterator[Cluster]:
    """Make a cluster, and take it away at the end.

    Args:
        num_hosts: 1 to 200.
        rate: limit of every host's link in both directions, in the words of tc ("1mbit"); None: as fast as it goes.

    Raises:
        ClusterError: `missing` says why there cannot be one here, or a set-up command failed.
    """
    if reason := missing():
        raise ClusterError(f"a virtual cluster {reason}")
    with contextlib.ExitStack() as stack:
        names = [f"host{number}" for number in range(1, num_hosts + 1)]
        started: list[subprocess.Popen[str]] = []
        stack.callback(lambda: [process.wait() for process in started])  # once the kernel has ended them
        rack = stack.enter_context(_namespaces(["unshare"]))
        _set_up_rack(rack, names)
        enter_rack = ["nsenter", f"--target={rack}", "--net", "--mount", "--pid", "unshare"]
        pids = {name: stack.enter_context(_namespaces(enter_rack)) for name in names}
        for number, (name, pid) in enumerate(pids.items(), start=1):
            _set_up_host(rack, pid, number, name)
        hosts = Cluster(rack, pids, started)
        if rate is not None:
            hosts.rate(rate)
        yield hosts


@contextlib.contextmanager
def _namespaces(unshare: list[str]) -> Iterator[int]:
    """New namespaces, and the process id of the first process in them, as seen from here."""
    flags = [*HOST_NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
    command = [*unshare, *flags, "bash", "-c", f"echo ready; {_WAIT}"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        if process.stdout.readline() != "ready\n":
            raise ClusterError(f"{' '.join(command)}: {process.stderr.read().strip()}")
        try:
            yield _last_descendant(process.pid)
        finally:
            process.stdin.close()  # the first process ends, and all others with it


def _last_descendant(pid: int) -> int:
    """The end of a chain of only children: nsenter, unshare, bash."""
    while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        pid = int(children[0])
    return pid


def _set_up_rack(rack: int, names: list[str]) -> None:
    """The bridge, and the files that every host gets."""
    inside = """
    ip link add bridge type bridge
    ip link set bridge up
    mount -t tmpfs -o mode=755 tmpfs /run
    mkdir /run/cluster
    ssh-keygen -q -t ed25519 -N '' -f /run/cluster/key
    """
    _call(["nsenter", f"--target={rack}", "--net", "--mount", "sh", "-ec", inside])
    files = Path(f"/proc/{rack}/root/run/cluster")  # in the rack's own /run, which goes away with it
    (files / "hostfile").write_text("".join(f"{name} slots=1\n" for name in names))
    table = [f"{NETWORK}.{number} {name}\n" for number, name in enumerate(names, start=1)]
    (files / "hosts").write_text("".join(["127.0.0.1 localhost\n", *table]))
    (files / "ssh_config").write_text(SSH_CONFIG)
    (files / "sshd_config").write_text(SSHD_CONFIG.format(path=_path()))


def _set_up_host(rack: int, pid: int, number: int, name: str) -> None:
    """Cable, address, name, private folders and sshd of a host."""
    port = f"port{number}"
    cable = f"ip link add {port} type veth peer name eth0 netns {pid}; ip link set {port} master bridge up"
    _call(["nsenter", f"--target={rack}", "--net", "sh", "-ec", cable])
    inside = f"""
    hostname {name}
    ip link set lo up
    ip address add {NETWORK}.{number}/24 dev eth0
    ip link set eth0 up
    mount -t sysfs sysfs /sys
    mount -t tmpfs tmpfs /dev/shm
    cp -a /run/cluster /dev/shm/
    mount -t tmpfs -o mode=755 tmpfs /run
    mv /dev/shm/cluster /run/
    mkdir /run/sshd
    mount --bind /run/cluster/hosts /etc/hosts
    mount --bind /run/cluster/ssh_config /etc/ssh/ssh_config
    if [ -e ~/.bashrc ]; then mount --bind /dev/null ~/.bashrc; fi
    /usr/sbin/sshd -f /run/cluster/sshd_config
    """
    _call(["nsenter", f"--target={pid}", *HOST_NAMESPACES, "sh", "-ec", inside])


def _call(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ClusterError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _path() -> str:
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def _bits_per_second(rate: str) -> int:
    units = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
    for unit, factor in units.items():
        if rate.endswith(unit) and rate.removesuffix(unit).isdigit():
            return int(rate.removesuffix(unit)) * factor
    raise ClusterError(f"rate {rate!r}: a whole number and kbit, mbit or gbit, as in 1mbit")


def _values(counters: Counters) -> tuple[int, int, int, int]:
    return (counters.sent_bytes, counters.sent_packets, counters.received_bytes, counters.received_packets)
