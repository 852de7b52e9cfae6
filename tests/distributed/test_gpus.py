"""GPUs of processes, played: one each, or none at all."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mezo_dist.distributed import connect
from mezo_dist.distributed.environment import ClusterEnvironment
from mezo_dist.distributed.gpus import choose_gpu, compare_gpus, name_of
from mezo_dist.errors import UserError


def compare(*names: str) -> list[str]:
    """What each of as many ranks says; empty if it goes on."""
    store = dist.HashStore()

    def one(rank: int) -> str:
        try:
            compare_gpus(store, ClusterEnvironment("", rank, len(names)), names[rank])
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(names)) as pool:
        return list(pool.map(one, range(len(names))))


def test_all_have_one_or_none_has() -> None:
    assert compare("a", "b", "c") == ["", "", ""]
    assert compare("", "") == ["", ""]


def test_a_rank_without_a_gpu_among_ranks_with_one_is_an_error_on_all() -> None:
    one, *others = compare("a", "", "b", "")
    assert "rank(s) 1, 3 see no GPU" in one
    assert set(others) == {one}


def test_two_ranks_on_one_gpu_are_an_error_on_all() -> None:
    one, *others = compare("a", "b", "a")
    assert "ranks 0, 2 are on the same GPU (a): start one process per GPU" in one
    assert set(others) == {one}


@pytest.mark.parametrize(("local_rank", "seen", "index"), [(0, 1, 0), (3, 4, 3), (3, 1, 0)])
def test_the_gpu_of_a_process(local_rank: int, seen: int, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers may show each process all GPUs of its host, or its own alone."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert choose_gpu(local_rank) == torch.device("cuda", index)
    assert current == [torch.device("cuda", index)]


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_gpu(1) is None
    assert name_of(None) == ""


LAUNCHERS = {
    "torchrun": {"RANK": "{rank}", "WORLD_SIZE": "8", "LOCAL_RANK": "{local}", "LOCAL_WORLD_SIZE": "4",
                 "TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "host1", "MASTER_PORT": "29500"},
    "deepspeed": {"RANK": "{rank}", "WORLD_SIZE": "8", "LOCAL_RANK": "{local}", "CROSS_RANK": "{node}",
                  "CROSS_SIZE": "2", "MASTER_ADDR": "host1", "MASTER_PORT": "29500"},
    "Open MPI": {"OMPI_COMM_WORLD_RANK": "{rank}", "OMPI_COMM_WORLD_SIZE": "8", "MASTER_ADDR": "host1",
                 "OMPI_COMM_WORLD_LOCAL_RANK": "{local}", "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "MASTER_PORT": "29500"},
    "MPICH": {"PMI_RANK": "{rank}", "PMI_SIZE": "8", "MPI_LOCALRANKID": "{local}", "MPI_LOCALNRANKS": "4",
              "MASTER_ADDR": "host1", "MASTER_PORT": "29500"},
    "srun": {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8", "SLURM_PROCID": "{rank}", "SLURM_LOCALID": "{local}",
             "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2",
             "SLURM_STEP_NODELIST": "gpu[07-08]"},
}  # fmt: skip
"""What a launcher sets for a rank of two hosts with four GPUs each."""


class Joined(UserError):
    """The process group would be made now."""


@pytest.fixture
def joining(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """What a rank asks of `init_process_group`, and which GPU was the current one then."""

    def start(environment: dict[str, str], *, seen: int) -> dict[str, Any]:
        asked: dict[str, Any] = {}

        def joined(*args: Any, **options: Any) -> None:
            asked.update(options, backend=args[0])
            raise Joined

        for name in [name for some in LAUNCHERS.values() for name in some]:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.update(current=device))
        monkeypatch.setattr(connect, "name_of", lambda gpu: str(gpu or ""))
        monkeypatch.setattr(connect, "open_store", lambda *_: dist.HashStore())
        monkeypatch.setattr(connect, "_rendezvous", lambda store, *_: store)
        monkeypatch.setattr(connect, "rendezvous_url", lambda *_: "tcp://host1:29500")
        monkeypatch.setattr(connect, "share_cores", lambda _: None)
        monkeypatch.setattr(connect, "compare_gpus", lambda *_: None)  # has tests of its own, above
        monkeypatch.setattr(dist, "init_process_group", joined)
        with pytest.raises(Joined):
            connect.connect(timeout_s=5)
        return asked

    return start


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_gives_each_process_the_gpu_of_its_local_rank(
    launcher: str, joining: Callable[..., dict[str, Any]]
) -> None:
    for rank in range(8):
        node, local = divmod(rank, 4)
        environment = {k: v.format(rank=rank, local=local, node=node) for k, v in LAUNCHERS[launcher].items()}
        for seen, index in ((4, local), (1, 0), (0, None)):  # all GPUs of the host, its own alone, none
            asked = joining(environment, seen=seen)
            device = None if index is None else torch.device("cuda", index)
            assert (asked["rank"], asked["world_size"]) == (rank, 8)
            assert asked["device_id"] == asked.get("current") == device
            assert asked["backend"] == ("gloo" if device is None else "cpu:gloo,cuda:nccl")
