"""What depends on the weights themselves holds for functions and for loops of one's own: decay, and a chosen eps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from mezo_dist.algorithms.mezo import MeZO
from mezo_dist.algorithms.svrg import MeZOSVRG
from mezo_dist.errors import UserError
from mezo_dist.optim.log import replay
from mezo_dist.optim.minimize import Draw, Params, minimize
from mezo_dist.optim.optimizer import Optimizer


def flat(weights: Params, draw: Draw) -> float:
    return 1.0


@pytest.mark.parametrize("everything", [False, True])
def test_vectors_decay_only_if_told_to(everything: bool) -> None:
    start = {"matrix": torch.ones(2, 3), "vector": torch.ones(3), "norm.table": torch.ones(2, 3)}
    algorithm = MeZO(lr=0.1, weight_decay=0.5, weight_decay_all=everything)
    weights = minimize(flat, start, algorithm, steps=2).weights
    factor = torch.tensor(1 - 0.05, dtype=torch.float32) ** 2
    assert torch.allclose(weights["matrix"], factor)
    for name in ("vector", "norm.table"):
        assert torch.allclose(weights[name], factor if everything else torch.tensor(1.0)), name


def test_decay_that_falls_on_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="weight_decay: all trainable weights are vectors"):
        minimize(flat, {"x": torch.ones(3)}, MeZO(weight_decay=0.5), steps=1)
    with pytest.raises(UserError, match="weight_decay: all trainable weights are vectors"):
        Optimizer(nn.LayerNorm(3), MeZOSVRG(weight_decay=0.5), full_batch=[0])


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-3)])
def test_a_function_gets_an_eps_that_its_weights_can_hold(dtype: torch.dtype, expected: float) -> None:
    seen: list[float] = []

    def function(weights: Params, draw: Draw) -> float:
        seen.append(float((weights["x"].float() - 1).abs().mean()))
        return 1.0

    minimize(function, {"x": torch.ones(4096, dtype=dtype)}, MeZO(eps="auto"), steps=1)
    assert seen[0] == pytest.approx(expected * (2 / torch.pi) ** 0.5, rel=0.1)


@pytest.mark.parametrize(("step", "expected"), [(0.0, 2e-3), (1e-5, 1e-2), (3e-2, 5e-2)])
def test_a_function_gets_an_eps_that_fits_its_rounding_and_its_bend(step: float, expected: float) -> None:
    """A function that bends, with values that are multiples of ``step`` (0: only the weights are rounded, to fp32)."""
    seen: list[float] = []

    def function(weights: Params, draw: Draw) -> float:
        x = weights["x"].double()
        if draw.step:
            seen.append(float((x - 1).abs().mean()))
        value = float(x.sum() + (x - 1).sum() ** 3 / 100)
        return round(value / step) * step if step else value

    minimum = minimize(function, {"x": torch.ones(16)}, MeZO(lr=0.0001, eps="auto"), steps=2)
    assert seen[0] == pytest.approx(expected * (2 / torch.pi) ** 0.5, rel=0.5)
    assert minimum.calls <= 2 * (2 + 4 * 6), "counted"


def test_an_optimizer_chooses_eps_warns_and_is_replayed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def model() -> nn.LayerNorm:
        return nn.LayerNorm(300).bfloat16()

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return (model(batch).float() - 2).square().mean()

    batch = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    trained, again = model(), model()
    algorithm, path = MeZO(lr=1e-2, eps="auto"), tmp_path / "steps.jsonl"
    optimizer: Optimizer[torch.Tensor] = Optimizer(trained, algorithm, trajectory=path)
    for _ in range(3):
        optimizer.step(loss, batch)
    optimizer.close()
    assert json.loads(path.read_text().splitlines()[0])["eps"] == 5e-3
    first, *others = (line["loss"] for line in map(json.loads, path.read_text().splitlines()) if "loss" in line)
    assert len(first) > 1, "what decides is logged"
    assert all(len(rounds) == 1 for rounds in others)
    assert replay(again, path) == 3
    assert torch.equal(trained.weight, again.weight)
    assert not torch.equal(trained.weight, model().weight)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    Optimizer(model(), MeZO(eps=1e-3))
    assert "algorithm.eps: 0.001 is lost in rounding on weight (cosine 0." in caplog.text
