"""Templates of decoders (`mezo_dist.planning.templates`), by ``model_type``."""

from __future__ import annotations

from dataclasses import replace

from mezo_dist.planning.templates import Template

QKV = "self_attn.q_proj=q,h{0} self_attn.k_proj=k,h{0} self_attn.v_proj=k,h{0} "
ATTENTION = QKV + "self_attn.o_proj=h,q{0} "
GATED = "mlp.gate_proj=f,h{0} mlp.up_proj=f,h{0} mlp.down_proj=h,f{0} "
FUSED = "mlp.gate_up_proj=2f,h mlp.down_proj=h,f "
NORMS = "input_layernorm=h post_attention_layernorm=h "
BIASED = "input_layernorm=h! post_attention_layernorm=h! "
AROUND = "pre_feedforward_layernorm=h post_feedforward_layernorm=h "
AFTER = "post_attention_layernorm=h post_feedforward_layernorm=h "
HEAD_NORMS = "self_attn.q_norm=d self_attn.k_norm=d "
ALL_NORMS = "self_attn.q_norm=q self_attn.k_norm=k "
PLAIN = "attention.query_key_value=3h,h!{0} attention.dense=h,h!{0} "


def _like_llama(block: str, **options: object) -> Template:
    """A decoder whose ends are named as Llama's.

    Args:
        block: modules of a block.
        options: further fields of `Template`.
    """
    usual = Template(("model.embed_tokens=@v,h",), "model.layers", block, ("model.norm=h",))
    return replace(usual, **options)  # type: ignore[arg-type]


def _gpt(block: str, **options: object) -> Template:
    """A decoder whose ends are named as GPT-2's; see `_like_llama`."""
    usual = Template(("transformer.wte=@v,h",), "transformer.h", block, ("transformer.ln_f=h!",), inner=None)
    return replace(usual, **options)  # type: ignore[arg-type]


ATTENTION_BIAS = {"attention_bias": False}
BOTH = {"attention_bias": False, "mlp_bias": False}
A, M = "!attention_bias", "!mlp_bias"
GEMMA = {"units": ("model.embed_tokens=@@v,h",), "tied": True, "needs": ("head_dim",), "flags": ATTENTION_BIAS}

DECODERS: dict[str, Template] = {
    "gemma": _like_llama(ATTENTION.format(A) + GATED.format("") + NORMS, **GEMMA),
    "gemma2": _like_llama(ATTENTION.format(A) + GATED.format("") + NORMS + AROUND, **GEMMA),
    "gemma3_text": _like_llama(ATTENTION.format(A) + HEAD_NORMS + GATED.format("") + NORMS + AROUND, **GEMMA),
    "granite": _like_llama(ATTENTION.format(A) + GATED.format(M) + NORMS, flags=BOTH),
    "smollm3": _like_llama(ATTENTION.format(A) + GATED.format(M) + NORMS, flags=BOTH, tied=True),
    "ernie4_5": _like_llama(
        ATTENTION.format("!use_bias") + GATED.format("!use_bias") + NORMS, flags={"use_bias": False}, tied=True,
        needs=("head_dim",),
    ),
    "seed_oss": _like_llama(
        QKV.format(A) + "self_attn.o_proj=h,q!attention_out_bias " + GATED.format(M) + NORMS, needs=("head_dim",),
        flags={"attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
    ),
    "olmo": _like_llama(ATTENTION.format(A) + GATED.format(""), flags=ATTENTION_BIAS, last=()),
    "olmo2": _like_llama(ATTENTION.format(A) + ALL_NORMS + GATED.format("") + AFTER, flags=ATTENTION_BIAS),
    "olmo3": _like_llama(ATTENTION.format(A) + ALL_NORMS + GATED.format("") + AFTER, flags=ATTENTION_BIAS),
    "exaone4": _like_llama(ATTENTION.format("") + HEAD_NORMS + GATED.format("") + AFTER),
    "cohere": _like_llama(
        ATTENTION.format(A) + GATED.format("") + "input_layernorm=h ", flags=ATTENTION_BIAS, tied=True,
        plain={"use_qk_norm": False},
    ),
    "cohere2": _like_llama(
        ATTENTION.format(A) + GATED.format("") + "input_layernorm=h ", flags=ATTENTION_BIAS, tied=True
    ),
    "glm": _like_llama(
        QKV.format(A) + "self_attn.o_proj=h,q " + FUSED + NORMS, flags={"attention_bias": True}, needs=("head_dim",)
    ),
    "glm4": _like_llama(
        QKV.format(A) + "self_attn.o_proj=h,q " + FUSED + NORMS + "post_self_attn_layernorm=h post_mlp_layernorm=h ",
        flags={"attention_bias": True}, needs=("head_dim",),
    ),
    "phi3": _like_llama("self_attn.o_proj=h,q self_attn.qkv_proj=q+2k,h " + FUSED + NORMS),
    "phi": _like_llama(
        QKV.format("!") + "self_attn.dense=h,q! mlp.fc1=f,h! mlp.fc2=h,f! input_layernorm=h! ",
        last=("model.final_layernorm=h!",), head="lm_head=v,h!", plain={"qk_layernorm": False},
    ),
    "stablelm": _like_llama(
        QKV.format("!use_qkv_bias") + "self_attn.o_proj=h,q " + GATED.format("") + BIASED, last=("model.norm=h!",),
        flags={"use_qkv_bias": False}, plain={"qk_layernorm": False, "use_parallel_residual": False, "head_dim": None},
    ),
    "starcoder2": _like_llama(
        ATTENTION.format("!use_bias") + "mlp.c_fc=f,h!use_bias mlp.c_proj=h,f!use_bias " + BIASED,
        last=("model.norm=h!",), flags={"use_bias": True}, tied=True,
    ),
    "nemotron": _like_llama(
        ATTENTION.format(A) + f"mlp.up_proj=f,h{M} mlp.down_proj=h,f{M} " + BIASED, last=("model.norm=h!",), flags=BOTH
    ),
    "gpt_neox": Template(
        ("gpt_neox.embed_in=@v,h",), "gpt_neox.layers",
        BIASED + "attention.query_key_value=3h,h!attention_bias attention.dense=h,h!attention_bias "
        "mlp.dense_h_to_4h=f,h! mlp.dense_4h_to_h=h,f!",
        ("gpt_neox.final_layer_norm=h!",), flags={"attention_bias": True},
    ),
    "gpt2": _gpt(
        "ln_1=h! attn.c_attn=h>3h! attn.c_proj=h>h! ln_2=h! mlp.c_fc=h>4h! mlp.c_proj=4h>h!",
        units=("transformer.wte=@v,h", "transformer.wpe=@p,h"), tied=True,
        plain={"n_inner": None, "add_cross_attention": False},
    ),
    "gptj": _gpt(
        "ln_1=h! attn.k_proj=h,h attn.v_proj=h,h attn.q_proj=h,h attn.out_proj=h,h mlp.fc_in=4h,h! mlp.fc_out=h,4h!",
        head="lm_head=v,h!", plain={"n_inner": None},
    ),
    "bloom": _gpt(
        "input_layernorm=h! self_attention.query_key_value=3h,h! self_attention.dense=h,h! "
        "post_attention_layernorm=h! mlp.dense_h_to_4h=4h,h! mlp.dense_4h_to_h=h,4h!",
        units=("transformer.word_embeddings=@v,h", "transformer.word_embeddings_layernorm=h!"), tied=True,
    ),
}  # fmt: skip
"""Falcon, GPT-OSS and DeepSeek are instantiated: their blocks differ within a model, or with many settings."""
