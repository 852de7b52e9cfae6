"""A shard of a parameter gets the bits that the whole parameter would get there, under every law."""

from __future__ import annotations

import itertools

import pytest
import torch

from mezo_dist.directions.combination import Combination
from mezo_dist.directions.law import Law


@pytest.mark.parametrize("name", ["gaussian", "rademacher", "lowrank"])
@pytest.mark.parametrize("shape", [(3000,), (300, 7), (65, 3, 11)])
def test_shards_get_the_bits_of_the_whole(name: str, shape: tuple[int, ...]) -> None:
    """Wherever a parameter is cut, in the middle of a row too, and with stochastic rounding."""
    law, size = Law(name, 2), torch.Size(shape)
    weight = torch.randn(size.numel(), generator=torch.Generator().manual_seed(0))
    sums = [Combination.of((seed, 0.1 * seed) for seed in seeds) for seeds in ([5], [1, 2, 3, 2**63], range(1, 40))]
    for dtype, rounding_seed in ((torch.float32, None), (torch.bfloat16, 9)):
        whole = [torch.empty(size, dtype=dtype) for _ in sums]
        law.add(weight.view(size), sums, whole, param_id=4, shape=size, rounding_seed=rounding_seed)
        for cuts in ([0, size.numel()], [0, 1, 1024, 1500, size.numel()]):
            for start, stop in itertools.pairwise(cuts):
                part = [torch.empty(stop - start, dtype=dtype) for _ in sums]
                law.add(
                    weight[start:stop], sums, part, param_id=4, shape=size, offset=start, rounding_seed=rounding_seed
                )
                for one, all_of_it in zip(part, whole, strict=True):
                    assert torch.equal(one, all_of_it.view(-1)[start:stop])


def test_rows_of_a_low_rank_direction_get_the_bits_of_the_whole() -> None:
    law, size, rows = Law("lowrank"), torch.Size((300, 16)), torch.tensor([3, 299, 64, 65, 7])
    weight = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    sums = [Combination.of((seed, 0.1) for seed in range(20))]
    whole, some = torch.empty(300, 16), torch.empty(5, 16)
    law.add(weight, sums, [whole], param_id=4, shape=size)
    law.add(weight[rows], sums, [some], param_id=4, shape=size, rows=rows)
    assert torch.equal(some, whole[rows])
