"""Conversations as tokens, through the tokenizer's chat template; the assistant's turns are what is learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mezo_dist.errors import UserError
from mezo_dist.tasks.chat import apply_chat_template
from mezo_dist.tasks.continuation import shared

ASSISTANT = "assistant"
MARK = "generation"
"""The chat-template block that stands around what the assistant writes."""


def check_template(tokenizer: Any, setting: str) -> None:
    """Raises UserError, naming the setting that asks for it, if the tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{setting}: the tokenizer of this model has no chat template; use task.prompt and task.completion, or "
            "a model that was tuned on conversations"
        )


def has_marks(tokenizer: Any) -> bool:
    """The chat template marks what the assistant writes (``{% generation %}``)."""
    template = tokenizer.chat_template
    return f"{{% {MARK}" in str(template) or f"{{%- {MARK}" in str(template)


def encode_conversation(tokenizer: Any, messages: Any, setting: str) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and the indices of those that the assistant writes.

    Where the chat template marks the assistant's words, they are the targets. Elsewhere a turn's targets are the tokens
    that it adds to the conversation before it with the opening of an assistant's turn, up to the end-of-turn token.

    Args:
        tokenizer: with a chat template.
        messages: what the row holds.
        setting: that asks for it, for messages.

    Raises:
        UserError: it is no list of ``{role, content}``, has no turn of the assistant's, or the template refuses it or
            changes earlier turns when a later one is added.
    """
    if not isinstance(messages, list) or not all(
        isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in messages
    ):
        raise UserError(f"{setting}: the field must hold a list of {{role, content}}, not {messages!r:.100}")
    if not any(message["role"] == ASSISTANT for message in messages):
        raise UserError(f"{setting}: the assistant has no turn; leave the row out")
    if has_marks(tokenizer):
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        encoded = apply_chat_template(tokenizer, messages, setting, **options)
        ids, mask = list(encoded["input_ids"]), encoded["assistant_masks"]
        targets = [place for place, is_target in enumerate(mask) if is_target]
        if not targets:
            raise UserError(f"{setting}: the chat template marks none of the assistant's words")
        return ids, targets

    def tokens(turns: list[Any], **options: Any) -> list[int]:
        if not turns and not options:
            return []
        options |= {"tokenize": True, "return_dict": True}
        return list(apply_chat_template(tokenizer, turns, setting, **options)["input_ids"])

    ids = tokens(messages)
    targets = []
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        before = tokens(messages[:number], add_generation_prompt=True)
        through = tokens(messages[: number + 1])
        start = shared(before, through)
        if shared(through, ids) < len(through) or start < len(tokens(messages[:number])):
            raise UserError(
                f"{setting}: the chat template changes earlier turns when turn {number + 1} is added, so that it "
                "cannot be told what the assistant writes; use a template with {% generation %} marks"
            )
        targets += range(start, start + _turn_length(tokenizer, through[start:]))
    return ids, targets


def _turn_length(tokenizer: Any, ids: Sequence[int]) -> int:
    """Tokens of an assistant's turn: up to its end-of-turn token, and not the space that a template puts after that.

    The end-of-turn token is the special token after the last word, or the last of several that follow one another.
    Without any, all tokens count.

    Args:
        tokenizer: knows its special tokens.
        ids: what the template makes of the turn.
    """
    special = set(tokenizer.all_special_ids)
    end = len(ids)
    while end and (ids[end - 1] in special or not str(tokenizer.decode([ids[end - 1]])).strip()):
        end -= 1  # to the last word
    while end < len(ids) and ids[end] not in special:
        end += 1
    while end < len(ids) and ids[end] in special:
        end += 1
    return end
