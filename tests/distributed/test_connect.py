"""Joining the others: in time, or with a message that says what is in the way."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mezo_dist.distributed import connect as module
from mezo_dist.distributed import environment as cluster_environment
from mezo_dist.distributed.connect import choose_interface, connect, share_cores
from mezo_dist.errors import LostRankError, UserError
from tests.forked import Program


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("given", [{}, {"RANK": "0", "WORLD_SIZE": "1"}, {"WORLD_SIZE": "1"}, {"RANK": "0"}])
def test_a_world_of_one_needs_no_process_group(given: dict[str, str], environment: pytest.MonkeyPatch) -> None:
    for name, value in given.items():
        environment.setenv(name, value)
    comm = connect(timeout_s=1)
    assert (comm.rank, comm.world_size) == (0, 1)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT not set, but WORLD_SIZE=2"),
        ({"RANK": "1"}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set, but RANK=1"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "MASTER_PORT not set"),
        ({"RANK": "one", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "must be a number"),
    ],
)
def test_half_an_environment_is_an_error(given: dict[str, str], message: str, environment: pytest.MonkeyPatch) -> None:
    for name, value in given.items():
        environment.setenv(name, value)
    with pytest.raises(UserError, match=message):
        connect(timeout_s=1)
    assert not dist.is_initialized()


def test_ranks_that_never_come_are_an_error_in_time(environment: pytest.MonkeyPatch, tmp_path: Any) -> None:
    environment.setenv("RANK", "0")
    environment.setenv("WORLD_SIZE", "2")
    with pytest.raises(LostRankError, match=r"rank 0 of 2 .*could not join .* distributed.timeout_s = 1 s"):
        connect(timeout_s=1, init_method=f"file://{tmp_path}/meet")
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("ranks_here", "chosen", "wanted"),
    [(2, None, 4), (3, None, 2), (99, None, 1), (1, None, 8), (0, None, 8), (2, "8", 8)],
)
def test_ranks_on_one_host_share_its_cores(
    ranks_here: int, chosen: str | None, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = [8]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: threads.append(n))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    share_cores(ranks_here)
    assert threads[-1] == wanted


# What is in the way

RANK_1 = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


@pytest.fixture(params=["silent", "talks"])
def service(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    """Something else that listens at the rendezvous: its kind and its port."""
    connections: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                connections.append(server.accept()[0])
                if request.param == "talks":
                    connections[-1].sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        yield request.param, server.getsockname()[1]
    for connection in connections:
        connection.close()


def test_another_service_at_the_rendezvous(service: tuple[str, int], environment: pytest.MonkeyPatch) -> None:
    kind, port = service
    for name, value in {**RANK_1, "MASTER_PORT": str(port)}.items():
        environment.setenv(name, value)
    if kind == "silent":
        environment.setattr(module, "MARGIN_S", 0.5)
    message = {"silent": "takes connections and says nothing", "talks": "no rank 0, but another service"}[kind]
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"127.0.0.1:{port} within .* 1 s: .*{message}") as error:
        connect(timeout_s=1)
    assert error.value.exit_status == 2
    assert time.monotonic() - began < 30, "torch alone would wait for ever"


def test_nobody_at_the_rendezvous(environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name, value in {**RANK_1, "MASTER_PORT": str(port)}.items():
        environment.setenv(name, value)
    environment.setattr(module, "HINT_S", 0.2)
    with pytest.raises(LostRankError, match=rf"nothing listens at 127.0.0.1:{port}"):
        connect(timeout_s=1)
    assert f"rank 0 does not listen at 127.0.0.1:{port} yet" in caplog.text


def test_a_port_that_is_taken(environment: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        for name, value in {**RANK_1, "RANK": "0", "MASTER_PORT": str(port)}.items():
            environment.setenv(name, value)
        with pytest.raises(UserError, match=rf"127.0.0.1:{port} .*the port is taken on ") as error:
            connect(timeout_s=1)
    assert error.value.exit_status == 2


@pytest.mark.parametrize("host", ["no-such-host.invalid", "no.." + 70 * "x"])
def test_a_host_that_nobody_knows(host: str, environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name, value in {**RANK_1, "MASTER_ADDR": host, "MASTER_PORT": "1"}.items():
        environment.setenv(name, value)
    environment.setattr(module, "HINT_S", 0.2)
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"MASTER_ADDR: {host} is not known on {socket.gethostname()}") as error:
        connect(timeout_s=1)
    assert error.value.exit_status == 2
    assert time.monotonic() - began < 5
    assert f"{host} (MASTER_ADDR) is not known here yet" in caplog.text


JOIN = """
import sys
from mezo_dist.distributed.connect import connect
from mezo_dist.errors import LostRankError, UserError
try:
    connect(timeout_s=60)
except UserError as error:
    print(error)
    sys.exit(error.exit_status)
"""


@pytest.mark.distributed
@pytest.mark.parametrize("sizes", [(2, 3), (3, 2, 3)])
def test_ranks_that_disagree_about_their_number(sizes: tuple[int, ...]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    with contextlib.ExitStack() as stack:
        ranks = []
        for rank, size in enumerate(sizes):
            given = {**RANK_1, "RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_PORT": port}
            ranks.append(stack.enter_context(Program(["-c", JOIN], environment={**os.environ, **given})))
        for program in ranks:
            status, output, errors = program.finish()
            assert status == 2, output + errors
            told = f"WORLD_SIZE: rank 1 was told that there are {sizes[1]} ranks, rank 0 that there are {sizes[0]}; "
            assert told in output


MEET = """
import torch
from mezo_dist.distributed.connect import connect
comm = connect(timeout_s=60)
print(comm.collect(lambda: comm.rank + 1), torch.distributed.is_initialized())
"""


@pytest.mark.distributed
def test_ranks_meet_where_there_is_only_ipv6() -> None:
    """The address is one that IPv4 does not have; torch's store and gloo both have to take it."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as free:
            port = str(free.getsockname()[1])
    except OSError as error:
        pytest.skip(f"no IPv6 on this machine: {error}")
    with contextlib.ExitStack() as stack:
        given = {**os.environ, **RANK_1, "MASTER_ADDR": "::1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": ""}
        ranks = [
            stack.enter_context(Program(["-c", MEET], environment={**given, "RANK": str(rank)})) for rank in range(2)
        ]
        for program in ranks:
            status, output, errors = program.finish()
            assert status == 0, output + errors
            assert output == "[1, 2] True\n"


# Network cards


@pytest.mark.parametrize(
    ("host", "card"), [("127.0.0.1", "lo"), ("localhost", "lo"), ("127.0.1.1", "lo"), ("::1", "lo")]
)
def test_the_loopback_is_taken_where_it_is_named(host: str, card: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    assert choose_interface(host) == os.environ["GLOO_SOCKET_IFNAME"] == card


def test_a_host_whose_own_name_is_the_loopback_uses_a_card_that_others_see(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As Debian writes it into /etc/hosts: 127.0.1.1 is this host's name."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.setattr(cluster_environment, "interface_towards", lambda _: "lo")
    monkeypatch.setattr(cluster_environment, "outward_interface", lambda: "eth7")
    assert choose_interface("host1") == os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
    assert "host1 is the loopback's address on" in caplog.text
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    assert choose_interface("host1") == "eth9"
