"""`join`, where another library has connected the processes already."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from mezo_dist.distributed.communicator import Communicator
from mezo_dist.distributed.join import join
from mezo_dist.testing import spawn


def over_another_backend(comm: Communicator) -> tuple[bool, list[int], list[str], str]:
    """What two ranks exchange if their group claims to be one of NCCL alone, as accelerate makes it on GPUs."""
    dist.get_backend_config = lambda *_: "cuda:nccl"
    beside = join()
    uses_group = beside._where.get("group") not in (None, dist.group.WORLD)
    total = beside.round(torch.tensor([comm.rank + 1, 10]), mark=7).tolist()
    return uses_group, total, beside.gather_texts(f"rank {comm.rank}"), beside.broadcast_text(f"from {comm.rank}")


@pytest.mark.distributed
def test_a_group_without_gloo_gets_one_beside_it() -> None:
    expected = (True, [3, 20], ["rank 0", "rank 1"], "from 0")
    assert spawn(over_another_backend, 2) == [expected, expected]
