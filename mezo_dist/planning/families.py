"""Shapes by formula, from the contents of a config.json.

Importing transformers takes four to six seconds, which is more than a whole answer may take, so the architectures
that most people ask about are written down, weight by weight, as their model classes in transformers name them: here
OPT, and the Llama, Mistral, Qwen and Mixtral families, whose blocks' activations are known, too; others as templates
(`mezo_dist.planning.decoders`, `mezo_dist.planning.encoders`). A test holds each against the model that transformers
builds. All others are instantiated on device meta (`mezo_dist.planning.instantiated`), which is right for every
architecture, and slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mezo_dist.planning.decoders import DECODERS
from mezo_dist.planning.encoders import ENCODERS
from mezo_dist.planning.shapes import ModelShape, ModuleKind, ModuleShape, UnitShape, WeightShape
from mezo_dist.planning.templates import Config, num_heads, num_layers, number, shape_by_template


def shape_of_config(config: Config, name: str) -> ModelShape | None:
    """The shape that a config.json describes; None if its ``model_type`` is not written down, or what its template
    leaves open.

    Args:
        config: its contents.
        name: of the model, for people.

    Raises:
        UserError: a size is missing, or is no whole number above zero.
    """
    kind = str(config.get("model_type"))
    if kind in FAMILIES:
        return None if _is_open(config, kind) else FAMILIES[kind](config, name)
    template = DECODERS.get(kind) or ENCODERS.get(kind)
    return None if template is None else shape_by_template(template, config, name)


_GROUPED = ("num_key_value_heads", "max_position_embeddings")
_EXPERTS = (*_GROUPED, "num_experts_per_tok")
_ASKED = {
    "mistral": _GROUPED,
    "mixtral": (*_EXPERTS, "num_local_experts"),
    "qwen2": _GROUPED,
    "qwen3": (*_GROUPED, "head_dim"),
    "qwen3_moe": (*_EXPERTS, "head_dim", "num_experts", "moe_intermediate_size"),
}
"""``model_type`` -> settings for which its class has a default of its own."""
_IGNORED = {
    "mistral": ("attention_bias", "mlp_bias"),
    "mixtral": ("attention_bias", "mlp_bias"),
    **dict.fromkeys(("qwen2", "qwen3", "qwen3_moe"), ("mlp_bias",)),
}
"""``model_type`` -> settings of its kin that its class does not have."""


def _is_open(config: Config, kind: str) -> bool:
    """Whether the formula would have to guess what transformers knows.

    Args:
        config: contents of a config.json.
        kind: its ``model_type``.
    """
    return any(config.get(key) is None for key in _ASKED.get(kind, ())) or any(
        config.get(key) for key in _IGNORED.get(kind, ())
    )


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
    hidden, layers, vocabulary = number(config, "hidden_size"), num_layers(config), number(config, "vocab_size")
    heads, kv_heads = num_heads(config)
    head_dim = number(config, "head_dim", max(1, hidden // heads))
    experts = number(config, "num_local_experts", number(config, "num_experts", 1))
    sparse = [layer for layer in range(layers) if _has_experts(config, layer, experts)]
    inner = number(config, "intermediate_size")
    expert_inner = number(config, "moe_intermediate_size", inner)
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
        window=number(config, "max_position_embeddings", 2048),
        experts=experts if sparse else 1,
        active_experts=number(config, "num_experts_per_tok", 2) if sparse else 1,
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
    return (layer + 1) % number(config, "decoder_sparse_step", 1) == 0


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
    hidden, layers = number(config, "hidden_size"), num_layers(config)
    inner, heads = number(config, "ffn_dim"), number(config, "num_attention_heads")
    vocabulary, width = number(config, "vocab_size"), number(config, "word_embed_proj_dim", hidden)
    window, bias = number(config, "max_position_embeddings", 2048), bool(config.get("enable_bias", True))
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
