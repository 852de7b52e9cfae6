"""Shapes by template are those of the models that transformers builds, and so are the plans made of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import transformers

from mezo_dist.planning.choice import plan
from mezo_dist.planning.decoders import DECODERS
from mezo_dist.planning.encoders import ENCODERS
from mezo_dist.planning.families import FAMILIES, shape_of_config
from mezo_dist.planning.instantiated import shape_of
from mezo_dist.planning.machine import Machine
from mezo_dist.planning.setting import Setting
from mezo_dist.planning.templates import Template

TEMPLATES = {**DECODERS, **ENCODERS}
COMMON = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 112,
          "vocab_size": 1000, "max_position_embeddings": 80, "pad_token_id": 0}  # fmt: skip
DECODER = {**COMMON, "num_key_value_heads": 2, "head_dim": 16}
ENCODER = {**COMMON, "type_vocab_size": 2}
SIZES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(DECODERS, DECODER),
    **dict.fromkeys(ENCODERS, ENCODER),
    "stablelm": {**COMMON, "num_key_value_heads": 2},
    "electra": {**ENCODER, "embedding_size": 32},
    "distilbert": {"dim": 48, "n_layers": 3, "n_heads": 6, "hidden_dim": 112, "vocab_size": 1000,
                   "max_position_embeddings": 80},
    "deberta-v2": {**COMMON, "type_vocab_size": 0, "relative_attention": True, "position_buckets": 16,
                   "norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False},
}  # fmt: skip
WAYS = [
    (Setting(tokens=32), Machine()),
    (Setting(layout="fsdp", tokens=32, reads="tokens", targets=8), Machine(2, 2, gpu=False)),
]


def contradicting(template: Template) -> list[dict[str, Any]]:
    """Settings that a template does not cover."""
    return [{key: (not usual) if isinstance(usual, bool) else 7} for key, usual in template.plain.items()]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_template_is_the_model_that_transformers_builds(kind: str) -> None:
    """As transformers writes the config, and as people do who leave out what is usual; with every flag changed, and the
    ends tied or not. The whole plan is that of the model, too."""
    template = TEMPLATES[kind]
    changed = {key: not usual for key, usual in template.flags.items()}
    if "tie_word_embeddings" not in template.plain:
        changed["tie_word_embeddings"] = not template.tied
    for options in ({}, changed) if changed else ({},):
        settings = {**SIZES[kind], **options}
        config = transformers.AutoConfig.for_model(kind, **settings)
        built = shape_of(config, kind)
        for contents in (json.loads(config.to_json_string()), {"model_type": kind, **settings}):
            shape = shape_of_config(contents, kind)
            assert shape == built
            assert [plan(shape, *way) for way in WAYS] == [plan(built, *way) for way in WAYS]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_what_a_template_leaves_open_is_asked_of_transformers(kind: str) -> None:
    contents = {"model_type": kind, **SIZES[kind]}
    assert shape_of_config(contents, kind) is not None
    for more in contradicting(TEMPLATES[kind]):
        assert shape_of_config({**contents, **more}, kind) is None, more
    for size in {*SIZES[kind]} - {"pad_token_id", "max_position_embeddings", "head_dim", "type_vocab_size"}:
        if size == "num_key_value_heads" and "k_proj=k" not in TEMPLATES[kind].block:
            continue
        if size == "intermediate_size" and TEMPLATES[kind].inner is None:
            continue
        assert shape_of_config({key: value for key, value in contents.items() if key != size}, kind) is None, size


def test_an_electra_as_wide_as_its_embeddings_has_no_projection() -> None:
    settings = {**SIZES["electra"], "embedding_size": 48}
    built = shape_of(transformers.AutoConfig.for_model("electra", **settings), "electra")
    assert shape_of_config({"model_type": "electra", **settings}, "electra") == built


def test_a_size_under_two_names_or_heads_that_do_not_divide_it_are_asked_of_transformers() -> None:
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "vocab_size": 64, "max_position_embeddings": 64}
    distilbert = {"model_type": "distilbert", **sizes}
    assert shape_of_config(distilbert, "x") is not None
    assert shape_of_config({**distilbert, "n_embd": 8}, "x") is None
    assert shape_of_config({**distilbert, "n_heads": 3}, "x") is None


def test_sizes_that_the_class_has_defaults_for() -> None:
    """Gemma's heads are 256 wide if nothing is said, whatever 48 / 6 is."""
    contents = {"model_type": "gemma", **{key: value for key, value in DECODER.items() if key != "head_dim"}}
    assert shape_of_config(contents, "gemma") is None


def test_a_family_is_written_down_once() -> None:
    assert len({*FAMILIES, *DECODERS, *ENCODERS}) == len(FAMILIES) + len(DECODERS) + len(ENCODERS)
