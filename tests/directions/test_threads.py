"""On whose threads the compiled kernels run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mezo_dist.directions.add import add
from mezo_dist.directions.bits import GAUSSIAN
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.kernels import cpu, threads

LARGE = 1024 * cpu.CHUNKS_PER_THREAD * 4


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    threads.torch_team.cache_clear()
    yield
    threads.torch_team.cache_clear()
    torch.set_num_threads(before)


def sample_of_a_direction() -> torch.Tensor:
    output = torch.empty(LARGE)
    add(torch.zeros(LARGE), [Combination.single(1, 1.0)], [output], param_id=2, bits=GAUSSIAN)
    return output


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere directions have threads of their own")
def test_directions_are_made_on_the_threads_that_torch_has() -> None:
    assert threads.torch_team() is not None, torch.__config__.parallel_info()
    torch.ones(1 << 20).mul_(2)  # now they are there
    before = sorted(path.name for path in Path("/proc/self/task").iterdir())
    sample_of_a_direction()
    assert sorted(path.name for path in Path("/proc/self/task").iterdir()) == before


def test_without_them_others_do_it_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = sample_of_a_direction()
    threads.torch_team.cache_clear()
    monkeypatch.setattr(threads, "_openmp_of_torch", lambda: None)
    with caplog.at_level(logging.INFO):
        assert torch.equal(sample_of_a_direction(), expected)
        assert torch.equal(sample_of_a_direction(), expected)
    assert [record.getMessage().count("beside torch's") for record in caplog.records] == [1]


def test_a_library_that_speaks_another_interface_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(threads, "_openmp_of_torch", lambda: Path(torch.__file__).parent / "lib" / "libc10.so")
    with caplog.at_level(logging.INFO):
        assert threads.torch_team() is None
    assert "GOMP_parallel" in caplog.text
