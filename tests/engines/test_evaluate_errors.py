"""Errors in the middle of an evaluation surface where they belong, and leave the model whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mezo_dist.directions.law import Law
from mezo_dist.engines.engine import Engine
from tests.engines.models import VARIANTS, Broken, assert_same, assert_untouched, attributes, explode, make, state


@pytest.mark.parametrize(("name", "place"), [("llama", "model.layers.1.mlp.up_proj"), ("Blocks", "norm")])
def test_an_error_in_the_middle_of_the_model_surfaces_and_leaves_it_whole(name: str, place: str) -> None:
    model, items, forward = make(name)
    engine = Engine(model, Law("gaussian"))
    before, modules = state(model), attributes(model)
    wanted = engine.evaluate(VARIANTS, items, forward)
    handle = model.get_submodule(place).register_forward_pre_hook(explode)
    with pytest.raises(Broken) as caught:
        engine.evaluate(VARIANTS, items, forward)
    assert caught.traceback[-1].name == "explode"
    assert any(entry.name == "forward" for entry in caught.traceback)  # the model's own frames lead there
    handle.remove()
    assert_untouched(model, before, modules)
    assert_same(engine.evaluate(VARIANTS, items, forward), wanted)


def test_an_error_inside_a_layer_keeps_its_traceback() -> None:
    model, items, forward = make("Blocks")
    engine = Engine(model, Law("gaussian"))
    before, modules = state(model), attributes(model)

    def wrong(model: nn.Module, x: Tensor) -> Tensor:
        return model(x) if len(x) < 4 else model(x[:, :, :3].repeat(1, 1, 3)[..., :8].double())

    with pytest.raises(RuntimeError) as caught:
        engine.evaluate(VARIANTS, items, wrong)
    names = [entry.name for entry in caught.traceback]
    assert "wrong" in names
    assert names.index("wrong") < names.index("on_tensors")  # from the pass, through the model, into the layer
    assert str(caught.traceback[-1].path).endswith("functional.py")
    assert_untouched(model, before, modules)
    assert len(engine.evaluate(VARIANTS, items, forward)) == 3


def test_a_pass_may_handle_an_error_and_go_on() -> None:
    """As in plain code: the error is raised where the layer is called, so the model can catch it."""
    model, items, _ = make("Blocks")

    def careful(model: nn.Module, x: Tensor) -> Tensor:
        try:
            model(x.double())
        except RuntimeError:
            return model(x)
        raise AssertionError("fp64 went through fp32 weights")

    engine = Engine(model, Law("gaussian"))
    assert_same(engine.evaluate(VARIANTS, items, careful), engine.evaluate(VARIANTS, items, lambda m, x: m(x)))


class Casting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.then = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.first(x)
        return self.then(x @ x.mT @ y.float())


def test_a_model_that_switches_autocast_is_refused() -> None:
    """Passes take turns within one thread, so what one of them switches on would change the numbers of the others."""
    model = Casting()
    before, modules = state(model), attributes(model)
    with pytest.raises(NotImplementedError, match="switches autocast around its layers"):
        Engine(model, Law("gaussian")).evaluate(VARIANTS, [torch.ones(3, 8)], lambda m, x: m(x))
    assert not torch.is_autocast_enabled("cpu")
    assert_untouched(model, before, modules)
