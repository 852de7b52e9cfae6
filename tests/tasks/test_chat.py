"""Chat templates come with a model, from whoever made it: they may refuse, fail, and never end."""

from __future__ import annotations

import contextlib
import resource
import signal

import pytest

from mezo_dist.errors import UserError
from mezo_dist.tasks import chat
from mezo_dist.tasks.chat import apply_chat_template
from mezo_dist.testing import tiny_tokenizer

MESSAGES = [{"role": "user", "content": "a film"}]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no users here') }}", "refuses the conversation: no users here"),
        ("{% for %}", "refuses the conversation"),
        ("{{ messages.__class__.__mro__ }}", "refuses the conversation"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}a", "did not end within 0.3 s"),
        ("{{ 'a' * 4000000000 }}", "takes more than 64 MiB for a conversation"),
        ("{% set x = namespace(a='aaaa') %}{% for i in range(30) %}{% set x.a = x.a ~ x.a %}{% endfor %}", "64 MiB"),
        ("{{ 'a' * 1200000 }}", "makes a text of 1,200,000 characters of a conversation"),
    ],
)
def test_templates_that_do_not_work(template: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "MiB" in message:
        monkeypatch.setattr(chat, "LIMIT_BYTES", 64 << 20)
    if "did not end" in message:
        monkeypatch.setattr(chat, "LIMIT_S", 0.3)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=r"task\.chat: ") as fault:
        apply_chat_template(tokenizer, MESSAGES, "task.chat", tokenize=False)
    assert message in str(fault.value)


def test_somebody_elses_timer_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    before, handler = signal.setitimer(signal.ITIMER_REAL, 100.0), signal.getsignal(signal.SIGALRM)
    try:
        assert apply_chat_template(tokenizer, MESSAGES, "task.chat", tokenize=False) == "a film"
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100.0
        assert signal.getsignal(signal.SIGALRM) is handler
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)


def test_the_limit_of_memory_is_what_it_was() -> None:
    tokenizer = tiny_tokenizer()
    before = resource.getrlimit(resource.RLIMIT_AS)
    for template in ("{{ messages[0].content }}", "{{ 'a' * 4000000000 }}"):
        tokenizer.chat_template = template
        with contextlib.suppress(UserError):
            apply_chat_template(tokenizer, MESSAGES, "task.chat", tokenize=False)
        assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_long_conversations_are_no_fault_of_the_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    turns = [{"role": "user", "content": "film " * 300_000}]
    assert len(apply_chat_template(tokenizer, turns, "task.chat", tokenize=False)) == 1_500_000
