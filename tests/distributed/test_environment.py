"""What a launcher left in the environment is understood, whole, in part and wrong."""

from __future__ import annotations

import socket
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from mezo_dist.distributed import environment
from mezo_dist.distributed.environment import (
    ClusterEnvironment,
    discover,
    first_host,
    interface_towards,
    names_this_machine,
    outward_interface,
    rendezvous_through_mpi,
)
from mezo_dist.errors import UserError

# As found on the real launchers (the tests in tests/cluster/ start them), less what does not matter.
RENDEZVOUS = {"MASTER_ADDR": "host1", "MASTER_PORT": "29500"}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none",
    **RENDEZVOUS,
}
DEEPSPEED = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "CROSS_RANK": "1", "CROSS_SIZE": "2", **RENDEZVOUS}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "3", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}
BATCH = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "gpu[07-08]"}
SRUN = {
    **BATCH,
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
SRUN_PORT = 15000 + (77 * 131 + 3) % 15000

KNOWN = {
    "nothing": ({}, ClusterEnvironment("")),
    "torchrun": (TORCHRUN, ClusterEnvironment("torchrun", 3, 4, 1, 2, "host1", 29500)),
    "deepspeed": (DEEPSPEED, ClusterEnvironment("DeepSpeed", 1, 2, 0, 0, "host1", 29500)),
    "by hand": (
        {"RANK": "1", "WORLD_SIZE": "2", **RENDEZVOUS},
        ClusterEnvironment("RANK and WORLD_SIZE", 1, 2, 0, 0, "host1", 29500),
    ),
    "Open MPI": (OPEN_MPI, ClusterEnvironment("Open MPI", 1, 4, 1, 2)),
    "Open MPI that was told": ({**OPEN_MPI, **RENDEZVOUS}, ClusterEnvironment("Open MPI", 1, 4, 1, 2, "host1", 29500)),
    "MPICH": (MPICH, ClusterEnvironment("MPICH", 2, 3, 0, 1)),
    "SLURM": (SRUN, ClusterEnvironment("SLURM's srun", 1, 2, 0, 0, "gpu07", SRUN_PORT)),
    "SLURM on one node": (
        {**SRUN, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "n1"},
        ClusterEnvironment("SLURM's srun", 1, 2, 0, 2, "n1", SRUN_PORT),
    ),
    "SLURM that was told": ({**SRUN, **RENDEZVOUS}, ClusterEnvironment("SLURM's srun", 1, 2, 0, 0, "host1", 29500)),
    "SLURM with PMI2": (
        {**SRUN, "PMI_RANK": "1", "PMI_SIZE": "2"},
        ClusterEnvironment("SLURM's srun", 1, 2, 0, 0, "gpu07", SRUN_PORT),
    ),
    "MPICH's mpirun in a SLURM job": ({**SRUN, **MPICH}, ClusterEnvironment("MPICH", 2, 3, 0, 1)),
    "mpirun in a SLURM job": ({**SRUN, **OPEN_MPI}, ClusterEnvironment("Open MPI", 1, 4, 1, 2)),
    "torchrun under srun": ({**SRUN, **TORCHRUN}, ClusterEnvironment("torchrun", 3, 4, 1, 2, "host1", 29500)),
    "a world size left over": ({**OPEN_MPI, "WORLD_SIZE": "8"}, ClusterEnvironment("Open MPI", 1, 4, 1, 2)),
    "a batch script of one task": ({**BATCH, "SLURM_NTASKS": "1"}, ClusterEnvironment("")),
    "a shell of salloc": ({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "2"}, ClusterEnvironment("")),
    "a world of one": (
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        ClusterEnvironment("Open MPI", local_world_size=1),
    ),
}


@pytest.mark.parametrize("case", KNOWN)
def test_launchers_are_known(case: str) -> None:
    variables, expected = KNOWN[case]
    assert discover(variables) == expected


def without(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


WRONG = {
    "half of torchrun": (without(TORCHRUN, "RANK"), "RANK not set, but WORLD_SIZE=4, MASTER_ADDR=host1.*torchrun"),
    "no rendezvous": (without(TORCHRUN, "MASTER_PORT"), "MASTER_PORT not set, but RANK=3, WORLD_SIZE=4, MASTER_A"),
    "half of Open MPI": (
        without(OPEN_MPI, "OMPI_COMM_WORLD_SIZE"),
        "OMPI_COMM_WORLD_SIZE not set, but OMPI_COMM_WORLD_R",
    ),
    "half of MPICH": (without(MPICH, "PMI_RANK"), "PMI_RANK not set, but PMI_SIZE=3"),
    "no srun": (BATCH, "batch script of a SLURM job of 2 tasks.*put srun before the command"),
    "no number": ({**TORCHRUN, "RANK": "one"}, "RANK=one must be a number"),
    "no local number": ({**TORCHRUN, "LOCAL_RANK": "x"}, "LOCAL_RANK=x must be a number"),
    "no such rank": (
        {**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "4"},
        "_RANK=4 is not a rank of OMPI_COMM_WORLD_SIZE=4.*by hand",
    ),
    "a negative rank": ({**TORCHRUN, "RANK": "-1"}, "RANK=-1 is not a rank"),
    "no world": ({**TORCHRUN, "WORLD_SIZE": "0"}, "not a rank of WORLD_SIZE=0"),
    "no port": ({**TORCHRUN, "MASTER_PORT": "65536"}, "MASTER_PORT=65536 is no port"),
    "a port in words": ({**SRUN, "MASTER_PORT": "http"}, "MASTER_PORT=http must be a number"),
    "no nodes": (without(SRUN, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"), "SLURM_STEP_NODELIST='' names no host"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_explained(case: str) -> None:
    variables, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        discover(variables)


def test_a_shell_that_srun_started_is_told_where_its_other_tasks_are() -> None:
    assert discover(SRUN).hint == ""
    hint = discover({**SRUN, "SLURM_PTY_PORT": "40123"}).hint
    assert "interactive shell, one of 2 tasks that `srun --pty` started" in hint
    assert "put `srun -n 2` before the command" in hint


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[003-7,12]-ib,login1", "gpu003-ib"),
        ("r[1-2]n[08,09]", "r1n08"),
        ("a-b.c[5]", "a-b.c5"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_steps_of_a_job_meet_at_different_ports() -> None:
    ports = {discover({**SRUN, "SLURM_STEP_ID": str(step)}).port for step in range(10)}
    assert len(ports) == 10
    assert all(1024 < port < 32768 for port in ports)


def test_the_card_that_leads_to_this_machine() -> None:
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no-such-host.invalid") == ""


@pytest.mark.parametrize(
    ("host", "is_here"), [("localhost", True), ("127.0.1.1", True), ("::1", True), ("node1", False)]
)
def test_words_for_this_machine(host: str, is_here: bool) -> None:
    assert names_this_machine(host) == is_here


def test_a_card_is_known_by_its_ipv6_address() -> None:
    """A host may have no other."""
    assert interface_towards("::1") == "lo"


def test_the_card_that_leads_outward(monkeypatch: pytest.MonkeyPatch) -> None:
    def cards(*names: str) -> None:
        monkeypatch.setattr(environment, "_addresses", lambda: iter([(name, f"address of {name}") for name in names]))

    monkeypatch.setattr(environment, "_address_towards", lambda host: "address of eth1")
    cards("lo", "eth0", "eth1")
    assert outward_interface() == "eth1"
    cards("lo", "eth0")
    assert outward_interface() == "eth0", "without a default route it is any that is not the loopback"
    cards("lo")
    assert outward_interface() == ""


def mpi(rank: int, size: int, hosts: list[str]) -> Any:
    """An mpi4py whose world looks like this; what it broadcasts comes from itself."""
    world = SimpleNamespace(
        Get_rank=lambda: rank, Get_size=lambda: size, allgather=lambda host: hosts, bcast=lambda value: value
    )
    return SimpleNamespace(
        COMM_WORLD=world, Get_library_version=lambda: "Some MPI 1, rest", Finalize=lambda: hosts.append("finalized")
    )


def test_ranks_of_one_host_meet_on_its_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = ["a", "a"]
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=mpi(1, 2, hosts)))
    address, port = rendezvous_through_mpi(ClusterEnvironment("Open MPI", 1, 2))
    assert address == "127.0.0.1"
    assert hosts[-1] == "finalized", "a rank that fails later must not hang in MPI's farewell"
    socket.create_server(("", port)).close()  # it is free


def test_another_mpi_than_the_one_that_started_us_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=mpi(0, 1, ["a"])))
    with pytest.raises(UserError, match=r"Open MPI says this is rank 1 of 2, but mpi4py says 0 of 1.*\(Some MPI 1\)"):
        rendezvous_through_mpi(ClusterEnvironment("Open MPI", 1, 2))


def test_without_mpi4py_ranks_must_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UserError, match=r"MPICH started 3 ranks, but .*mezo_dist\[mpi\].* or set MASTER_ADDR"):
        rendezvous_through_mpi(ClusterEnvironment("MPICH", 1, 3))
