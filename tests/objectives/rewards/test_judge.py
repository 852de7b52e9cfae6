"""Rewards come from code that hangs, dies and talks nonsense: a text without a number costs that text, and no more."""

from __future__ import annotations

import contextlib
import http.server
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from mezo_dist.config.reward import RewardConfig, RewardWeights
from mezo_dist.errors import UserError
from mezo_dist.objectives.rewards.judge import Judge

FUNCTIONS = """
import os, sys, time

def length(row, text):
    print("chatter on standard output")
    return len(text) + row["bonus"]

def moody(row, text):
    if text == "hang":
        time.sleep(60)
    if text == "die":
        os._exit(3)
    if text == "raise":
        raise ValueError("no idea")
    if text == "word":
        return "seven"
    if text == "nan":
        return float("nan")
    return 1.0
"""
ECHO = """
import json, sys
for line in sys.stdin:
    question = json.loads(line)
    print(len(question["text"]), flush=True)
"""


@pytest.fixture
def functions(tmp_path: Path) -> str:
    path = tmp_path / "rewards.py"
    path.write_text(FUNCTIONS)
    return str(path)


def rewards(config: RewardConfig, *texts: str, row: dict[str, Any] | None = None) -> list[float | None]:
    with Judge(config) as judge:
        return judge.rewards([row or {}] * len(texts), texts)


def test_a_function_gets_row_and_text(functions: str) -> None:
    config = RewardConfig(function=f"{functions}:length", workers=2)
    assert rewards(config, "a", "abc", "", row={"bonus": 10}) == [11.0, 13.0, 10.0]


def test_what_fails_costs_its_text_alone(functions: str, caplog: pytest.LogCaptureFixture) -> None:
    with Judge(RewardConfig(function=f"{functions}:moody", timeout_s=1.5)) as judge:
        assert judge.rewards([{}] * 3, ("fine", "raise", "word")) == [1.0, None, None]
        began = time.monotonic()
        assert judge.rewards([{}], ("hang",)) == [None]  # it is running, so it has no time to start
        assert time.monotonic() - began < 15
        assert judge.rewards([{}] * 4, ("die", "fine", "nan", "fine")) == [None, 1.0, None, 1.0]
    for reason in (
        "ValueError: no idea",
        "'seven', which is not a number",
        "no answer within reward.timeout_s (1.5 s)",
        "ended (status 3)",
        "2 of 3 texts have no reward",
    ):
        assert reason in caplog.text


def test_a_program_answers_lines(tmp_path: Path) -> None:
    (tmp_path / "echo.py").write_text(ECHO)
    config = RewardConfig(command=(sys.executable, str(tmp_path / "echo.py")), weights=RewardWeights(command=0.5))
    assert rewards(config, "a" * 100_000, "ab") == [50_000.0, 1.0]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [("print('not json', flush=True)", "not JSON"), ("print('x' * 10**6, flush=True)", "longer than"),
     ("sys.exit(0)", "ended (status 0)")],
)  # fmt: skip
def test_a_program_that_talks_nonsense(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, answer: str, reason: str
) -> None:
    (tmp_path / "bad.py").write_text(f"import sys\nfor line in sys.stdin:\n    {answer}\n")
    assert rewards(RewardConfig(command=(sys.executable, str(tmp_path / "bad.py"))), "a", "b") == [None, None]
    assert reason in caplog.text


def test_a_program_that_does_not_exist() -> None:
    with pytest.raises(UserError, match=r"reward\.command: /no/such/program cannot be started"):
        Judge(RewardConfig(command=("/no/such/program",)))


def test_a_function_file_that_does_not_exist() -> None:
    with pytest.raises(UserError, match=r"reward\.function: there is no file nowhere\.py"):
        Judge(RewardConfig(function="nowhere.py:name"))


def test_a_function_that_does_not_exist(functions: str, caplog: pytest.LogCaptureFixture) -> None:
    assert rewards(RewardConfig(function=f"{functions}:missing"), "a") == [None]
    assert "cannot be loaded: AttributeError" in caplog.text


class Handler(http.server.BaseHTTPRequestHandler):
    failures = 0
    seen: ClassVar[list[tuple[str | None, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.headers.get("Authorization"), body))
        text = body["text"]
        status = 503 if Handler.failures else {"teapot": 418, "away": 302}.get(text, 200)
        Handler.failures = max(0, Handler.failures - 1)
        if text == "slow":
            time.sleep(2)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:1/")
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # nobody waits for the slow one
            self.wfile.write(b"nonsense" if text == "nonsense" else json.dumps({"reward": len(text)}).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    Handler.failures, Handler.seen = 0, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/judge"
        server.shutdown()


def test_a_service_is_asked_with_a_token_from_the_environment(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "secret")
    config = RewardConfig(http=address, http_token="JUDGE_TOKEN")
    assert rewards(config, "four", row={"a": 1}) == [4.0]
    assert Handler.seen == [("Bearer secret", {"row": {"a": 1}, "text": "four"})]


def test_a_service_that_fails_at_times(address: str, caplog: pytest.LogCaptureFixture) -> None:
    Handler.failures = 2
    assert rewards(RewardConfig(http=address, retries=2), "four") == [4.0]
    config = RewardConfig(http=address, retries=0, timeout_s=0.5)
    assert rewards(config, "teapot", "nonsense", "slow", "away", "four") == [None, None, None, None, 4.0]
    for reason in ("status 418", "not JSON", "timed out", "status 302"):
        assert reason in caplog.text


def test_a_token_that_is_not_set(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_TOKEN", raising=False)
    with pytest.raises(UserError, match="the environment variable JUDGE_TOKEN is not set"):
        Judge(RewardConfig(http=address, http_token="JUDGE_TOKEN"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"function": "rewards.py"}, r"reward\.function: 'rewards\.py' is not of the form path\.py:name"),
        ({"http": "ftp://a/b"}, r"reward\.http: 'ftp://a/b' is not an http"),
        ({"http": "https://me:word@a/b"}, r"reward\.http: holds a password"),
        ({"http_token": "sk-123"}, r"reward\.http_token: names an environment variable"),
        ({"timeout_s": 0.0}, r"reward\.timeout_s"),
        ({"workers": 0}, r"reward\.workers"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardConfig(**settings)
