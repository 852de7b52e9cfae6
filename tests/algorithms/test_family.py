"""What each option of an algorithm does to the numbers, worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from mezo_dist.algorithms.base import Evaluation, Losses, Problem, Update, Variant
from mezo_dist.algorithms.decay import Decay, decays
from mezo_dist.algorithms.mezo import MeZO, MeZOPlanner, MeZOState
from mezo_dist.algorithms.momentum import Momentum, Past
from mezo_dist.algorithms.operations import Scale, encode
from mezo_dist.algorithms.schedules import Annealing, Schedule
from mezo_dist.algorithms.svrg import MeZOSVRG, SVRGPlanner, SVRGState
from mezo_dist.algorithms.svrg_released import MeZOSVRGReleased, SVRGReleasedPlanner, SVRGReleasedState
from mezo_dist.directions.combination import ZERO, Combination, to_fp32
from mezo_dist.errors import UserError

PROBLEM = Problem(seed=1, num_steps=10, batch_size=2, full_size=4)
SEEDS = [PROBLEM.direction_seed(0, k) for k in range(4)]


def mezo(**settings: Any) -> MeZOPlanner:
    return MeZOPlanner(MeZO(lr=1.0, eps=0.5, **settings), PROBLEM)


def update(planner: MeZOPlanner, *losses: float, state: MeZOState | None = None) -> Update[Any]:
    return planner.update(state or planner.init(), 0, [Losses(losses)])


def test_one_sided_estimates_share_one_evaluation_of_the_weights() -> None:
    planner = mezo(directions=2, one_sided=True)
    plan = planner.plan(planner.init(), 0)
    assert plan.variants == (*(Variant(Combination.single(seed, 0.5)) for seed in SEEDS[:2]), Variant())
    done = update(planner, 3.0, 1.5, 2.0)  # slopes 2 and -1, of each half
    assert done.combination == Combination.of([(SEEDS[0], -1.0), (SEEDS[1], 0.5)])
    assert done.metrics["loss"] == 2.0


def test_several_directions_per_sample_average_over_samples_and_directions() -> None:
    planner = MeZOPlanner(MeZO(lr=1.0, eps=0.5, per_sample=True, directions=2), replace(PROBLEM, batch_size=2))
    rows = (SEEDS[:2], SEEDS[2:4])  # a first direction of both samples, then a second one
    plan = planner.plan(planner.init(), 0)
    assert plan.each_sample
    assert [v.per_sample for v in plan.variants] == [
        tuple(Combination.single(seed, eps) for seed in row) for row in rows for eps in (0.5, -0.5)
    ]
    each = ((3.0, 0.0), (1.0, 1.0), (1.0, 5.0), (1.0, 1.0))  # slopes 2 and -1 along the first, 0 and 4 along the second
    done = planner.update(planner.init(), 0, [Losses((1.5, 1.0, 3.0, 1.0), each)])
    assert isinstance(done, Update)
    assert done.combination == Combination.of([(SEEDS[0], -0.5), (SEEDS[1], 0.25), (SEEDS[3], -1.0)])


def test_one_sided_per_sample_compares_each_sample_with_itself() -> None:
    config = MeZO(lr=1.0, eps=0.5, per_sample=True, directions=2, one_sided=True)
    planner = MeZOPlanner(config, replace(PROBLEM, batch_size=2))
    plan = planner.plan(planner.init(), 0)
    assert len(plan.variants) == 3
    assert plan.variants[-1] == Variant()
    done = planner.update(planner.init(), 0, [Losses((2.0, 2.0, 1.5), ((3.0, 1.0), (2.0, 2.0), (2.0, 1.0)))])
    assert isinstance(done, Update)
    assert done.combination == Combination.of([(SEEDS[0], -0.5), (SEEDS[3], -0.5)])
    assert done.metrics["loss"] == 1.5


def test_svrg_has_several_directions_per_sample_in_both_kinds_of_step() -> None:
    config = MeZOSVRG(eps=0.5, q=2, per_sample=True, directions=3, anchor_directions=2)
    planner = SVRGPlanner(config, replace(PROBLEM, batch_size=2, full_size=5))
    shapes = []
    for state in (SVRGState(), SVRGState(0, Combination.single(9, 1.0), Combination.single(9, -3.0))):
        plan = planner.plan(state, 1)
        shapes.append((len(plan.variants), {len(v.per_sample) for v in plan.variants}))
        assert len({s for v in plan.variants for s in v.per_sample}) == 2 * 2 * (5 if state.anchor_step < 0 else 3)
    assert shapes == [(2 * 2, {5}), (2 * 2 * 3, {2})]


def test_sign() -> None:
    done = update(mezo(directions=3, scaling="sign"), 3.0, 1.0, 1.0, 1.5, 2.0, 2.0)
    assert done.combination == Combination.of([(SEEDS[0], -1 / 3), (SEEDS[1], 1 / 3)])


def test_normalised_by_the_standard_deviation_of_one_sided_losses() -> None:
    planner = mezo(directions=3, one_sided=True, scaling="normalised")
    done = update(planner, 1.0, 2.0, 6.0, 2.0)  # slopes -2, 0, 8: mean 2, deviation sqrt((16 + 4 + 36) / 2)
    deviation = math.sqrt(28)
    assert done.combination == Combination.of([(SEEDS[0], 2 / 3 / deviation), (SEEDS[2], -8 / 3 / deviation)])


def test_normalised_steps_are_as_long_whatever_the_loss_is_multiplied_by() -> None:
    planner = mezo(directions=2, scaling="normalised")
    losses = (3.0, 1.0, 0.5, 1.5)
    assert update(planner, *losses).combination == update(planner, *(64 * loss for loss in losses)).combination


def test_clip_cuts_single_projected_gradients() -> None:
    done = update(mezo(directions=2, clip=1.5), 3.0, 1.0, 1.0, 2.0)  # 2 and -1
    assert done.combination == Combination.of([(SEEDS[0], -0.75), (SEEDS[1], 0.5)])
    assert done.metrics["projected_gradient"] == pytest.approx(math.sqrt(2.5)), "what is shown is what was measured"


def test_momentum_is_a_weighted_mean_of_the_last_estimates() -> None:
    rule, past = Momentum(decay=0.5, window=2), Past()
    a, b, c = (Combination.single(seed, 4.0) for seed in (1, 2, 3))
    first, past = past.with_now(a, rule)
    second, past = past.with_now(b, rule)
    third, past = past.with_now(c, rule)
    assert first == a
    assert second == Combination.of([(2, 4 * 2 / 3), (1, 4 / 3)])
    assert third == Combination.of([(3, 4 * 2 / 3), (2, 4 / 3)]), "the oldest has left the window"


def test_without_momentum_nothing_is_remembered() -> None:
    assert Past().with_now(Combination.single(1, 0.3), Momentum()) == (Combination.single(1, 0.3), Past())


def test_a_pool_holds_all_directions() -> None:
    planner = mezo(directions=2, pool=5)
    drawn = [
        seed for step in range(50) for v in planner.plan(planner.init(), step).variants for seed, _ in v.shift.terms
    ]
    assert len(set(drawn)) == 5
    assert drawn[:4] != drawn[4:8]


def test_pull_takes_off_a_part_of_the_way_from_the_base() -> None:
    planner = MeZOPlanner(MeZO(lr=0.5, eps=0.5, pool=100, pull=0.25), PROBLEM)
    way = Combination.of([(5, 8.0), (6, -16.0)])
    done = update(planner, 1.0, 1.0, state=MeZOState(total=way))
    assert done.combination == -0.125 * way
    assert done.state.total == 0.875 * way


def test_the_total_is_the_sum_of_all_updates() -> None:
    planner = MeZOPlanner(MeZO(lr=0.5, eps=0.5, pool=4, pull=0.25), PROBLEM)
    state, total = planner.init(), ZERO
    for step in range(9):
        done = planner.update(state, step, [Losses((1.0 + step, 0.5))])
        state, total = done.state, total + done.combination
    assert state.total == total
    assert 0 < len(total) <= 4


def test_eps_follows_its_schedule() -> None:
    planner = mezo(eps_schedule=Schedule("linear", final=0.1))
    sizes = [abs(planner.plan(planner.init(), step).variants[0].shift.terms[0][1]) for step in (0, 9)]
    assert sizes == pytest.approx([0.5, 0.05])
    last = planner.update(planner.init(), 9, [Losses((3.0, 1.0))])
    assert last.metrics["projected_gradient"] == pytest.approx(2 / (2 * 0.05))


def test_svrg_with_several_directions_averages_differences() -> None:
    config = MeZOSVRG(lr=1.0, anchor_lr=0.1, eps=0.5, q=3, directions=2, clip=2.5)
    planner = SVRGPlanner(config, PROBLEM)
    state = planner.update(planner.init(), 0, [Losses((3.0, 1.0))]).state
    plan = planner.plan(state, 1)
    z1, z2 = (PROBLEM.direction_seed(1, k) for k in range(2))
    shifts = [Combination.single(z, step) for z in (z1, z2) for step in (0.5, -0.5)]
    assert [v.shift for v in plan.variants] == [*shifts, *(shift - state.displacement for shift in shifts)]
    losses = Losses((5.0, 1.0, 2.0, 1.0, 2.0, 1.0, 1.0, 2.0))  # here 4 and 1, at the anchor 1 and -1
    done = planner.update(state, 1, [losses])
    assert done.combination == Combination.of([(z1, -2.5 / 2), (z2, -2.0 / 2), (SEEDS[0], -2.0)])


def test_svrg_one_sided_probes_both_points_themselves() -> None:
    planner = SVRGPlanner(MeZOSVRG(eps=0.5, q=2, one_sided=True), PROBLEM)
    state = SVRGState(0, Combination.single(9, 1.0), Combination.single(9, -3.0))
    z = PROBLEM.direction_seed(1)
    shifts = [v.shift for v in planner.plan(state, 1).variants]
    assert shifts == [
        Combination.single(z, 0.5),
        ZERO,
        Combination.of([(z, 0.5), (9, 3.0)]),
        Combination.single(9, 3.0),
    ]
    done = planner.update(state, 1, [Losses((2.0, 1.0, 4.0, 3.5))])
    assert done.metrics["projected_difference"] == 2.0 - 1.0


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
    planner = MeZOPlanner(MeZO(lr=0.5, eps=0.5, weight_decay=0.1, schedule=Schedule("linear")), PROBLEM)
    state = planner.init()
    done = [planner.update(state, step, [Losses((1.0, 1.0))]) for step in (0, 5, 9)]
    assert [scale_of(update) for update in done] == [to_fp32(1 - update.metrics["lr"] * 0.1) for update in done]
    assert 0.94 < scale_of(done[0]) < scale_of(done[1]) < scale_of(done[2]) <= 1.0
    svrg = SVRGPlanner(MeZOSVRG(lr=0.25, anchor_lr=0.5, q=2, anchor="auto", weight_decay=0.1), PROBLEM)
    first = svrg.update(svrg.init(), 0, [Losses((1.0, 1.0))])
    second = svrg.update(first.state, 1, [Losses((1.0,) * 4)])
    assert (first.copies_anchor, scale_of(first), scale_of(second)) == (True, to_fp32(1 - 0.05), to_fp32(1 - 0.025))


def test_svrg_with_a_stored_anchor_probes_a_copy() -> None:
    planner = SVRGPlanner(MeZOSVRG(eps=0.5, q=2, anchor="stored"), PROBLEM)
    first = planner.update(planner.init(), 0, [Losses((3.0, 1.0))])
    assert first.copies_anchor
    z = PROBLEM.direction_seed(1)
    around = [Combination.single(z, step) for step in (0.5, -0.5)]
    assert planner.plan(first.state, 1).variants == (*map(Variant, around), *(Variant(s, (), "anchor") for s in around))
    second = planner.update(first.state, 1, [Losses((5.0, 1.0, 3.0, 2.0))])
    replayed = SVRGPlanner(MeZOSVRG(eps=0.5, q=2), PROBLEM)
    assert second.combination == replayed.update(first.state, 1, [Losses((5.0, 1.0, 3.0, 2.0))]).combination
    assert not second.copies_anchor
    assert second.state.displacement == ZERO


@pytest.mark.parametrize(
    ("settings", "problem", "stored"),
    [
        ({"q": 9}, {}, False),  # before the next anchor, the displacement has 8 directions
        ({"q": 10}, {}, True),
        ({"q": 3, "directions": 4, "anchor_directions": 4}, {}, False),
        ({"q": 3, "directions": 4, "anchor_directions": 5}, {}, True),
        ({"q": 2, "per_sample": True}, {"full_size": 8}, False),
        ({"q": 3, "per_sample": True}, {"full_size": 8}, True),
        ({"q": 2, "per_sample": True, "anchor_directions": 2}, {"full_size": 8}, True),
        ({"q": 2}, {"has_16bit_weights": True}, True),
        ({"q": 1}, {"has_16bit_weights": True}, False),
        ({"q": 5, "momentum": Momentum(0.5, 10)}, {}, True),
    ],
)
def test_auto_stores_what_is_long_or_rounded(settings: dict[str, Any], problem: dict[str, Any], stored: bool) -> None:
    planner = SVRGPlanner(MeZOSVRG(anchor="auto", **settings), replace(PROBLEM, **problem))
    number = len(planner.plan(planner.init(), 0).variants)
    losses = Losses((1.0,) * number, ((1.0,) * planner.problem.full_size,) * number)
    assert planner.update(planner.init(), 0, [losses]).copies_anchor is stored


RELEASED = SVRGReleasedPlanner(MeZOSVRGReleased(lr=0.5, anchor_lr=0.1, eps=0.5, annealing=Annealing(5.0, 2)), PROBLEM)


def test_the_released_code_takes_three_steps_for_one_and_never_leaves_for_the_anchor() -> None:
    state = RELEASED.update(RELEASED.init(), 0, [Losses((3.0, 1.0))])
    assert isinstance(state, Update)
    z1, z2 = (PROBLEM.direction_seed(1, k) for k in range(2))
    first = RELEASED.plan(state.state, 1)
    assert [v.shift for v in first.variants] == [Combination.single(z1, 0.5), Combination.single(z1, -0.5)]
    rounds = [Losses((4.0, 1.0))]  # 3
    second = RELEASED.update(state.state, 1, rounds)
    assert isinstance(second, Evaluation)
    moved = Combination.single(z1, -1.5)
    assert [v.shift for v in second.variants] == [moved + Combination.single(z2, step) for step in (0.5, -0.5)]
    done = RELEASED.update(state.state, 1, [*rounds, Losses((2.0, 1.0))])
    assert isinstance(done, Update)
    assert done.combination == moved + Combination.of([(z2, 0.5), (SEEDS[0], -0.5 * 2)])


def test_the_released_annealing_raises_small_rates() -> None:
    state = SVRGReleasedState(lr=1e-8, anchor_lr=0.1, losses=(1.0, 1.0, 1.0, 1.0, 2.0, 2.0))
    for step, expected in ((8, (1e-8, 0.1)), (9, (1e-8, 0.1)), (10, (1e-6, 0.02))):
        planned = RELEASED.update(state, step, [Losses((1.0, 1.0)), Losses((1.0, 1.0))])
        assert isinstance(planned, Update)
        assert (planned.state.lr, planned.state.anchor_lr) == pytest.approx(expected), step


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip": 0.0}, "algorithm.clip: must be above 0"),
        ({"pool": 0}, "algorithm.pool: must be at least 1"),
        ({"pull": 0.1}, "algorithm.pull: .*needs algorithm.pool"),
        ({"weight_decay": -1.0}, "algorithm.weight_decay: must be at least 0"),
        ({"lr": 0.5, "weight_decay": 2.0}, "algorithm.weight_decay: .*below 1 / algorithm.lr"),
        ({"pool": 4, "pull": 0.1, "weight_decay": 0.1}, "algorithm.weight_decay: does not go together with pull"),
        ({"one_sided": True, "scaling": "normalised"}, "algorithm.directions: must be at least 2"),
        ({"eps_schedule": Schedule("linear")}, "algorithm.eps_schedule.final: must be above 0"),
    ],
)
def test_contradictions_name_the_setting(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeZO(**settings)


def test_no_way_leads_back_to_an_anchor_from_weights_that_decayed() -> None:
    with pytest.raises(ValueError, match=r"algorithm.anchor: must be auto \(or stored\) with weight_decay"):
        MeZOSVRG(weight_decay=0.1, anchor="replay")


def test_which_weights_decay_is_part_of_an_update_and_of_its_digest() -> None:
    operations = {}
    for everything in (False, True):
        planners: list[Any] = [
            mezo(weight_decay=0.1, weight_decay_all=everything),
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


@pytest.mark.parametrize(
    "planner",
    [MeZOPlanner(MeZO(eps="auto"), PROBLEM), SVRGPlanner(MeZOSVRG(eps="auto"), PROBLEM)],
    ids=["mezo", "svrg"],
)
def test_a_chosen_eps_is_used_and_a_missing_one_is_named(planner: Any) -> None:
    chosen = replace(planner, problem=replace(PROBLEM, eps=0.25))
    assert {abs(c) for v in chosen.plan(chosen.init(), 0).variants for _, c in v.shift.terms} == {0.25}
    with pytest.raises(UserError, match=r"algorithm\.eps: auto is chosen when a run begins"):
        planner.plan(planner.init(), 0)


def test_svrg_stores_anchors_of_16_bit_weights_unless_told_otherwise() -> None:
    for settings, stored in ((MeZOSVRG(), True), (MeZOSVRG(anchor="replay"), False)):
        planner = SVRGPlanner(settings, replace(PROBLEM, has_16bit_weights=True))
        assert planner.update(planner.init(), 0, [Losses((1.0, 1.0))]).copies_anchor is stored
    assert not SVRGPlanner(MeZOSVRG(), PROBLEM).update(SVRGState(), 0, [Losses((1.0, 1.0))]).copies_anchor


@pytest.mark.parametrize("settings", [{"decay": 1.0}, {"decay": -0.1}, {"window": 0}])
def test_momentum_that_never_forgets_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^(decay|window): must be at least"):
        Momentum(**settings)
