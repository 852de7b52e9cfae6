"""Shapes by formula, from the contents of a config.json: OPT, and the Llama, Mistral, Qwen and Mixtral families.

Importing transformers takes two to four seconds, which is more than a whole answer may take, so the architectures that
most people ask about are written down here, weight by weight, as their model classes in transformers name them. A
test holds each against the model that transformers builds. All others are instantiated on device meta
(`mezo_dist.planning.instantiated`), which is right for every architecture, and slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mezo_dist.errors import UserError
from mezo_dist.planning.shapes import ModelShape, ModuleKind, ModuleShape, UnitShape, WeightShape

Config = Mapping[str, Any]
MOST_LAYERS = 2_000


def shape_of_config(config: Config, name: str) -> ModelShape | None:
    """The shape that a config.json describes; None if its ``model_type`` is not written down here.

    Args:
        config: its contents.
        name: of the model, for people.

    Raises:
        UserError: a size is missing, or is no whole number above zero.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    return None if family is None else family(config, name)


def _num_layers(config: Config) -> int:
    """``num_hidden_layers``.

    Raises:
        UserError: more than any model has, whose weights would be listed for minutes.
    """
    layers = _number(config, "num_hidden_layers")
    if layers > MOST_LAYERS:
        raise UserError(f"MODEL: its config says num_hidden_layers: {layers:,}, and plans are made for {MOST_LAYERS:,}")
    return layers


def _heads(config: Config) -> tuple[int, int]:
    """Heads of queries, and of keys and values.

    Raises:
        UserError: they do not go together.
    """
    heads = _number(config, "num_attention_heads")
    kv_heads = _number(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise UserError(f"MODEL: its config says num_key_value_heads: {kv_heads}, which must divide "
                        f"num_attention_heads: {heads}")  # fmt: skip
    return heads, kv_heads


def _number(config: Config, key: str, default: int | None = None) -> int:
    """A size: a whole number above zero.

    Args:
        config: contents of a config.json.
        key: name of the size.
        default: what it is if it is not given, or null.
    """
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"MODEL: its config says {key}: {value!r}, which must be a whole number above 0")
    return value


def _module(kind: ModuleKind, prefix: str, **shapes: tuple[int, ...]) -> ModuleShape:
    """A module with weights ``prefix.key``."""
    return ModuleShape(kind, tuple(WeightShape(f"{prefix}.{key}", shape) for key, shape in shapes.items()))


def _linear(prefix: str, outputs: int, inputs: int, *, bias: bool = False) -> ModuleShape:
    return (
        _module("linear", prefix, weight=(outputs, inputs), bias=(outputs,))
        if bias
        else _module("linear", prefix, weight=(outputs, inputs))
    )


def _norm(prefix: str, size: int, *, bias: bool = False) -> ModuleShape:
    return (
        _module("vector", prefix, weight=(size,), bias=(size,)) if bias else _module("vector", prefix, weight=(size,))
    )


def _ends(embedding: str, head: str, vocabulary: int, hidden: int, *, tied: bool) -> tuple[UnitShape, list[UnitShape]]:
    """The unit of the token embedding, and that of the output head (none if they are one).

    Args:
        embedding: name of the module.
        head: name of the module.
        vocabulary: rows of both.
        hidden: columns of both.
        tied: they share their weight.
    """
    table = _module("embedding", embedding, weight=(vocabulary, hidden))
    if tied:
        return UnitShape((table, ModuleShape("linear", table.weights)), stays=True), []
    return UnitShape((table,)), [UnitShape((_linear(head, vocabulary, hidden),))]


def _llama(config: Config, name: str) -> ModelShape:
    """Llama and its kin (`LlamaForCausalLM`, `MistralForCausalLM`, `Qwen2ForCausalLM`, `Qwen3ForCausalLM`,
    `MixtralForCausalLM`, `Qwen3MoeForCausalLM`)."""
    hidden, layers, vocabulary = _number(config, "hidden_size"), _num_layers(config), _number(config, "vocab_size")
    heads, kv_heads = _heads(config)
    head_dim = _number(config, "head_dim", max(1, hidden // heads))
    experts = _number(config, "num_local_experts", _number(config, "num_experts", 1))
    sparse = [layer for layer in range(layers) if _has_experts(config, layer, experts)]
    inner = _number(config, "intermediate_size")
    expert_inner = _number(config, "moe_intermediate_size", inner)
    blocks = []
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        modules = list(_attention(config, f"{prefix}.self_attn", hidden, heads, kv_heads, head_dim))
        if layer in sparse:
            modules += _expert_modules(f"{prefix}.mlp", hidden, expert_inner, experts)
        else:
            bias = bool(config.get("mlp_bias", False))
            modules += [_linear(f"{prefix}.mlp.{part}_proj", inner, hidden, bias=bias) for part in ("gate", "up")]
            modules += [_linear(f"{prefix}.mlp.down_proj", hidden, inner, bias=bias)]
        modules += [_norm(f"{prefix}.{part}_layernorm", hidden) for part in ("input", "post_attention")]
        blocks.append(UnitShape(tuple(modules), is_block=True))
    tied = bool(config.get("tie_word_embeddings", False))
    embedding, head = _ends("model.embed_tokens", "lm_head", vocabulary, hidden, tied=tied)
    units = (embedding, *blocks, UnitShape((_norm("model.norm", hidden),)), *head)
    return ModelShape(
        name,
        units,
        hidden=hidden,
        inner=expert_inner if sparse else inner,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=vocabulary,
        window=_number(config, "max_position_embeddings", 2048),
        experts=experts if sparse else 1,
        active_experts=_number(config, "num_experts_per_tok", 2) if sparse else 1,
        block_kind="gated",
        is_dense_everywhere=not sparse,
    )


def _has_experts(config: Config, layer: int, experts: int) -> bool:
    """Whether a block has experts: all in Mixtral, in Qwen's those that ``decoder_sparse_step`` and
    ``mlp_only_layers`` leave.

    Args:
        config: contents of a config.json.
        layer: number of the block.
        experts: number of experts.
    """
    if experts == 1 or layer in (config.get("mlp_only_layers") or ()):
        return False
    return (layer + 1) % _number(config, "decoder_sparse_step", 1) == 0


def _attention(
    config: Config, prefix: str, hidden: int, heads: int, kv_heads: int, head_dim: int
) -> Iterator[ModuleShape]:
    """The projections of grouped-query attention, and Qwen3's norms of queries and keys.

    Args:
        config: contents of a config.json.
        prefix: name of the attention module.
        hidden: features of the residual stream.
        heads: of queries.
        kv_heads: of keys and values.
        head_dim: features of a head.
    """
    is_qwen2 = config.get("model_type") == "qwen2"
    bias = is_qwen2 or bool(config.get("attention_bias", False))
    yield _linear(f"{prefix}.q_proj", heads * head_dim, hidden, bias=bias)
    for part in ("k", "v"):
        yield _linear(f"{prefix}.{part}_proj", kv_heads * head_dim, hidden, bias=bias)
    yield _linear(f"{prefix}.o_proj", hidden, heads * head_dim, bias=bias and not is_qwen2)
    if str(config.get("model_type")).startswith("qwen3"):
        yield from (_norm(f"{prefix}.{part}_norm", head_dim) for part in ("q", "k"))


def _expert_modules(prefix: str, hidden: int, inner: int, experts: int) -> list[ModuleShape]:
    """A router, and all experts, whose matrices are stacked.

    Args:
        prefix: name of the feed-forward part.
        hidden: features of the residual stream.
        inner: features inside an expert.
        experts: number of experts.
    """
    router = _module("linear", f"{prefix}.gate", weight=(experts, hidden))
    shapes = {"gate_up_proj": (experts, 2 * inner, hidden), "down_proj": (experts, hidden, inner)}
    stacked = _module("experts", f"{prefix}.experts", **shapes)
    # Which of the two comes first differs between classes, and changes nothing here.
    return [router, stacked]


def _opt(config: Config, name: str) -> ModelShape:
    """`OPTForCausalLM`. OPT-350M projects its embeddings, and has no last norm."""
    hidden, layers = _number(config, "hidden_size"), _num_layers(config)
    inner, heads = _number(config, "ffn_dim"), _number(config, "num_attention_heads")
    vocabulary, width = _number(config, "vocab_size"), _number(config, "word_embed_proj_dim", hidden)
    window, bias = _number(config, "max_position_embeddings", 2048), bool(config.get("enable_bias", True))
    norm_bias = bool(config.get("layer_norm_elementwise_affine", True))
    before = bool(config.get("do_layer_norm_before", True))
    decoder = "model.decoder"
    embedding, head = _ends(
        f"{decoder}.embed_tokens", "lm_head", vocabulary, width, tied=bool(config.get("tie_word_embeddings", True))
    )
    units = [embedding, UnitShape((_module("other", f"{decoder}.embed_positions", weight=(window + 2, hidden)),))]
    if width != hidden:
        units += [UnitShape((_linear(f"{decoder}.project_out", width, hidden),))]
        units += [UnitShape((_linear(f"{decoder}.project_in", hidden, width),))]
    if before and not config.get("_remove_final_layer_norm", False):
        units += [UnitShape((_norm(f"{decoder}.final_layer_norm", hidden, bias=True),))] if norm_bias else []
    for layer in range(layers):
        prefix = f"{decoder}.layers.{layer}"
        modules = [_linear(f"{prefix}.self_attn.{p}_proj", hidden, hidden, bias=bias) for p in ("k", "v", "q", "out")]
        norms = [_norm(f"{prefix}.{p}_layer_norm", hidden, bias=True) for p in ("self_attn", "final")] * norm_bias
        modules += norms[:1]
        modules += [
            _linear(f"{prefix}.fc1", inner, hidden, bias=bias),
            _linear(f"{prefix}.fc2", hidden, inner, bias=bias),
        ]
        modules += norms[1:]
        units.append(UnitShape(tuple(modules), is_block=True))
    return ModelShape(
        name,
        (*units, *head),
        hidden=hidden,
        inner=inner,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocabulary=vocabulary,
        window=window,
        block_kind="plain",
    )


FAMILIES: dict[str, Callable[[Config, str], ModelShape]] = {
    "opt": _opt,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe"), _llama),
}
"""``model_type`` of a config.json -> how its shape is made."""
