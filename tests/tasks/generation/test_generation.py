"""Generation: which tokens are learnt, and what belongs to a sample."""

from __future__ import annotations

from typing import Any

import pytest

from mezo_dist.config.kinds.generation import GenerationTask
from mezo_dist.tasks.generation.kind import Generation, Sample
from mezo_dist.tasks.kind import TextModel
from tests.tasks.encoders import byte_level

ROW = {"text": "the film", "answers": {"text": ["great", "good"]}}
SETTINGS: dict[str, Any] = {
    "name": "t",
    "data": "nowhere",
    "prompt": "{{ text }}\nIt was",
    "completion": " {{ answers.text[0] }}",
    "references": "answers.text",
    "stop": ("\n",),
    "max_new_tokens": 4,
}


def sample_of(**settings: Any) -> tuple[Any, Sample]:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    task = GenerationTask(**SETTINGS | settings)
    (sample,) = Generation.of(task, TextModel(tokenizer, "causal", 64, None), ROW).encode([ROW], "train")
    return tokenizer, sample


@pytest.mark.parametrize(
    ("settings", "learnt"),
    [
        ({}, " great</s>"),
        ({"end": "\n"}, " great\n"),
        ({"chat": True}, "great</s>"),
        ({"chat": True, "end": "\n"}, "great\n"),
    ],
)
def test_what_is_learnt_ends_as_the_task_says(settings: dict[str, Any], learnt: str) -> None:
    tokenizer, sample = sample_of(**settings)
    assert tokenizer.decode(sample.ids[sample.start :]) == learnt
    assert tokenizer.decode(sample.prompt) == "the film\nIt was"
    assert sample.references == ("great", "good")
