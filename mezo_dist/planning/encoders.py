"""Templates of encoders (`mezo_dist.planning.templates`) with their head for masked tokens, by ``model_type``."""

from __future__ import annotations

from dataclasses import replace

from mezo_dist.planning.templates import Template

ENDS = "output.dense=h,f! output.LayerNorm=h!"
AROUND = f"attention.output.dense=h,h! attention.output.LayerNorm=h! intermediate.dense=f,h! {ENDS}"
BERT = "attention.self.query=h,h! attention.self.key=h,h! attention.self.value=h,h! " + AROUND
DEBERTA = "attention.self.query_proj=h,h! attention.self.key_proj=h,h! attention.self.value_proj=h,h! " + AROUND
USUAL = {"tie_word_embeddings": True, "position_embedding_type": "absolute", "add_cross_attention": False}
"""Settings that would add weights, or take the tie of embedding and head apart."""
TRANSFORM = ("cls.predictions.transform.dense=h,h!", "cls.predictions.transform.LayerNorm=h!")
LM_HEAD = ("lm_head.dense=h,h!", "lm_head.layer_norm=h!")

ROBERTA = Template(
    ("roberta.embeddings.word_embeddings=@v,h roberta.embeddings.token_type_embeddings=@t,h "
     "roberta.embeddings.LayerNorm=h! roberta.embeddings.position_embeddings=@p,h",),
    "roberta.encoder.layer", BERT, LM_HEAD, "lm_head=v,h!", tied=True, bias_apart=True, plain=USUAL,
)  # fmt: skip
XLM_ROBERTA = replace(
    ROBERTA, units=(ROBERTA.units[0].replace("roberta.embeddings.word_embeddings", "lm_head.decoder"), *LM_HEAD),
    last=(), head_first=True,
)  # fmt: skip

ENCODERS: dict[str, Template] = {
    "bert": Template(
        ("bert.embeddings.word_embeddings=@v,h bert.embeddings.position_embeddings=@p,h "
         "bert.embeddings.token_type_embeddings=@t,h bert.embeddings.LayerNorm=h!",),
        "bert.encoder.layer", BERT, TRANSFORM, "cls.predictions=v,h!", tied=True, bias_apart=True, plain=USUAL,
    ),
    "roberta": ROBERTA,
    "xlm-roberta": XLM_ROBERTA,
    "camembert": XLM_ROBERTA,
    "distilbert": Template(
        ("distilbert.embeddings.word_embeddings=@v,h", "distilbert.embeddings.position_embeddings=@p,h",
         "distilbert.embeddings.LayerNorm=h!"),
        "distilbert.transformer.layer",
        "attention.q_lin=h,h! attention.k_lin=h,h! attention.v_lin=h,h! attention.out_lin=h,h! sa_layer_norm=h! "
        "ffn.lin1=f,h! ffn.lin2=h,f! output_layer_norm=h!",
        ("vocab_transform=h,h!", "vocab_layer_norm=h!"), "vocab_projector=v,h!", tied=True, inner="hidden_dim",
        plain={**USUAL, "sinusoidal_pos_embds": False},
    ),
    "electra": Template(
        ("electra.embeddings.word_embeddings=@v,w", "electra.embeddings.position_embeddings=@p,w",
         "electra.embeddings.token_type_embeddings=@t,w", "electra.embeddings.LayerNorm=w!",
         "?electra.embeddings_project=h,w!"),
        "electra.encoder.layer", BERT, ("generator_predictions.LayerNorm=w!", "generator_predictions.dense=w,h!"),
        "generator_lm_head=v,w!", tied=True, plain=USUAL,
    ),
    "deberta-v2": Template(
        ("deberta.embeddings.word_embeddings=@v,h", "deberta.embeddings.LayerNorm=h!"),
        "deberta.encoder.layer", DEBERTA,
        ("deberta.encoder.rel_embeddings=@2b,h", "deberta.encoder.LayerNorm=h!", *TRANSFORM), "cls.predictions=v,h!",
        tied=True, bias_apart=True,
        needs=("relative_attention", "norm_rel_ebd", "share_att_key", "position_biased_input"),
        plain={**USUAL, "relative_attention": True, "norm_rel_ebd": "layer_norm", "share_att_key": True,
               "position_biased_input": False, "type_vocab_size": 0, "conv_kernel_size": 0, "embedding_size": None,
               "legacy": True, "attention_head_size": None},
    ),
}  # fmt: skip
"""DeBERTa as its third version has it: relative positions alone."""
