"""Shapes by formula are those of the models that transformers builds."""

from __future__ import annotations

import dataclasses

import pytest
import transformers

from mezo_dist.errors import UserError
from mezo_dist.planning.families import _ASKED, shape_of_config
from mezo_dist.planning.instantiated import shape_of
from mezo_dist.planning.named import NAMED
from mezo_dist.planning.shapes import ModelShape

BILLIONS = {
    "opt-125m": 0.1252,
    "opt-175b": 174.6,
    "llama-3-405b": 405.85,
    "mixtral-8x7b": 46.70,
    "qwen3-30b-a3b": 30.53,
}
"""Published sizes."""


def units_of(shape: ModelShape) -> list[object]:
    """What matters of the units: what is gathered and made together, whatever the order of a unit's modules."""
    return [
        (unit.stays, unit.is_block, sorted((m.kind if len(m.weights[0].shape) > 1 else "", sorted(
            (w.name, w.shape) for w in m.weights)) for m in unit.modules))
        for unit in shape.units
    ]  # fmt: skip


def numbers_of(shape: ModelShape) -> dict[str, object]:
    names = {"units", "inner", "block_kind", "shared_inner", "is_dense_everywhere"}
    return {f.name: getattr(shape, f.name) for f in dataclasses.fields(shape) if f.name not in names}


@pytest.mark.parametrize("name", NAMED)
def test_a_named_shape_is_the_model_that_transformers_builds(name: str) -> None:
    settings = {**NAMED[name], "num_hidden_layers": 3}
    kind = str(settings.pop("model_type"))
    built = shape_of(transformers.AutoConfig.for_model(kind, **settings), name)
    shape = shape_of_config({**settings, "model_type": kind}, name)
    assert shape is not None
    assert units_of(shape) == units_of(built)
    assert numbers_of(shape) == numbers_of(built)
    assert shape.active_size == built.active_size


@pytest.mark.parametrize("name", ["qwen3-0.6b", "mixtral-8x7b", "qwen3-30b-a3b"])
def test_what_a_class_has_a_default_for_is_not_guessed(name: str) -> None:
    """Qwen3's heads have 128 dimensions, whatever hidden / heads is; Mixtral has 8 experts."""
    for key in _ASKED[str(NAMED[name]["model_type"])]:
        for missing in ({k: v for k, v in NAMED[name].items() if k != key}, {**NAMED[name], key: None}):
            assert shape_of_config(missing, name) is None, key
    assert shape_of_config({**NAMED[name], "mlp_bias": True}, name) is None  # these classes have none
    assert shape_of_config(NAMED[name], name) is not None


def test_published_sizes() -> None:
    for name, billions in BILLIONS.items():
        shape = shape_of_config(NAMED[name], name)
        assert shape is not None
        assert shape.size / 1e9 == pytest.approx(billions, rel=1e-3)


def test_active_weights_of_experts() -> None:
    """Mixtral 8x7B computes with 12.7 of its 46.7 billion weights, its embedding not counted."""
    shape = shape_of_config(NAMED["mixtral-8x7b"], "mixtral")
    assert shape is not None
    assert shape.active_size / 1e9 == pytest.approx(12.75, abs=0.01)


def test_a_size_that_is_none() -> None:
    with pytest.raises(UserError, match="hidden_size: -1"):
        shape_of_config({**NAMED["opt-125m"], "hidden_size": -1}, "x")
    with pytest.raises(UserError, match="vocab_size: None"):
        shape_of_config(
            {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}, "x"
        )
