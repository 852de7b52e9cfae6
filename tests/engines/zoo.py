"""Tiny random models of architectures that do something unusual with their weights, and how each is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SIZE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MIDDLE = {"intermediate_size": 48}
WINDOW = {"max_position_embeddings": 64}
HEADS = {"num_key_value_heads": 2}


def _makers() -> dict[str, Callable[[], Any]]:
    import transformers as t

    names = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    deberta = {**SIZE, **MIDDLE, **WINDOW, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    buckets = {"norm_rel_ebd": "layer_norm", "position_buckets": 8, "conv_kernel_size": 3}
    state = {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 2, "expand": 2, "chunk_size": 8}
    griffin = {**SIZE, "num_hidden_layers": 3, **MIDDLE, **HEADS, "lru_width": 32, "attention_window_size": 16}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    deltas = {f"linear_{kind}": 2 for kind in ("num_key_heads", "num_value_heads")}
    deltas |= {f"linear_{kind}_head_dim": 8 for kind in ("key", "value")}
    hybrid = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16}
    moe = {"moe_intermediate_size": 16, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0}
    funnel = {"vocab_size": 64, "d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 48, "block_sizes": [1, 1]}
    t5 = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    bart = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 48}
    narrow = {"embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 2}
    plain = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
    return {
        "lfm2": lambda: t.Lfm2ForCausalLM(
            t.Lfm2Config(**SIZE, **MIDDLE, **WINDOW, **HEADS, layer_types=["conv", "full_attention"], **names)
        ),
        "mobilebert": lambda: t.MobileBertForMaskedLM(t.MobileBertConfig(**SIZE, **MIDDLE, **WINDOW, **narrow)),
        "deberta": lambda: t.DebertaForMaskedLM(t.DebertaConfig(**deberta)),
        "deberta-v2": lambda: t.DebertaV2ForMaskedLM(t.DebertaV2Config(**deberta, **buckets)),
        "xlnet": lambda: t.XLNetLMHeadModel(
            t.XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=2, d_inner=48, **names)
        ),
        "longformer": lambda: t.LongformerForMaskedLM(
            t.LongformerConfig(**SIZE, **MIDDLE, **WINDOW, attention_window=4, pad_token_id=0)
        ),
        "bart": lambda: t.BartForCausalLM(t.BartConfig(vocab_size=64, **bart, **WINDOW)),
        "mpnet": lambda: t.MPNetForMaskedLM(t.MPNetConfig(**SIZE, **MIDDLE, **WINDOW, pad_token_id=0)),
        "t5-classifier": lambda: t.T5ForSequenceClassification(t.T5Config(**t5, decoder_start_token_id=0, **names)),
        "mamba": lambda: t.MambaForCausalLM(t.MambaConfig(**plain, state_size=8, **names)),
        "mamba2": lambda: t.Mamba2ForCausalLM(t.Mamba2Config(**plain, **state, **names)),
        "recurrent-gemma": lambda: t.RecurrentGemmaForCausalLM(t.RecurrentGemmaConfig(**griffin, **names)),
        "funnel": lambda: t.FunnelForMaskedLM(t.FunnelConfig(**funnel)),
        "xglm": lambda: t.XGLMForCausalLM(
            t.XGLMConfig(vocab_size=64, d_model=32, num_layers=2, attention_heads=2, ffn_dim=48, **WINDOW)
        ),
        "openai-gpt": lambda: t.OpenAIGPTLMHeadModel(
            t.OpenAIGPTConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64)
        ),
        "rwkv": lambda: t.RwkvForCausalLM(t.RwkvConfig(**plain, context_length=32, **names)),
        "qwen3-next": lambda: t.Qwen3NextForCausalLM(
            t.Qwen3NextConfig(
                **SIZE, **MIDDLE, **WINDOW, **HEADS, **experts, **deltas, **hybrid, shared_expert_intermediate_size=16
            )
        ),
        "ernie-moe": lambda: t.Ernie4_5_MoeForCausalLM(
            t.Ernie4_5_MoeConfig(**SIZE, **MIDDLE, **WINDOW, **HEADS, **moe, moe_layer_end_index=1, **names)
        ),
    }


def _hybrid_makers() -> dict[str, Callable[[], Any]]:
    """Causal models whose layers keep something else between tokens than keys and values of all heads."""
    import transformers as t

    shape = {**SIZE, **MIDDLE, **WINDOW, **HEADS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    mamba = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_routed_experts": 4}
    groups = {"n_group": 1, "topk_group": 1}
    latent = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
    jamba = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    zamba = {"layers_block_type": ["mamba", "hybrid", "mamba"], "num_hidden_layers": 3, "n_mamba_heads": 4}
    zamba |= {"mamba_d_state": 8, "mamba_headdim": 16, "mamba_ngroups": 1, "num_mem_blocks": 1, "adapter_rank": 4}
    nemotron = {"layers_block_type": ["mamba", "attention", "mamba", "moe"], "num_hidden_layers": 4, "n_groups": 2}
    nemotron |= {"ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "chunk_size": 8, "head_dim": 16}
    granite = {"layer_types": ["mamba", "attention"], "num_local_experts": 2, "num_experts_per_tok": 1}
    return {
        "jamba": lambda: t.JambaForCausalLM(
            t.JambaConfig(**shape, **jamba, num_experts=2, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False)
        ),
        "bamba": lambda: t.BambaForCausalLM(t.BambaConfig(**shape, **mamba, attn_layer_indices=[1])),
        "zamba2": lambda: t.Zamba2ForCausalLM(t.Zamba2Config(**(shape | zamba), chunk_size=8)),
        "deepseek-v2": lambda: t.DeepseekV2ForCausalLM(
            t.DeepseekV2Config(**shape, **experts, **groups, **latent, first_k_dense_replace=1)
        ),
        "deepseek-v3": lambda: t.DeepseekV3ForCausalLM(
            t.DeepseekV3Config(**shape, **experts, **groups, **latent, first_k_dense_replace=1)
        ),
        "falcon-mamba": lambda: t.FalconMambaForCausalLM(
            t.FalconMambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8, pad_token_id=0)
        ),
        "granite-hybrid": lambda: t.GraniteMoeHybridForCausalLM(
            t.GraniteMoeHybridConfig(**shape, **mamba, **granite, shared_intermediate_size=16)
        ),
        "nemotron-h": lambda: t.NemotronHForCausalLM(
            t.NemotronHConfig(**(shape | nemotron), **experts, **groups, moe_shared_expert_intermediate_size=16)
        ),
        "falcon-h1": lambda: t.FalconH1ForCausalLM(t.FalconH1Config(**shape, **mamba, mamba_d_ssm=64, head_dim=16)),
    }


NAMES, HYBRIDS = tuple(_makers()), tuple(_hybrid_makers())


def build(name: str, seed: int = 0) -> Any:
    """The model ``name``, of `NAMES` or `HYBRIDS`. All its weights (vectors too) are random, and large enough to
    matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = (_makers() | _hybrid_makers())[name]().eval()
        model.config.use_cache = False
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def ids(shape: tuple[int, int] = (3, 8), seed: int = 1) -> Tensor:
    """Tokens, int64."""
    return torch.randint(4, 60, shape, generator=torch.Generator().manual_seed(seed))


def forward(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Logits."""
    if "T5For" in type(model).__name__:
        input_ids = torch.cat([input_ids, torch.full((len(input_ids), 1), 2)], dim=1)  # a sequence ends in EOS
    logits: Tensor = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits
    return logits
