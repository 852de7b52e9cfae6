"""The virtual cluster itself: hosts that are hosts, links that can be slowed and cut, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher import hosts
from launcher.hosts import Cluster, ClusterError, missing

from .conftest import README, ROOT, command, need

pytestmark = pytest.mark.distributed

COMMAND = [sys.executable, str(ROOT / "launcher" / "virtual_cluster"), "run"]
KNOCK = ["bash", "-c", "timeout 1 bash -c 'echo > /dev/tcp/host2/22' && echo open || echo closed"]


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False, timeout=60)


def test_hosts_have_their_own_name_and_network_and_share_files(two_hosts: Cluster, tmp_path: Path) -> None:
    for host in two_hosts.hosts:
        two_hosts.run(host, ["sh", "-c", f"hostname > {tmp_path}/{host}; echo {host} > /run/mine"])
    assert (tmp_path / "host2").read_text() == "host2\n"
    assert two_hosts.run("host1", ["cat", "/run/mine"]) == "host1\n"
    assert two_hosts.run("host1", ["ssh", "host2", "cat /run/mine"]) == "host2\n"
    assert not Path("/run/mine").exists()
    with pytest.raises(ClusterError, match=r"false on host1: exit status 1"):
        two_hosts.run("host1", ["false"])


def wait_until_open(hosts: Cluster) -> None:
    """A link that has just come up may carry nothing yet: the kernel looks and asks for addresses once a second."""
    deadline = time.monotonic() + 30
    while hosts.run("host1", KNOCK) != "open\n":
        assert time.monotonic() < deadline, "the link stays cut"


def test_a_link_can_be_cut_and_mended(two_hosts: Cluster) -> None:
    wait_until_open(two_hosts)
    two_hosts.cut("host2")
    assert two_hosts.run("host1", KNOCK).endswith("closed\n")
    two_hosts.mend("host2")
    wait_until_open(two_hosts)


def test_a_link_is_as_slow_as_it_should_and_counts(two_hosts: Cluster) -> None:
    two_hosts.rate("1mbit")
    before, began = two_hosts.counters("host1"), time.monotonic()
    two_hosts.run("host1", ["sh", "-c", "head -c 100000 /dev/zero | ssh host2 'cat > /dev/null'"])
    took, sent = time.monotonic() - began, two_hosts.counters("host1") - before
    assert sent.sent_bytes > 100_000
    assert took > (100_000 - 20_000) * 8 / 1e6, "faster than its link allows, burst and all"
    with pytest.raises(ClusterError, match="rate '1m'"):
        two_hosts.rate("1m")


def test_a_host_can_be_killed(two_hosts: Cluster) -> None:
    theirs = two_hosts.popen("host2", ["sleep", "100"])
    ours = two_hosts.popen("host1", ["sleep", "100"])
    two_hosts.kill("host2")
    assert theirs.wait(10) != 0
    assert ours.poll() is None
    assert two_hosts.run("host1", KNOCK).endswith("closed\n")


def networks_of(*words: str) -> set[str]:
    """The network namespaces of processes whose command line has one of these words."""
    networks = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if set(words) & set((process / "cmdline").read_bytes().decode(errors="replace").split("\0")):
                networks.add(os.readlink(process / "ns/net"))
        except OSError:  # gone meanwhile
            continue
    return networks


def processes_in(networks: set[str]) -> list[str]:
    """Process ids."""
    processes = []
    for link in Path("/proc").glob("[0-9]*/ns/net"):
        with contextlib.suppress(OSError):
            if os.readlink(link) in networks:
                processes.append(link.parts[2])
    return processes


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_behind_by_a_cluster_that_was_killed(how: int, tmp_path: Path) -> None:
    need({})
    mine = f"{time.time_ns() // 1000}.5"  # seconds to sleep, as no other process does: other tests have clusters, too
    line = [
        *COMMAND,
        "--hosts",
        "2",
        "--each",
        "--",
        "sh",
        "-c",
        f"setsid sleep {mine} & touch {tmp_path}/$(hostname); wait",
    ]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 30
        while len(list(tmp_path.iterdir())) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        networks = networks_of(mine)
        assert len(networks) == 2, "this test sees the cluster"
        process.send_signal(how)
        assert process.wait(30) != 0
    while left := processes_in(networks):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert "cluster" not in Path("/proc/mounts").read_text()


def test_the_command_line() -> None:
    need({})
    echoed = call("--hosts", "3", "--each", "--", "hostname").stdout
    assert sorted(echoed.splitlines()) == ["host1: host1", "host2: host2", "host3: host3"]
    assert call("--", "sh", "-c", "exit 7").returncode == 7
    done = call("--kill", "host2@0.2", "--cut", "host1@0.1+0.2", "--", "sleep", "1")
    assert done.returncode == 0
    assert "host2 is killed" in done.stderr
    assert "host1 has its link back" in done.stderr
    done = call("--kill", "host3@1", "--", "true")
    assert done.returncode == 2
    assert "host3 is none of the hosts host1, host2" in done.stderr


def test_the_command_of_the_readme_runs() -> None:
    need({"pdsh": "pdsh"})
    line = command("launcher/virtual_cluster run")
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["host1: host1", "host2: host2", "host3: host3"]


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "sshd" else tool)
    assert missing() == "needs the system packages openssh-server (launcher/system_packages.sh install)"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert missing() == "needs root (network namespaces)"
    with pytest.raises(ClusterError, match="needs root"), hosts.cluster(1):
        pass


def test_system_packages_names_what_the_tests_need() -> None:
    script = (ROOT / "launcher" / "system_packages.sh").read_text()
    from launcher.slurm import SLURM_TOOLS

    for package in {*SLURM_TOOLS.values(), "pdsh", "openmpi-bin", "mpich"}:
        assert package in script
    assert "system_packages.sh" in README.read_text()
