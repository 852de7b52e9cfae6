"""MeZO-SVRG is what the paper says: a true anchor, the same batch, the same direction; that reduces the variance."""

from __future__ import annotations

import functools
from typing import Any

import torch

from mezo_dist.algorithms.base import Algorithm, Evaluation, Losses, Problem, Variant
from mezo_dist.algorithms.mezo import MeZO, MeZOPlanner
from mezo_dist.algorithms.step import run_step
from mezo_dist.algorithms.svrg import MeZOSVRG, SVRGPlanner, SVRGState
from mezo_dist.algorithms.svrg_released import MeZOSVRGReleased, SVRGReleasedPlanner
from mezo_dist.directions.bits import GAUSSIAN
from mezo_dist.directions.combination import Combination

PROBLEM = Problem(seed=1, num_steps=10, batch_size=4, full_size=16)
SVRG: Any = SVRGPlanner(MeZOSVRG(lr=0.01, anchor_lr=0.1, eps=0.5, q=3), PROBLEM)


def after_anchor() -> SVRGState:
    # p0 = (3 - 1) / (2 * 0.5) = 2
    return SVRG.update(SVRG.init(), 0, [Losses((3.0, 1.0))]).state


def test_anchor_step_uses_the_full_batch_and_the_anchor_rate() -> None:
    plan = SVRG.plan(SVRG.init(), 0)
    seed = PROBLEM.direction_seed(0)
    assert plan.batch == "full"
    assert plan.variants == tuple(Variant(Combination.single(seed, sign * 0.5)) for sign in (1, -1))
    assert SVRG.update(SVRG.init(), 0, [Losses((3.0, 1.0))]).combination == Combination.single(seed, -0.1 * 2)


def test_the_anchor_is_the_point_before_the_anchor_step() -> None:
    state = after_anchor()
    assert state.displacement == Combination.single(PROBLEM.direction_seed(0), -0.2)


def test_inner_step_probes_both_points_along_one_direction() -> None:
    state = after_anchor()
    plan = SVRG.plan(state, 1)
    z = PROBLEM.direction_seed(1)
    plus, minus = Combination.single(z, 0.5), Combination.single(z, -0.5)
    assert plan.batch == "minibatch"
    shifts = (plus, minus, plus - state.displacement, minus - state.displacement)
    assert plan.variants == tuple(Variant(shift) for shift in shifts)


def test_inner_update_is_the_variance_reduced_estimate() -> None:
    state = after_anchor()
    update = SVRG.update(state, 1, [Losses((5.0, 1.0, 3.0, 2.0))])  # p = 4 here, 1 at the anchor
    z, z0 = PROBLEM.direction_seed(1), PROBLEM.direction_seed(0)
    assert update.combination == Combination.of([(z, -0.01 * 3), (z0, -0.01 * 2)])
    assert update.state.displacement == state.displacement + update.combination


def test_anchors_come_every_q_steps_and_a_skipped_one_is_made_up_for() -> None:
    state, batches = SVRG.init(), []
    for step in range(8):
        plan = SVRG.plan(state, step)
        batches.append(plan.batch)
        if step == 3:
            continue  # this anchor step is skipped: the state stays as it was
        state = SVRG.update(state, step, [Losses((1.0,) * len(plan.variants))]).state
    mini, full = "minibatch", "full"
    assert batches == [full, mini, mini, full, full, mini, mini, full]


DIM, NUM_SAMPLES, BATCH_SIZE, DRAWS = 200, 512, 64, 100


class Logistic:
    """A logistic regression late in training, where minibatch gradients are large against the full one."""

    def __init__(self) -> None:
        self.draw = torch.Generator().manual_seed(0)
        self.features = torch.randn(NUM_SAMPLES, DIM, generator=self.draw, dtype=torch.float64) * 3 / DIM**0.5
        truth = torch.randn(DIM, generator=self.draw, dtype=torch.float64)
        noise = torch.randn(NUM_SAMPLES, generator=self.draw, dtype=torch.float64)
        self.signs = torch.sign(self.features @ truth + 3 * noise)
        self.everything = torch.arange(NUM_SAMPLES)
        self.w = torch.zeros(DIM, dtype=torch.float64)
        for _ in range(300):
            self.w = self.w - self.gradient()

    def losses(self, w: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.softplus(-self.signs[index] * (self.features[index] @ w)).mean()

    def gradient(self) -> torch.Tensor:
        w = self.w.clone().requires_grad_(True)
        return torch.autograd.grad(self.losses(w, self.everything), w)[0]

    def estimate(self, algorithm: Algorithm[Any], w: torch.Tensor, state: Any, step: int) -> tuple[torch.Tensor, Any]:
        """The planner asks, the problem answers, and the update is minus the estimate, times the learning rate."""
        index = torch.randperm(NUM_SAMPLES, generator=self.draw)[:BATCH_SIZE]

        def evaluate(request: Evaluation, round_number: int) -> Losses:
            batch = self.everything if request.batch == "full" else index
            return Losses(tuple(float(self.losses(w + vector(v.shift), batch)) for v in request.variants))

        update = run_step(algorithm, state, step, evaluate).update
        assert update is not None
        return -vector(update.combination), update.state


def vector(combination: Combination) -> torch.Tensor:
    total = torch.zeros(DIM, dtype=torch.float64)
    for seed, c in combination.terms:
        total += c * direction(seed)
    return total


@functools.lru_cache(maxsize=4096)  # the variants of a step, and its update, share their directions
def direction(seed: int) -> torch.Tensor:
    return GAUSSIAN.chunks(seed, 7, 0, 1).flatten()[:DIM].double()


def test_variance_is_several_times_below_mezos_and_that_of_the_released_code_above_it() -> None:
    """E|v - grad|^2 / |grad|^2 against the gradient in closed form (in DESIGN 5: 901, 193; released 1995)."""
    toy = Logistic()
    gradient, lr = toy.gradient(), 2.0**-20  # small: the released code moves between the estimates of a step
    errors: dict[str, list[float]] = {"mezo": [], "svrg": [], "released": []}
    for draw in range(DRAWS):
        problem = Problem(seed=draw, num_steps=10, batch_size=BATCH_SIZE, full_size=NUM_SAMPLES)
        mezo = MeZOPlanner(MeZO(lr=lr, eps=1e-3), problem)
        svrg: Any = SVRGPlanner(MeZOSVRG(lr=lr, anchor_lr=1e-2, eps=1e-3, q=10), problem)
        released = SVRGReleasedPlanner(MeZOSVRGReleased(lr=lr, anchor_lr=1e-2, eps=1e-3, q=10), problem)
        estimates = {"mezo": toy.estimate(mezo, toy.w, mezo.init(), 1)[0]}
        anchors: dict[str, Algorithm[Any]] = {"svrg": svrg, "released": released}
        for name, planner in anchors.items():
            anchored, state = toy.estimate(planner, toy.w, planner.init(), 0)
            estimates[name] = toy.estimate(planner, toy.w - anchored, state, 1)[0]
        for name, estimate in estimates.items():
            errors[name].append(float(((estimate / lr - gradient) ** 2).sum()))
    relative = {name: sum(e) / DRAWS / float((gradient**2).sum()) for name, e in errors.items()}
    print("E|v - grad|^2 / |grad|^2: " + ", ".join(f"{name} {error:.0f}" for name, error in relative.items()))
    assert relative["svrg"] < relative["mezo"] / 3
    assert relative["released"] > 1.4 * relative["mezo"]
