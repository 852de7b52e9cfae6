"""Conversations as tokens, through the tokenizer's chat template; the assistant's turns are what is learnt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mezo_dist.errors import UserError
from mezo_dist.tasks.chat import apply_chat_template
from mezo_dist.tasks.continuation import shared

ASSISTANT = "assistant"
MARK = "generation"
"""The chat-template block that stands around what the assistant writes."""


def check_template(tokenizer: Any) -> None:
    """Raises UserError if the tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "task.messages: the tokenizer of this model has no chat template; use task.prompt and task.completion, or "
            "a model that was tuned on conversations"
        )


def has_marks(tokenizer: Any) -> bool:
    """The chat template marks what the assistant writes (``{% generation %}``)."""
    template = tokenizer.chat_template
    return f"{{% {MARK}" in str(template) or f"{{%- {MARK}" in str(template)


def encode_conversation(tokenizer: Any, messages: Any) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and the indices of those that the assistant writes.

    Where the chat template marks the assistant's words, they are the targets. Elsewhere a turn's targets are the tokens
    that it adds to the conversation before it with the opening of an assistant's turn.

    Args:
        tokenizer: with a chat template.
        messages: what the row holds.

    Raises:
        UserError: it is no list of ``{role, content}``, has no turn of the assistant's, or the template refuses it or
            changes earlier turns when a later one is added.
    """
    if not isinstance(messages, list) or not all(
        isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in messages
    ):
        raise UserError(f"task.messages: the field must hold a list of {{role, content}}, not {messages!r:.100}")
    if not any(message["role"] == ASSISTANT for message in messages):
        raise UserError("task.messages: the assistant has no turn; leave the row out")
    if has_marks(tokenizer):
        encoded = _apply(tokenizer, messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = list(encoded["input_ids"]), encoded["assistant_masks"]
        targets = [place for place, is_target in enumerate(mask) if is_target]
        if not targets:
            raise UserError("task.messages: the chat template marks none of the assistant's words")
        return ids, targets
    ids = _tokens(tokenizer, messages)
    targets = []
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        before = _tokens(tokenizer, messages[:number], add_generation_prompt=True)
        through = _tokens(tokenizer, messages[: number + 1])
        start = shared(before, through)
        if shared(through, ids) < len(through) or start < len(_tokens(tokenizer, messages[:number])):
            raise UserError(
                f"task.messages: the chat template changes earlier turns when turn {number + 1} is added, so that it "
                "cannot be told what the assistant writes; use a template with {% generation %} marks"
            )
        targets += range(start, len(through))
    return ids, targets


def _tokens(tokenizer: Any, messages: list[Any], **options: Any) -> list[int]:
    if not messages and not options:
        return []
    return list(_apply(tokenizer, messages, return_dict=True, **options)["input_ids"])


def _apply(tokenizer: Any, messages: list[Any], **options: Any) -> Any:
    return apply_chat_template(tokenizer, messages, "task.messages", tokenize=True, **options)
