"""The longest sequence that a model takes, where its config and its tokenizer say it in other ways or not at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t

from mezo_dist.models.window import NO_LIMIT, num_tokens_of, window_of
from mezo_dist.testing import tiny_model, tiny_tokenizer

SIZE: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def no_limit() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = int(1e30)
    return tokenizer


MODELS: dict[str, tuple[Any, int]] = {
    "mpnet": (lambda: t.MPNetForMaskedLM(t.MPNetConfig(**SIZE, intermediate_size=48, max_position_embeddings=34)), 32),
    "roberta": (
        lambda: t.RobertaForMaskedLM(t.RobertaConfig(**SIZE, intermediate_size=48, max_position_embeddings=34)),
        32,
    ),
    "bert": (lambda: t.BertForMaskedLM(t.BertConfig(**SIZE, intermediate_size=48, max_position_embeddings=34)), 34),
    "mpt": (
        lambda: t.MptForCausalLM(t.MptConfig(vocab_size=64, d_model=32, n_layers=1, n_heads=2, max_seq_len=48)),
        48,
    ),
    "ibert": (
        lambda: t.IBertForMaskedLM(t.IBertConfig(**SIZE, intermediate_size=48, max_position_embeddings=34)),
        32,
    ),
    "gpt2": (lambda: tiny_model("gpt2"), 64),
    "t5": (lambda: tiny_model("t5"), NO_LIMIT),
    "xlnet": (
        lambda: t.XLNetLMHeadModel(t.XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=2, d_inner=48)),
        NO_LIMIT,
    ),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_window_of_a_model_whose_tokenizer_has_none(name: str) -> None:
    make, window = MODELS[name]
    model = make().eval()
    assert window_of(no_limit(), model, model.config) == window
    assert window_of(tiny_tokenizer(), model, model.config) == min(window, 64)
    assert num_tokens_of(model) == (None if name == "ibert" else 64)  # its table is one of its own kind
    if window < NO_LIMIT:
        model(input_ids=torch.full((1, window), 5))  # it takes that many indeed
    if name in ("mpnet", "roberta", "ibert", "bert"):
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, window + 1), 5))


def test_a_text_model_inside_another() -> None:
    config = t.Gemma3Config(text_config={"max_position_embeddings": 40, **SIZE})
    assert window_of(no_limit(), torch.nn.Linear(1, 1), config) == 40


def test_a_model_of_two_texts() -> None:
    """transformers refuses to say which of them is meant; it is the one that the output head belongs to."""

    class Two(t.PretrainedConfig):
        def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
            if not decoder:
                raise ValueError("Multiple valid text configs were found")
            return t.PretrainedConfig(max_target_positions=24)

    assert window_of(no_limit(), torch.nn.Linear(1, 1), Two()) == 24


@pytest.mark.parametrize("name", ["max_sequence_length", "n_positions", "n_ctx"])
def test_a_config_of_somebody_with_other_names(name: str) -> None:
    assert window_of(no_limit(), torch.nn.Linear(1, 1), t.PretrainedConfig(**{name: 24})) == 24


def test_a_model_that_does_not_say_where_its_tokens_are() -> None:
    assert num_tokens_of(torch.nn.Linear(1, 1)) is None
