"""What rounding leaves of a perturbation: measured as it happens, the same on all layouts, and acted upon."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mezo_dist.algorithms.auto_eps import LADDER
from mezo_dist.algorithms.mezo import MeZO
from mezo_dist.algorithms.schedules import Schedule
from mezo_dist.algorithms.svrg_released import MeZOSVRGReleased
from mezo_dist.directions.law import Law
from mezo_dist.directions.seeds import param_id
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.layouts.base import Shard
from mezo_dist.engines.survival import SAMPLE, Survival, choose, combined, measure, settle_eps
from mezo_dist.errors import UserError
from mezo_dist.testing import spawn, tiny_model

LAWS = [Law("gaussian"), Law("rademacher"), Law("lowrank", 2)]


def shard(tensor: Tensor, start: int = 0, stop: int | None = None, *, name: str = "w", is_first: bool = True) -> Shard:
    return Shard(name, param_id(name), tensor.shape, start, tensor.flatten()[start:stop], is_first)


def survival(tensor: Tensor, eps: float, law: Law = LAWS[0], **more: Any) -> Survival:
    return combined([measure([shard(tensor)], law, [eps], **more)])["w"][0]


def ones(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.ones(4096, dtype=dtype)


def uniform() -> Tensor:
    return 1 + torch.rand(4096, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_fp32_loses_nothing(law: Law) -> None:
    for weight in (ones(torch.float32), torch.randn(64, 70, generator=torch.Generator().manual_seed(0))):
        left = survival(weight, 1e-3, law)
        assert left.cosine > 0.9999
        assert left.length == pytest.approx(1, abs=1e-3)


def test_in_bf16_a_perturbation_of_ones_vanishes_at_1e_3_and_lives_at_1e_2() -> None:
    lost, left = survival(ones(), 1e-3), survival(ones(), 1e-2)
    assert not lost.is_sound
    one_sided = survival(ones(), 1e-3, one_sided=True)
    assert one_sided.cosine == pytest.approx(0.37, abs=0.05), "97.5 % of the entries do not move"
    assert left.cosine > 0.97
    assert left.is_sound
    assert survival(ones(), 1e-5) == Survival(0.0, 0.0)


def test_fp32_weights_in_a_bf16_pass_get_noise_on_top() -> None:
    left = survival(uniform(), 1e-3, compute_dtype=torch.bfloat16)
    # The two sides are rounded independently, by 2^-7 / sqrt(12) each: 2 / 4 of its square on that of eps.
    noise = 2 * (2.0**-7) ** 2 / 12 / 4 / 1e-6
    assert left.length == pytest.approx((1 + noise) ** 0.5, rel=0.1)
    assert left.cosine == pytest.approx((1 + noise) ** -0.5, rel=0.1)
    assert not left.is_sound
    assert survival(uniform(), 1e-2, compute_dtype=torch.bfloat16).is_sound


def test_where_weights_are_gathered_in_bf16_they_are_rounded_before() -> None:
    left = survival(uniform(), 1e-3, compute_dtype=torch.bfloat16, gather_dtype=torch.bfloat16)
    assert left == survival(uniform().bfloat16(), 1e-3)


def test_one_sided_estimates_have_the_noise_of_one_rounding() -> None:
    both, one = (survival(ones(), 5e-3, one_sided=one_sided) for one_sided in (False, True))
    assert one.cosine < both.cosine


def test_fp16_that_overflows_leaves_nothing() -> None:
    assert survival(torch.full((300,), 1e6), 1e-2, compute_dtype=torch.float16) == Survival(0.0, 0.0)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
@pytest.mark.parametrize("cuts", [(0, 5000), (0, 1, 2500, 5000), (0, 400, 400, 4800, 5000)])
def test_any_cut_gives_the_same_numbers(law: Law, cuts: tuple[int, ...]) -> None:
    weight = torch.randn(100, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = measure([shard(weight)], law, LADDER)
    parts = [measure([shard(weight, a, b)], law, LADDER) for a, b in itertools.pairwise(cuts)]
    copy = measure([shard(weight, is_first=False)], law, LADDER)
    assert combined([*parts, copy]) == combined([whole])


def test_no_more_than_a_sample_is_looked_at() -> None:
    weight = torch.ones(10 * SAMPLE, dtype=torch.bfloat16)
    weight[: 4 * SAMPLE] = 1e6
    weight[-4 * SAMPLE :] = 1e6
    assert survival(weight, 1e-2).is_sound


def test_a_handful_of_weights_is_judged_by_many_directions() -> None:
    few = torch.ones(3, dtype=torch.bfloat16)
    assert survival(few, 1e-3).cosine < 0.6
    assert survival(few, 1e-2).cosine > 0.95
    assert not survival(few, 1e-3, Law("rademacher")).is_sound


def test_the_first_eps_at_which_all_survive_is_chosen() -> None:
    lost, left = Survival(0.5, 2.0), Survival(0.99, 1.0)
    assert choose({"a": [lost, left, left], "b": [lost, lost, left]}, [0.1, 0.2, 0.3]) == 0.3
    with pytest.raises(UserError, match=r"algorithm\.eps: auto finds none up to 0\.2 .* on b \(cosine 0\.50, length 2"):
        choose({"a": [lost, left], "b": [left, lost]}, [0.1, 0.2])


def norms(dtype: torch.dtype) -> nn.Module:
    """A llama of which the norms are trained."""
    model = tiny_model("llama").to(dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    return model


def settled(
    settings: Any, dtype: torch.dtype = torch.bfloat16, compute_dtype: torch.dtype | None = None
) -> float | None:
    engine = Engine(norms(dtype), Law("gaussian"), compute_dtype=compute_dtype)
    before = engine.fingerprint()
    chosen = settle_eps(engine, Communicator(), settings, seed=0)
    assert engine.fingerprint() == before
    return chosen


def test_a_bf16_llama_with_trainable_norms_warns_at_1e_3_and_not_at_1e_2(caplog: pytest.LogCaptureFixture) -> None:
    assert settled(MeZO(eps=1e-3)) is None
    assert "algorithm.eps: 0.001 is lost in rounding on model." in caplog.text
    assert "layernorm.weight (cosine 0." in caplog.text
    assert "and 1 more; 0.005 would do" in caplog.text
    caplog.clear()
    assert settled(MeZO(eps=1e-2)) is None
    assert settled(MeZO(), torch.float32) is None
    assert settled(MeZOSVRGReleased(eps=1e-2)) is None
    assert not caplog.records


def test_a_schedule_that_makes_eps_smaller_counts(caplog: pytest.LogCaptureFixture) -> None:
    settled(MeZO(eps=1e-2, eps_schedule=Schedule("linear", final=0.1)))
    assert "algorithm.eps: 0.01 is lost in rounding" in caplog.text


def test_auto_picks(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert settled(MeZO(eps="auto"), torch.float32) == 1e-3
    assert settled(MeZO(eps="auto")) == 5e-3
    assert settled(MeZO(eps="auto"), torch.float32, torch.bfloat16) == 5e-3
    assert "algorithm.eps: auto: from 0.005 on the perturbations" in caplog.text


def _on_layout(comm: Communicator, name: str) -> Any:
    from mezo_dist.engines.layouts.fsdp import Fsdp

    model = norms(torch.bfloat16)
    layout = Fsdp(model, comm) if name == "fsdp" else None
    engine = Engine(model, Law("gaussian"), layout)
    return settle_eps(engine, comm, MeZO(eps="auto"), seed=0)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["fsdp", "replicated"])
def test_ranks_agree_on_what_one_process_chooses(layout: str) -> None:
    assert spawn(_on_layout, 2, layout) == [settled(MeZO(eps="auto"))] * 2
