"""Chat templates: programs in jinja2 that come with a tokenizer, and so from whoever made the model.

transformers runs them in a sandbox, which keeps them from files and from Python, but not from running on and on.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mezo_dist.errors import UserError

LIMIT_S = 10.0
"""Seconds for one conversation, which takes milliseconds."""


def apply_chat_template(tokenizer: Any, messages: Sequence[Mapping[str, Any]], setting: str, **options: Any) -> Any:
    """What the tokenizer's chat template makes of a conversation; see ``apply_chat_template`` of transformers.

    Args:
        tokenizer: with a template.
        messages: role and content of each turn.
        setting: that asks for it, for messages.
        options: passed on.

    Raises:
        UserError: the template refuses the conversation, or does not end.
    """
    try:
        with _time_limit(f"{setting}: the model's chat template did not end within {LIMIT_S:g} s; mend or replace it"):
            return tokenizer.apply_chat_template(list(messages), **options)
    except UserError:
        raise
    except Exception as error:  # the template raises whatever it likes
        raise UserError(f"{setting}: the chat template refuses the conversation: {str(error)[:200]}") from error


@contextlib.contextmanager
def _time_limit(message: str) -> Iterator[None]:
    """Within, a UserError after `LIMIT_S`; only the main thread can be interrupted so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise UserError(message)

    before = signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left, interval)  # whoever had a timer of their own
