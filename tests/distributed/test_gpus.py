"""GPUs of processes, played: one each, or none at all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

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
