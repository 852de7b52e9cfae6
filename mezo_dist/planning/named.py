"""Shapes that go by a name: what the published config.json files say."""

from __future__ import annotations


def _named(kind: str, **sizes: object) -> dict[str, object]:
    return {"model_type": kind, **sizes}


def _named_opt(layers: int, hidden: int, heads: int, **more: object) -> dict[str, object]:
    return _named(
        "opt",
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        ffn_dim=4 * hidden,
        vocab_size=50272,
        max_position_embeddings=2048,
        **{"word_embed_proj_dim": hidden, **more},
    )


def _named_llama(
    layers: int, hidden: int, heads: int, kv_heads: int, inner: int, vocabulary: int, **more: object
) -> dict[str, object]:
    return _named(
        **{
            "kind": "llama",
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": inner,
            "vocab_size": vocabulary,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
            **more,  # type: ignore[arg-type]
        }
    )


def _named_qwen3(layers: int, hidden: int, heads: int, inner: int, *, tied: bool) -> dict[str, object]:
    sizes = {"kind": "qwen3", "head_dim": 128, "max_position_embeddings": 40960, "tie_word_embeddings": tied}
    return _named_llama(layers, hidden, heads, 8, inner, 151936, **sizes)


_OPT_350M = {"word_embed_proj_dim": 512, "do_layer_norm_before": False}
_MIXTRAL = {"kind": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
_QWEN_MOE = {
    "kind": "qwen3_moe",
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 40960,
}
NAMED: dict[str, dict[str, object]] = {
    "opt-125m": _named_opt(12, 768, 12),
    "opt-350m": _named_opt(24, 1024, 16, **_OPT_350M),
    "opt-1.3b": _named_opt(24, 2048, 32),
    "opt-2.7b": _named_opt(32, 2560, 32),
    "opt-6.7b": _named_opt(32, 4096, 32),
    "opt-13b": _named_opt(40, 5120, 40),
    "opt-30b": _named_opt(48, 7168, 56),
    "opt-66b": _named_opt(64, 9216, 72),
    "opt-175b": _named_opt(96, 12288, 96),
    "llama-3-8b": _named_llama(32, 4096, 32, 8, 14336, 128256, max_position_embeddings=8192),
    "llama-3-70b": _named_llama(80, 8192, 64, 8, 28672, 128256, max_position_embeddings=8192),
    "llama-3-405b": _named_llama(126, 16384, 128, 8, 53248, 128256),
    "qwen3-0.6b": _named_qwen3(28, 1024, 16, 3072, tied=True),
    "qwen3-1.7b": _named_qwen3(28, 2048, 16, 6144, tied=True),
    "qwen3-4b": _named_qwen3(36, 2560, 32, 9728, tied=True),
    "qwen3-8b": _named_qwen3(36, 4096, 32, 12288, tied=False),
    "qwen3-14b": _named_qwen3(40, 5120, 40, 17408, tied=False),
    "qwen3-32b": _named_qwen3(64, 5120, 64, 25600, tied=False),
    "qwen3-30b-a3b": _named_llama(48, 2048, 32, 4, 6144, 151936, moe_intermediate_size=768, **_QWEN_MOE),
    "qwen3-235b-a22b": _named_llama(94, 4096, 64, 4, 12288, 151936, moe_intermediate_size=1536, **_QWEN_MOE),
    "mixtral-8x7b": _named_llama(32, 4096, 32, 8, 14336, 32000, **{**_MIXTRAL, "max_position_embeddings": 32768}),
    "mixtral-8x22b": _named_llama(56, 6144, 48, 8, 16384, 32768, **{**_MIXTRAL, "max_position_embeddings": 65536}),
}
"""Shapes that go by a name: what the published config.json files say."""
