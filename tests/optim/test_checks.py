"""What people do to an `Optimizer`, found by trying: right, or said in time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezo_dist import MeZO, MeZOSVRG, Momentum, Optimizer, Schedule, UserError
from mezo_dist.algorithms.base import Variant
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.testing import spawn

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def linear(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(6, 2)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    value: Tensor = model(x).square().mean()
    return value


def test_train_mode_between_steps_makes_no_noise() -> None:
    """Loops call model.train() at the start of every epoch."""
    projected: list[float] = []
    for train in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
        opt: Optimizer[Tensor] = Optimizer(model, MeZO(lr=1e-6))
        for _ in range(2):
            model.train(train)
            opt.step(loss, X)
        projected.append(opt.metrics["projected_gradient"])
    assert projected[0] == projected[1]


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "frozen": (lambda model: model[0].requires_grad_(False), r"0.weight got requires_grad_\(False\) after"),
    "thawed": (lambda model: model[1].requires_grad_(True), r"1.weight got requires_grad_\(True\) after"),
    "replaced": (
        lambda model: setattr(model[0], "weight", nn.Parameter(torch.zeros(6, 6))),
        "0.weight was replaced by another tensor after the Optimizer was made",
    ),
    "added": (lambda model: model.append(nn.Linear(2, 2, bias=False)), "2.weight was added after"),
    "removed": (lambda model: model[0].register_parameter("bias", None), "0.bias was removed after"),
    "cast": (lambda model: model.bfloat16(), "0.weight became bfloat16 after"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_the_model_are_noticed_at_the_next_step(name: str) -> None:
    change, message = CHANGES[name]
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2).requires_grad_(False))
    opt: Optimizer[Tensor] = Optimizer(model, MeZO(lr=1e-3))
    opt.step(loss, X)
    with torch.no_grad():
        model.get_parameter("0.weight").zero_()  # new values are no other parameters
    opt.step(loss, X)
    change(model)
    with pytest.raises(UserError, match=f"^model: {message}.*make a new Optimizer"):
        opt.step(loss, X)
    assert opt.num_steps_done == 2


def test_a_loss_function_that_takes_a_step() -> None:
    model = linear()
    opt: Optimizer[Tensor] = Optimizer(model, MeZO(lr=1e-3))
    other: Optimizer[Tensor] = Optimizer(model, MeZO(lr=1e-3), probe=False)
    before = opt.fingerprint()

    def nested(taker: Optimizer[Tensor], model: nn.Module, x: Tensor) -> Any:
        taker.step(loss, x)
        return loss(model, x)

    for taker in (opt, other):
        with pytest.raises(UserError, match=r"^step: called by the loss function of a step that is not over"):
            opt.step(functools.partial(nested, taker), X)
    with pytest.raises(UserError, match=r"^a forward pass \(a loss function\) evaluates variants of weights itself"):
        opt.step(lambda model, x: float(other.engine.evaluate([Variant()], [x], loss)[0][0]), X)
    assert opt.fingerprint() == before
    opt.step(loss, X)
    assert opt.num_steps_done == 1


def different(comm: Communicator) -> list[str]:
    """Messages where a rank has other weights, or trains others, or changes them beside the optimizer."""

    def message(attempt: Callable[[], object]) -> str:
        try:
            attempt()
        except UserError as error:
            return str(error)
        return ""

    frozen = linear()
    frozen.get_parameter("bias").requires_grad_(comm.rank == 0)
    changed = linear()
    opt: Optimizer[Tensor] = Optimizer(changed, MeZO(lr=0.1), comm=comm)
    opt.step(loss, X)
    with torch.no_grad():
        changed.get_parameter("weight").mul_(1 + comm.rank)
    return [
        message(lambda: Optimizer(linear(comm.rank), MeZO(), comm=comm)),
        message(lambda: Optimizer(frozen, MeZO(), comm=comm)),
        message(opt.state_dict),
        message(opt.close),
    ]


@pytest.mark.distributed
def test_processes_with_other_weights_are_told() -> None:
    for messages in spawn(different, 2):
        assert [message.split(" of rank(s) [1] differs")[0] for message in messages] == [
            "weights",
            "trainable",
            "weights",
            "weights",
        ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MeZO(scaling="normalized"), "algorithm.scaling: must be plain or sign or norm"),  # type: ignore[arg-type]
        (lambda: MeZOSVRG(anchor="store"), "algorithm.anchor: must be replay or stored or auto, not 'store'"),  # type: ignore[arg-type]
        (lambda: MeZO(directions=2.5), "algorithm.directions: must be a whole number, not 2.5"),  # type: ignore[arg-type]
        (lambda: MeZO(one_sided="no"), "algorithm.one_sided: must be true or false, not 'no'"),  # type: ignore[arg-type]
        (lambda: MeZO(lr="1e-3"), "algorithm.lr: must be a number or auto, not '1e-3'"),  # type: ignore[arg-type]
        (lambda: MeZO(momentum=0.9), "algorithm.momentum: must be a Momentum, not 0.9"),  # type: ignore[arg-type]
        (lambda: Schedule("exp"), "kind: must be constant or linear or cosine, not 'exp'"),  # type: ignore[arg-type]
        (lambda: Momentum(window=True), "window: must be a whole number, not True"),
    ],
)
def test_settings_in_python_are_checked_too(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def doubles() -> nn.Module:
    return linear().double()


def channels_last() -> nn.Module:
    model: nn.Module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def frozen() -> nn.Module:
    return linear().requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (linear, {"algorithm": {"lr": 0.1}}, "algorithm: give settings such as MeZO"),
        (linear, {"law": "foo"}, "law: 'foo' is not one of gaussian"),
        (linear, {"algorithm": MeZO(schedule=Schedule("linear"))}, "num_steps: schedule falls to the end of training"),
        (
            linear,
            {"algorithm": MeZOSVRG(), "full_batch": (x for x in [X])},
            "full_batch: every anchor step",
        ),
        (doubles, {}, r"model: weight is float64; .*model.float\(\)"),
        (channels_last, {}, "model: weight is not contiguous"),
        (frozen, {}, "model: no parameter has requires_grad"),
    ],
)
def test_what_cannot_be_used_is_said_at_once(
    model: Callable[[], nn.Module], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Optimizer(model(), **{"algorithm": MeZO(), **options})


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (
            (torch.tensor(1.0), torch.zeros(4, 3)),
            "of a pair the first must be a scalar",
        ),
        ((torch.tensor(1.0), float("nan")), "the whole number of samples"),
    ],
)
def test_pairs_that_are_no_counts(result: Any, message: str) -> None:
    opt: Optimizer[Tensor] = Optimizer(linear(), MeZO(), probe=False)
    with pytest.raises(UserError, match=message):
        opt.step(lambda model, x: result, X)


def test_no_micro_batch_at_all() -> None:
    opt: Optimizer[Tensor] = Optimizer(linear(), MeZO())
    with pytest.raises(UserError, match="the batch has no samples on any rank"):
        opt.step(loss, micro_batches=[])


def test_a_metric_may_be_flat(caplog: pytest.LogCaptureFixture) -> None:
    opt: Optimizer[Tensor] = Optimizer(linear(), MeZO(eps=0.5))
    opt.step(lambda model, x: (model(x).argmax(1) != 0).float().mean() * 0, X)
    assert "a metric as loss needs a larger eps" in caplog.text


def test_a_random_loss_is_named_as_such() -> None:
    opt: Optimizer[Tensor] = Optimizer(linear(), MeZO())
    with pytest.raises(UserError, match=r"give different losses .*make the loss deterministic\n.*probe=False"):
        opt.step(lambda model, x: loss(model, x) + torch.rand(()), X)


def test_the_probe_speaks_of_arguments_and_not_of_settings() -> None:
    model = linear()
    hidden = [model.get_parameter("weight")]

    def from_outside(model: nn.Module, x: Tensor) -> Tensor:
        return loss(model, x) + F.linear(x, hidden[0]).square().mean()

    opt: Optimizer[Tensor] = Optimizer(model, MeZO())
    with pytest.raises(UserError) as error:
        opt.step(from_outside, X)
    message = str(error.value)
    assert message.startswith("model: losses under a shift of weight are wrong, by ")
    assert 'leave them out by requires_grad_(False): ["weight"]\n(Optimizer(probe=False) skips this check.)' in message


def test_weights_that_a_forward_pass_changes() -> None:
    model = nn.Sequential(nn.Embedding(10, 8, max_norm=0.5), nn.Linear(8, 8))
    opt: Optimizer[Tensor] = Optimizer(model, MeZO())
    with pytest.raises(UserError, match="weights"):
        opt.step(loss, torch.arange(10))


class Shared(nn.Module):
    """Keeps something of a pass where no module sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.context = nn.Linear(6, 6), nn.Linear(6, 6), SimpleNamespace(mask=None)

    def forward(self, x: Tensor) -> Tensor:
        self.context.mask = x[:, :1]
        hidden: Tensor = self.second(self.first(x))
        return hidden * self.context.mask


def test_state_that_leaks_between_passes_is_noticed() -> None:
    values = []
    for width in (None, 1):
        torch.manual_seed(0)
        opt: Optimizer[Tensor] = Optimizer(Shared(), MeZO(eps=1e-4), width=width)
        values.append(opt.step(loss, micro_batches=[X, X.flip(0) * 3]))
    assert values[0] == values[1]


def test_torchscript_is_refused() -> None:
    with pytest.warns(DeprecationWarning, match="script"):
        scripted: Any = torch.jit.script(nn.Linear(6, 2))
    with pytest.raises(UserError, match="0 is TorchScript"):
        Optimizer(nn.Sequential(scripted), MeZO())


def test_buffers_belong_to_the_model(tmp_path: Any) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def cost(model: nn.Module, x: Tensor) -> Tensor:
        return F.mse_loss(model(x), x[:, :2])

    opt: Optimizer[Tensor] = Optimizer(model(), MeZO(lr=0.1), trajectory=tmp_path / "t.jsonl")
    with opt:
        opt.step(cost, X)
    other = model()
    other.get_buffer("1.running_var").mul_(2)
    with pytest.raises(UserError, match="other settings or weights: saved buffers"):
        Optimizer(other, MeZO(lr=0.1), trajectory=tmp_path / "t.jsonl", resume=True)
