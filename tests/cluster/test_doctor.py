"""The doctor on several hosts: all well, and what it says to a rank that cannot reach the others."""

from __future__ import annotations

import re
import sys

import pytest

from launcher.hosts import Cluster

from .conftest import Workplace, command, need

pytestmark = pytest.mark.distributed

# As a rank of a job that somebody started by hand on one of the hosts only.
ALONE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "host1", "MASTER_PORT": "29500"}
DOCTOR = [sys.executable, "-m", "mezo_dist", "doctor", "--timeout=2"]


def test_all_is_well(workplace: Workplace, two_hosts: Cluster) -> None:
    need({"mpirun": "openmpi-bin"})
    pytest.importorskip("mpi4py")
    output = workplace.call(two_hosts, "host1", command("mpirun --host host1,host2 python -m mezo_dist doctor"))
    assert "PROBLEM" not in output
    for line in (
        r"ok +launcher +Open MPI: 2 ranks, rendezvous through MPI",
        r"ok +ranks +2 on 2 host\(s\): host1, host2",
        r"ok +code of mezo_dist +\w{12}, the same on all",
        r"ok +configs/quickstart.yaml +\w{12}, the same on all",
        r"ok +network card +eth0\s",
        r"ok +shared folder +\S+ is seen by all",
        r"ok +scalar all-reduce +[\d.]+ ms between all ranks",
        r"ok +bandwidth +[\d.]+ Mbit/s per rank",
        r"ok +slowest link +[\d.]+ ms there and back, to rank 1 \(host2\)",
        r"ok +clocks +at most [-+]0\.\d+ s on rank 1 \(host2\)",
    ):
        assert re.search(line, output), f"{line}\n{output}"


def test_a_rank_that_does_not_reach_rank_0_learns_why(workplace: Workplace, two_hosts: Cluster) -> None:
    status, output = workplace.start(two_hosts, "host2", DOCTOR, **ALONE).finish()
    assert status == 2
    assert re.search(r"rank 1 on host2 \(through eth0\) does not reach host1:29500: .*nobody listens", output), output
    two_hosts.cut("host2")
    status, output = workplace.start(two_hosts, "host2", DOCTOR, **ALONE).finish()
    assert status == 2
    assert re.search(r"does not reach host1:29500: no answer .*\n +a firewall, a cut link", output), output
