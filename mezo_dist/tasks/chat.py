"""Chat templates: programs in jinja2 that come with a tokenizer, and so from whoever made the model.

transformers runs them in a sandbox, which keeps them from files and from Python, but not from running on and on, nor
from making texts of gigabytes.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mezo_dist.errors import UserError

LIMIT_S = 10.0
"""Seconds for one conversation, which takes milliseconds."""
LIMIT_BYTES = 1 << 30
"""Memory for one conversation, beyond what the process has."""
LONGEST, LONGEST_PER_CHARACTER = 1_000_000, 10
"""Characters that a template may make of an empty conversation, and of each character of one. (To tokenise a text takes
a hundred times its memory.)"""


def apply_chat_template(tokenizer: Any, messages: Sequence[Mapping[str, Any]], setting: str, **options: Any) -> Any:
    """What the tokenizer's chat template makes of a conversation; see ``apply_chat_template`` of transformers.

    Args:
        tokenizer: with a template.
        messages: role and content of each turn.
        setting: that asks for it, for messages.
        options: passed on.

    Raises:
        UserError: the template refuses the conversation, does not end, or makes too much of it.
    """
    turns, is_opened = list(messages), options.get("add_generation_prompt", False)
    longest = LONGEST + LONGEST_PER_CHARACTER * len(json.dumps(turns, default=str))
    try:
        with _time_limit(f"{setting}: the model's chat template did not end within {LIMIT_S:g} s; mend or replace it"):
            with _memory_limit():  # a tokenizer would abort the process where memory ends: only the text is made here
                text = str(tokenizer.apply_chat_template(turns, add_generation_prompt=is_opened, tokenize=False))
            if len(text) > longest:
                raise UserError(
                    f"{setting}: the model's chat template makes a text of {len(text):,} characters of a conversation; "
                    "mend or replace it"
                )
            return tokenizer.apply_chat_template(turns, **options) if options.get("tokenize", True) else text
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(
            f"{setting}: the model's chat template takes more than {LIMIT_BYTES >> 20:,} MiB for a conversation; mend "
            "or replace it"
        ) from error
    except Exception as error:  # the template raises whatever it likes
        raise UserError(f"{setting}: the chat template refuses the conversation: {str(error)[:200]}") from error


@contextlib.contextmanager
def _memory_limit() -> Iterator[None]:
    """Within, what takes `LIMIT_BYTES` more of address space than the process has fails with MemoryError (Linux)."""
    if not sys.platform.startswith("linux"):
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    least = [pages * resource.getpagesize() + LIMIT_BYTES, *(limit for limit in (soft, hard) if limit >= 0)]
    resource.setrlimit(resource.RLIMIT_AS, (min(least), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


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
