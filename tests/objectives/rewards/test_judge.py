"""Rewards come from code that hangs, dies and talks nonsense: a text without a number costs that text, and no more."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import subprocess
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

def forks(row, text):
    if text == "fork":
        os.fork()
    return len(text)

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
        "no answer within 1.5 s (reward.timeout_s)",
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


def test_a_function_that_does_not_exist_or_load_is_refused_at_the_start(functions: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reward\.function: cannot be loaded: AttributeError.*missing"):
        Judge(RewardConfig(function=f"{functions}:missing"))
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(UserError, match=r"reward\.function: cannot be loaded: ZeroDivisionError"):
        Judge(RewardConfig(function=f"{tmp_path / 'broken.py'}:f"))


def test_a_fork_does_not_answer_for_its_parent(functions: str) -> None:
    config = RewardConfig(function=f"{functions}:forks")
    assert rewards(config, *(["fork" if n == 3 else "a" * n for n in range(7)])) == [0.0, 1.0, 2.0, 4.0, 4.0, 5.0, 6.0]


def test_a_program_that_says_more_than_it_is_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "chatter.py").write_text(ECHO.replace("flush=True)", "flush=True)\n    print(-100, flush=True)"))
    given = rewards(RewardConfig(command=(sys.executable, str(tmp_path / "chatter.py"))), "a", "ab", "abc", "abcd")
    assert None in given
    assert "it says more than one line for a text" in caplog.text


def test_what_never_answers_does_not_hold_up_the_batch(functions: str, caplog: pytest.LogCaptureFixture) -> None:
    began = time.monotonic()
    config = RewardConfig(function=f"{functions}:moody", timeout_s=0.5)
    assert rewards(config, *["hang"] * 20) == [None] * 20
    assert time.monotonic() - began < 15  # three starts and three times the limit
    assert "the rest was not asked for" in caplog.text


@pytest.mark.parametrize("answer", ["1" + "0" * 400, "[" * 60_000])
def test_numbers_that_are_none(tmp_path: Path, answer: str) -> None:
    (tmp_path / "answer").write_text(answer + "\n")
    (tmp_path / "odd.sh").write_text(f"while read line; do cat {tmp_path / 'answer'}; done\n")
    assert rewards(RewardConfig(command=("sh", str(tmp_path / "odd.sh"))), "a", "b") == [None, None]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own way")
def test_judges_die_with_the_process_that_asks_them(functions: str, tmp_path: Path) -> None:
    code = (
        "import sys, os; from mezo_dist.objectives.rewards.judge import Judge; from mezo_dist.config.reward import *;"
        f"j = Judge(RewardConfig(function={functions + ':length'!r}, command=('sleep', '1000')));"
        "print(*[p._process.pid for p in j.programs], flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pids = done.stdout.split()
    assert len(pids) == 2, done.stderr
    deadline = time.monotonic() + 10
    while any(is_running(int(pid)) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(int(pid)) for pid in pids)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


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
        if text == "trickle":
            self.trickle()
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:1/")
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # nobody waits for the slow one
            self.wfile.write(b"nonsense" if text == "nonsense" else json.dumps({"reward": len(text)}).encode())

    def trickle(self) -> None:
        """A byte at a time, each well within the limit."""
        self.send_response(200)
        self.send_header("Content-Length", "60000")
        self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(20):
                self.wfile.write(b"1")
                time.sleep(0.2)

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


def test_a_proxy_is_used_when_asked_for_and_only_then(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token must not reach a machine that the config does not name."""
    proxy, elsewhere = address.removesuffix("/judge"), "http://judge.invalid/judge"
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.setenv("JUDGE_TOKEN", "sesame")
    config = RewardConfig(http=elsewhere, http_token="JUDGE_TOKEN", retries=0)
    assert rewards(config, "four") == [None]
    assert rewards(dataclasses.replace(config, http_proxy=True), "four") == [4.0]


def test_a_service_that_fails_at_times(address: str, caplog: pytest.LogCaptureFixture) -> None:
    Handler.failures = 2
    assert rewards(RewardConfig(http=address, retries=2), "four") == [4.0]
    config = RewardConfig(http=address, retries=0, timeout_s=0.5)
    assert rewards(config, "teapot", "nonsense", "slow", "away", "four") == [None, None, None, None, 4.0]
    for reason in ("status 418", "not JSON", "gave no answer within 0.5 s", "status 302"):
        assert reason in caplog.text


def test_a_service_that_trickles_is_too_slow(address: str) -> None:
    began = time.monotonic()
    assert rewards(RewardConfig(http=address, retries=0, timeout_s=0.6), "trickle") == [None]
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("token", ["with\nline", "sch\u00f6n"])
def test_a_token_that_no_header_takes_is_not_shown(address: str, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", token)
    with pytest.raises(UserError, match="JUDGE_TOKEN holds more than printable ASCII") as fault:
        Judge(RewardConfig(http=address, http_token="JUDGE_TOKEN"))
    assert token not in str(fault.value)


def test_a_token_from_a_file_may_end_in_a_line_end(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "secret\n")
    assert rewards(RewardConfig(http=address, http_token="JUDGE_TOKEN"), "four") == [4.0]
    assert Handler.seen[0][0] == "Bearer secret"


def test_a_token_that_is_not_set(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_TOKEN", raising=False)
    with pytest.raises(UserError, match="the environment variable JUDGE_TOKEN is not set"):
        Judge(RewardConfig(http=address, http_token="JUDGE_TOKEN"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"function": "rewards.py"}, r"reward\.function: 'rewards\.py' is not of the form path\.py:name"),
        ({"http": "ftp://a/b"}, r"reward\.http: 'ftp://a/b' is not an http"),
        ({"http": "http://[::1/"}, r"reward\.http: .* is not an http"),
        ({"http": "http://a:99999/"}, r"reward\.http: .* is not an http"),
        ({"http": "http://a..b/"}, r"reward\.http: .* is not an http"),
        ({"http": "http://a/\u00e9"}, r"reward\.http: .* is not an http"),
        ({"http": "http://?"}, r"reward\.http: .* is not an http"),
        ({"http": "https://me:word@a/b"}, r"reward\.http: holds a password"),
        ({"http_token": "sk-123"}, r"reward\.http_token: names an environment variable"),
        ({"http_token": "TOKEN"}, r"reward\.http_token: is for an address"),
        ({"http_proxy": True}, r"reward\.http_proxy: is for an address"),
        ({"timeout_s": 0.0}, r"reward\.timeout_s"),
        ({"workers": 0}, r"reward\.workers"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardConfig(**settings)
