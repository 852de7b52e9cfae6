"""The command line of the virtual cluster.

    launcher/virtual_cluster run --hosts 3 --rate 1mbit -- deepspeed --hostfile /run/cluster/hostfile ...
    launcher/virtual_cluster run --hosts 2 -- bash
    launcher/virtual_cluster run --hosts 3 --each --kill host3@20 -- torchrun --nnodes 2:3 ...

The command runs on host1, in the current folder, on this terminal, and its exit status is the exit status here. All
hosts (host1, host2, ...) reach each other by name and by ssh, and share all files but /run and /dev/shm.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .hosts import Cluster, ClusterError, cluster, missing
from .slurm import SLURM_TOOLS, start_slurm


@dataclass(frozen=True)
class Mishap:
    """Something that befalls a host."""

    host: str
    after_s: float
    """Seconds after the command's start."""
    for_s: float = 0.0
    """How long the link is cut; 0: the host is killed."""

    @staticmethod
    def read(text: str) -> Mishap:
        """``host2@20`` (killed) or ``host2@20+10`` (cut for 10 s)."""
        parts = re.fullmatch(r"(\w+)@([\d.]+)(?:\+([\d.]+))?", text)
        if parts is None:
            raise ValueError(text)
        return Mishap(parts[1], float(parts[2]), float(parts[3] or 0))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command on a cluster of its own. Returns its exit status; 2 if there cannot be such a cluster."""
    given = _parser().parse_args(arguments)
    # As the end of a session or a `timeout` tells us to stop; without this, Python would not leave its `with` blocks.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        if given.slurm and (reason := missing(SLURM_TOOLS)):
            raise ClusterError(f"SLURM {reason}")
        with cluster(given.hosts, given.rate) as virtual:
            for mishap in [*given.kill, *given.cut]:
                if mishap.host not in virtual.hosts:
                    raise ClusterError(f"{mishap.host} is none of the hosts {', '.join(virtual.hosts)}")
            if given.slurm:
                start_slurm(virtual)
            for mishap in [*given.kill, *given.cut]:
                threading.Thread(target=_befall, args=(virtual, mishap), daemon=True).start()
            return _on_each(virtual, given.command) if given.each else _foreground(virtual, given.command)
    except ClusterError as error:
        print(f"virtual_cluster: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="virtual_cluster", description="Virtual hosts on one Linux machine.")
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="make a cluster, run a command on it, take it away")
    run.add_argument("--hosts", type=int, default=2, metavar="N", help="number of hosts (2)")
    run.add_argument("--rate", help="limit of every link, both ways: 1mbit, 100mbit ...; none by default")
    run.add_argument("--slurm", action="store_true", help="start SLURM on the hosts; host1 is the controller, too")
    run.add_argument(
        "--each", action="store_true", help="run the command on every host, with its name before each line"
    )
    how = "host2@20: after 20 s it loses its power"
    run.add_argument("--kill", type=Mishap.read, action="append", default=[], metavar="HOST@SECONDS", help=how)
    how = "host2@20+10: after 20 s its link is cut for 10 s"
    run.add_argument("--cut", type=Mishap.read, action="append", default=[], metavar="HOST@SECONDS+SECONDS", help=how)
    run.add_argument("command", nargs="+", metavar="COMMAND", help="what to run; write -- before it")
    return parser


def _befall(virtual: Cluster, mishap: Mishap) -> None:
    time.sleep(mishap.after_s)
    print(f"virtual_cluster: {mishap.host} {'loses its link' if mishap.for_s else 'is killed'}", file=sys.stderr)
    if not mishap.for_s:
        virtual.kill(mishap.host)
        return
    virtual.cut(mishap.host)
    time.sleep(mishap.for_s)
    virtual.mend(mishap.host)
    print(f"virtual_cluster: {mishap.host} has its link back", file=sys.stderr)


def _foreground(virtual: Cluster, command: Sequence[str]) -> int:
    process = virtual.popen(virtual.hosts[0], command)
    with _interrupts_left_to_the_command():
        return process.wait()


@contextlib.contextmanager
def _interrupts_left_to_the_command() -> Iterator[None]:
    """Ctrl-C reaches every process of the terminal; the command decides what it means."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _on_each(virtual: Cluster, command: Sequence[str]) -> int:
    """The highest exit status of all hosts that were not killed."""
    to_pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    processes = {host: virtual.popen(host, command, **to_pipe) for host in virtual.hosts}
    echoes = [threading.Thread(target=_echo, args=item) for item in processes.items()]
    for echo in echoes:
        echo.start()
    for echo in echoes:
        echo.join()
    return max(process.wait() for process in processes.values())


def _echo(host: str, process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        print(f"{host}: {line}", end="", flush=True)
