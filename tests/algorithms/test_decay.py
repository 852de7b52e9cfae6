"""Weight decay: how much of it a step does, to which weights, and what it rules out."""

from __future__ import annotations

from typing import Any

import pytest

from mezo_dist.algorithms.base import Losses, Problem, Update
from mezo_dist.algorithms.decay import Decay, decays
from mezo_dist.algorithms.mezo import MeZO, MeZOPlanner
from mezo_dist.algorithms.operations import Scale, encode
from mezo_dist.algorithms.schedules import Schedule
from mezo_dist.algorithms.svrg import MeZOSVRG, SVRGPlanner
from mezo_dist.directions.combination import to_fp32

PROBLEM = Problem(seed=1, num_steps=10, batch_size=2, full_size=4)


def test_decay_is_saved_up_until_a_factor_can_hold_it() -> None:
    decay, product, factors = Decay(), 1.0, []
    for _ in range(10_000):
        factor, decay = decay.after(1e-6)
        assert factor == to_fp32(factor)
        product *= factor
        factors.append(factor)
    assert product * decay.owed == pytest.approx((1 - 1e-6) ** 10_000, rel=1e-12)
    assert len([f for f in factors if f != 1]) == 10_000 // 245  # 245 of them are 2^-12
    assert Decay().after(0.5) == (0.5, Decay())
    assert Decay().after(0.0) == (1.0, Decay())


def scale_of(update: Update[Any]) -> float:
    """What the weights are multiplied by."""
    return next((o.factor for o in update.operations if isinstance(o, Scale)), 1.0)


def test_decay_follows_the_learning_rate_of_the_step() -> None:
    planner: Any = MeZOPlanner(MeZO(lr=0.5, eps=0.5, weight_decay=0.1, schedule=Schedule("linear")), PROBLEM)
    state = planner.init()
    done = [planner.update(state, step, [Losses((1.0, 1.0))]) for step in (0, 5, 9)]
    assert [scale_of(update) for update in done] == [to_fp32(1 - update.metrics["lr"] * 0.1) for update in done]
    assert 0.94 < scale_of(done[0]) < scale_of(done[1]) < scale_of(done[2]) <= 1.0
    svrg: Any = SVRGPlanner(MeZOSVRG(lr=0.25, anchor_lr=0.5, q=2, anchor="auto", weight_decay=0.1), PROBLEM)
    first = svrg.update(svrg.init(), 0, [Losses((1.0, 1.0))])
    second = svrg.update(first.state, 1, [Losses((1.0,) * 4)])
    assert (first.copies_anchor, scale_of(first), scale_of(second)) == (True, to_fp32(1 - 0.05), to_fp32(1 - 0.025))


def test_no_way_leads_back_to_an_anchor_from_weights_that_decayed() -> None:
    with pytest.raises(ValueError, match=r"algorithm.anchor: must be auto \(or stored\) with weight_decay"):
        MeZOSVRG(weight_decay=0.1, anchor="replay")


def test_which_weights_decay_is_part_of_an_update_and_of_its_digest() -> None:
    operations = {}
    for everything in (False, True):
        planners: list[Any] = [
            MeZOPlanner(MeZO(lr=1.0, weight_decay=0.1, weight_decay_all=everything), PROBLEM),
            SVRGPlanner(MeZOSVRG(anchor_lr=0.5, weight_decay=0.1, weight_decay_all=everything), PROBLEM),
        ]
        for planner in planners:
            done = planner.update(planner.init(), 0, [Losses((1.0, 1.0))])
            (scale,) = (o for o in done.operations if isinstance(o, Scale))
            assert scale.exempt_vectors is not everything
            operations[everything] = done.operations
    assert encode(operations[False]) != encode(operations[True])


@pytest.mark.parametrize(
    ("name", "dimensions", "expected"),
    [
        ("model.layers.0.mlp.up_proj.weight", 2, True),
        ("model.embed_tokens.weight", 2, True),
        ("base_model.model.layers.0.q_proj.lora_B.default.weight", 2, True),
        ("model.layers.0.mlp.up_proj.bias", 1, False),
        ("transformer.h.0.ln_1.weight", 1, False),
        ("experts.gate_up_proj_bias", 2, False),
        ("block.norm.weight", 2, False),
        ("decoder.q_norm.weight", 2, False),
        ("encoder.LayerNorm.weight", 2, False),
    ],
)
def test_what_decays(name: str, dimensions: int, expected: bool) -> None:
    assert decays(name, dimensions) is expected
