"""The planner of the first-order baselines says when a gradient is wanted, and how far to go along it."""

from __future__ import annotations

import math

import pytest

from mezo_dist.algorithms import FIRST_ORDER, FirstOrder, build
from mezo_dist.algorithms.base import Evaluation, Losses, Problem
from mezo_dist.algorithms.first_order import SGD, AdamW
from mezo_dist.algorithms.operations import OptimizerStep, apply_updates, encode
from mezo_dist.algorithms.schedules import Schedule
from mezo_dist.algorithms.step import StepResult, run_step

EVERY = pytest.mark.parametrize("settings", [SGD(lr=0.5), AdamW(lr=0.5)], ids=lambda settings: settings.name)


def stepped(settings: FirstOrder, losses: Losses, step: int = 0, num_steps: int = 1) -> StepResult[object]:
    planner = build(settings.name, settings, Problem(num_steps=num_steps))
    asked: list[Evaluation] = []

    def evaluate(request: Evaluation, _: int) -> Losses:
        asked.append(request)
        return losses

    result = run_step(planner, planner.init(), step, evaluate)
    assert [(len(request.variants), request.gradient) for request in asked] == [(1, True)]
    return result


def test_every_baseline_has_a_test() -> None:
    assert set(FIRST_ORDER) == {"sgd", "adamw"}


@EVERY
def test_a_step_goes_as_far_as_the_schedule_says(settings: FirstOrder) -> None:
    scheduled = type(settings)(lr=0.5, schedule=Schedule("linear", final=0.1))
    for step, lr in ((0, 0.5), (2, 0.275), (4, 0.05)):
        update = stepped(scheduled, Losses((1.5,), gradient_norm=3.0), step, num_steps=5).update
        assert update is not None
        (operation,) = update.operations
        assert isinstance(operation, OptimizerStep)
        assert [operation.lr, operation.scale] == pytest.approx([lr, 1.0])
        assert update.metrics == {"loss": 1.5, "gradient_norm": 3.0, "lr": pytest.approx(lr)}


@EVERY
@pytest.mark.parametrize(("norm", "scale"), [(3.0, 1 / 3), (1.0, 1.0), (0.2, 1.0), (0.0, 1.0)])
def test_a_long_gradient_is_shortened(settings: FirstOrder, norm: float, scale: float) -> None:
    update = stepped(type(settings)(lr=0.5, clip=1.0), Losses((1.5,), gradient_norm=norm)).update
    assert update is not None
    (operation,) = update.operations
    assert isinstance(operation, OptimizerStep)
    assert [operation.lr, operation.scale] == pytest.approx([0.5, scale])


@EVERY
@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_skips_the_step(settings: FirstOrder, norm: float) -> None:
    result = stepped(settings, Losses((1.5,), gradient_norm=norm))
    assert (result.update, result.skipped) == (None, "the gradient is not finite")


@EVERY
def test_losses_of_another_algorithm_are_no_first_order_step(settings: FirstOrder) -> None:
    with pytest.raises(ValueError, match="needs the norm of the gradient"):
        stepped(settings, Losses((1.5,)))


def test_digests_of_steps_tell_rates_and_scales() -> None:
    steps = [OptimizerStep(0.5), OptimizerStep(0.5, 0.25), OptimizerStep(0.25)]
    assert len({encode([step]) for step in steps}) == 3


def test_weights_without_an_optimiser_refuse_its_step() -> None:
    class Plain:
        def copy_anchor(self) -> None: ...

        def scale(
            self, factor: float, rounding_seed: int, *, exempt_vectors: bool, only: tuple[str, ...] | None = None
        ) -> None: ...

        def advance(self, updates: object, only: tuple[str, ...] | None = None) -> None: ...

    with pytest.raises(TypeError, match="Plain has no gradients"):
        apply_updates(Plain(), 0, [(0, (OptimizerStep(0.5),))])


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        (SGD, {"lr": 0.0}, "lr"),
        (SGD, {"momentum": -0.1}, "momentum"),
        (SGD, {"clip": 0.0}, "clip"),
        (AdamW, {"beta1": 1.0}, "beta1"),
        (AdamW, {"beta2": math.nan}, "beta2"),
        (AdamW, {"epsilon": 0.0}, "epsilon"),
        (AdamW, {"weight_decay": -1.0}, "weight_decay"),
    ],
)
def test_settings_that_make_no_sense_are_named(kind: type, settings: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=f"^algorithm.{name}: "):
        kind(**settings)
