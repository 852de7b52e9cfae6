"""The shape of any model that transformers knows, read off its class, instantiated on device meta: no weight is loaded
or made.

This is right for every architecture, but imports torch and transformers, which takes seconds; so
`mezo_dist.planning.kept_shapes` remembers what comes out.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mezo_dist.engines.hooked import HookedModule
from mezo_dist.engines.units import Unit, find_blocks, find_units
from mezo_dist.errors import UserError
from mezo_dist.planning.shapes import ModelShape, ModuleKind, ModuleShape, UnitShape, WeightShape, widest_layer
from mezo_dist.planning.templates import MOST_LAYERS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def shape_of_contents(contents: Mapping[str, Any], name: str) -> ModelShape:
    """The shape of a model of any architecture that transformers knows.

    Args:
        contents: of its config.json.
        name: of the model, for people.

    Raises:
        UserError: transformers does not know it, or cannot make it.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # transformers imports it, and it writes where answers stand
    import transformers

    transformers.utils.logging.set_verbosity_error()
    settings = dict(contents)
    kind = settings.pop("model_type", None)
    try:
        config = transformers.AutoConfig.for_model(kind, **settings)
    except Exception as error:
        raise UserError(
            f"MODEL: transformers does not know the config of {name} (model_type: {kind!r}): "
            f"{str(error).partition(chr(10))[0][:200]}"
        ) from error
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise UserError(f"MODEL: {name} has {layers:,} layers; a plan is made for at most {MOST_LAYERS:,}")
    return shape_of(config, name)


def shape_of(config: PreTrainedConfig, name: str) -> ModelShape:
    """The shape of the language model that a config of transformers describes.

    Args:
        config: of any architecture.
        name: of the model, for people.

    Raises:
        UserError: transformers cannot make a language model of it.
    """
    import transformers

    problem: Exception | None = None
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForMaskedLM, transformers.AutoModel):
        try:
            with torch.device("meta"):
                model = auto.from_config(config, trust_remote_code=False)  # else it might ask whether to run code
        except Exception as error:  # noqa: BLE001 (model code may raise anything)
            problem = problem or error
            continue
        return _shape(model, config, name)
    raise UserError(f"MODEL: transformers cannot make a model of the config of {name}: {problem}")


def _shape(model: nn.Module, config: PreTrainedConfig, name: str) -> ModelShape:
    text: Any = config.get_text_config()
    vocabulary = int(getattr(text, "vocab_size", None) or 1)
    blocks = {block for block in find_blocks(model) if not _embeds(block, vocabulary)}
    units = find_units(model)
    shapes = tuple(_unit(unit, is_block=any(module in blocks for module in unit.modules)) for unit in units)
    sizes = [max(w.shape[-2:]) for unit in units for h in unit.hooked_modules for w in h.weights if len(w.shape) >= 2]
    hidden = int(getattr(text, "hidden_size", None) or min(sizes, default=1))
    heads = int(getattr(text, "num_attention_heads", None) or 1)
    experts = int(getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 1)
    return ModelShape(
        name,
        shapes,
        hidden=hidden,
        inner=int(getattr(text, "moe_intermediate_size", None) or widest_layer(shapes, hidden)),
        layers=max(1, len(blocks)),
        heads=heads,
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(text, "head_dim", None) or max(1, hidden // heads)),
        vocabulary=vocabulary,
        window=int(getattr(text, "max_position_embeddings", None) or 2**20),
        experts=experts,
        active_experts=int(getattr(text, "num_experts_per_tok", None) or experts),
        is_dense_everywhere=experts == 1,
    )


def _embeds(block: nn.Module, vocabulary: int) -> bool:
    """Whether a block embeds tokens, and is no layer: BERT's embeddings, which are gathered like one."""
    return any(isinstance(m, nn.Embedding) and m.num_embeddings == vocabulary for m in block.modules())


def _unit(unit: Unit, *, is_block: bool) -> UnitShape:
    return UnitShape(tuple(map(_module, unit.hooked_modules)), unit.stays, is_block)


def _module(hooked: HookedModule) -> ModuleShape:
    kind: ModuleKind = "other"
    if hooked.kind is nn.Embedding:
        kind = "embedding"
    elif any(len(weight.shape) == 3 for weight in hooked.weights):
        kind = "experts"
    elif all(len(weight.shape) < 2 for weight in hooked.weights):
        kind = "vector"
    elif not issubclass(hooked.kind, nn.Embedding):  # tables of positions are looked up, and not multiplied with
        kind = "linear"
    return ModuleShape(kind, tuple(WeightShape(w.name, tuple(w.shape), w.trainable) for w in hooked.weights))
