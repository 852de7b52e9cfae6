"""What a run shows and writes, seen from outside: the console's text and the files."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mezo_dist import monitor as monitor_module
from mezo_dist.monitor import Monitor, configure_logging, format_duration

BAR = "\N{BOX DRAWINGS HEAVY HORIZONTAL}"
ESCAPE = "\x1b"
SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"


class Clock:
    """A clock that stands still until it is told to go."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def wait(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def plain(width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=width)


def terminal(monkeypatch: pytest.MonkeyPatch, width: int = 80) -> Console:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Console(file=io.StringIO(), force_terminal=True, width=width)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def without_codes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def drawn_with(console: Console, words: str) -> list[str]:
    """All lines drawn so far, as soon as ``words`` are among them: bars are drawn a few times a second."""
    deadline_s = time.monotonic() + 60
    while words not in (text := without_codes(shown(console))):
        assert time.monotonic() < deadline_s, text
        time.sleep(0.01)
    return text.splitlines()


def strict_json(line: str) -> Any:
    """As other languages read it: Python alone would take NaN."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def jsonl(folder: Path) -> list[Any]:
    return [strict_json(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard")).Reload()


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(folder).Scalars(tag)]


def scalars(loss: float, gradient: float = 0.5) -> dict[str, float]:
    return {"loss/train": loss, "projected_gradient": gradient, "wire/payload_bytes": 256}


# ---- without a terminal


def test_first_and_last_step_and_a_line_every_ten_seconds(clock: Clock) -> None:
    console = plain()
    with Monitor.open(None, is_main=True, num_steps=12, console=console, clock=clock) as monitor:
        for step in range(1, 13):
            clock.wait(4)
            monitor.step(step, scalars(0.6931), samples=16)
    steps = [int(n) for n in re.findall(r"^step (\d+)/12  loss 0\.6931", shown(console), re.MULTILINE)]
    assert steps == [1, 4, 7, 10, 12]
    assert len(shown(console).splitlines()) == len(steps)


def test_a_resumed_run_shows_its_first_step(clock: Clock) -> None:
    console = plain()
    with Monitor.open(None, is_main=True, num_steps=12, first_step=7, console=console, clock=clock) as monitor:
        monitor.step(8, scalars(0.5), samples=1)
        monitor.step(9, scalars(0.5), samples=1)
    assert shown(console) == "step 8/12  loss 0.5000  proj.grad +5.0e-01\n"


def test_samples_per_s_leave_out_the_first_step_and_evaluations(clock: Clock) -> None:
    console = plain()
    with Monitor.open(None, is_main=True, num_steps=12, console=console, clock=clock) as monitor:
        clock.wait(100)  # compiles kernels
        monitor.step(1, scalars(0.5), samples=8)
        clock.wait(2)
        monitor.step(2, scalars(0.5), samples=16)
        with monitor.evaluation("validation", 4):
            clock.wait(30)
        clock.wait(2)
        monitor.step(3, scalars(0.5), samples=8)
    # 24 samples in 4 s; 9 steps are left, and a step took 17 s with the evaluation.
    assert shown(console).splitlines()[-1].endswith("  6.0 samples/s  ETA 2m33s")


def test_samples_per_s_are_of_recent_steps(clock: Clock) -> None:
    console = plain()
    num_steps = 2 * monitor_module.RECENT_STEPS
    with Monitor.open(None, is_main=True, num_steps=num_steps, console=console, clock=clock) as monitor:
        for step in range(1, num_steps + 1):
            clock.wait(1.0 if step < num_steps / 2 else 0.1)
            monitor.step(step, scalars(0.5), samples=1)
    assert "  10.0 samples/s  ETA 0s\n" in shown(console)


def test_a_long_evaluation_shows_that_it_goes_on(clock: Clock) -> None:
    console = plain()
    with Monitor.open(None, is_main=True, num_steps=12, console=console, clock=clock) as monitor:
        with monitor.evaluation("test", 40) as advance:
            for _ in range(10):
                clock.wait(3)
                advance(4)
        monitor.result("test", 0, {"loss": 0.25, "accuracy": 0.75})
    assert shown(console).splitlines() == [
        "evaluate test 16/40",
        "evaluate test 32/40",
        "eval test step 0/12  loss 0.2500  accuracy 0.7500",
    ]


def test_words_stay_as_they_are_on_one_line() -> None:
    console = plain(width=40)
    words = "[bold]not markup[/] :smile: " + "/a/long/path" * 20
    with Monitor.open(None, is_main=True, num_steps=1, console=console) as monitor:
        monitor.say(words)
        monitor.table("Facts", [("model", words), ("law version", "[x] 1")])
    assert shown(console).splitlines() == [
        words,
        "Facts",
        f"  model        {words}",
        "  law version  [x] 1",
    ]


def test_no_codes_in_a_log_file_even_if_colours_are_forced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Monitor.open(None, is_main=True, num_steps=1) as monitor:
        monitor.table("Facts", [("seed", "1")])
        with monitor.evaluation("test", 1) as advance:
            advance(1)
        monitor.step(1, scalars(0.5), samples=1)
    out = capsys.readouterr().out
    assert "step 1/1" in out
    assert ESCAPE not in out
    assert BAR not in out


# ---- on a terminal


def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    console = terminal(monkeypatch)
    with Monitor.open(None, is_main=True, num_steps=200, console=console, clock=clock) as monitor:
        for step in (1, 2):
            clock.wait(1)
            monitor.step(step, scalars(0.6931, -0.0123), samples=16)
        with monitor.evaluation("validation", 64) as advance:
            monitor.say("headline")
            advance(48)
            during = drawn_with(console, "validation 48/64")[-2:]
    line = "step 2/200  loss 0.6931  proj.grad -1.2e-02  16.0 samples/s  ETA 3m18s"
    assert during[0].startswith(line)  # nothing is cut off at 80 columns
    assert during[1].startswith("evaluate validation 48/64")
    assert all(BAR in text and len(text) <= 80 for text in during)
    assert without_codes(shown(console)).count("headline") == 1


def test_bars_make_room_for_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    console = terminal(monkeypatch)
    with Monitor.open(None, is_main=True, num_steps=2, console=console) as monitor:
        monitor.step(1, scalars(0.5), samples=1)
        monitor.step(2, scalars(0.4), samples=1)
        with monitor.evaluation("test", 1) as advance:
            advance(1)
        before_the_results = len(shown(console))
        monitor.table("Results", [("accuracy", "0.75")])
    text = without_codes(shown(console))
    assert re.search(r"step 2/2  loss 0\.4000.*\n", text)
    assert BAR not in shown(console)[before_the_results:]
    assert text.strip().endswith("\r  accuracy  0.75")


def test_the_cursor_is_never_hidden_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed while its bars are up cannot bring it back."""
    console = terminal(monkeypatch)
    with Monitor.open(None, is_main=True, num_steps=2, console=console) as monitor:
        monitor.step(1, scalars(0.5), samples=1)
        assert shown(console).rfind(SHOW_CURSOR) > shown(console).rfind(HIDE_CURSOR) >= 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_terminal_is_sane_after_an_error(monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    console, stdout = terminal(monkeypatch), sys.stdout

    def fail() -> None:
        with Monitor.open(None, is_main=True, num_steps=2, console=console) as monitor:
            monitor.step(1, scalars(0.5), samples=1)
            assert sys.stdout is not stdout  # what others print goes above the bars
            with monitor.evaluation("test", 4) as advance:
                advance(1)
                raise error

    with pytest.raises(error):
        fail()
    assert sys.stdout is stdout
    assert shown(console).endswith(f"\n{SHOW_CURSOR}")
    assert "step 1/2" in without_codes(shown(console)).splitlines()[-1]  # where it stopped


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with Monitor.open(None, is_main=True, num_steps=2, console=console) as monitor:
        monitor.step(1, scalars(0.5), samples=1)
    assert shown(console) == "step 1/2  loss 0.5000  proj.grad +5.0e-01\n"


# ---- files


def test_files_hold_all_scalars(tmp_path: Path, clock: Clock) -> None:
    with Monitor.open(tmp_path / "run", is_main=True, num_steps=2, console=plain(), clock=clock) as monitor:
        monitor.text("config", "# resolved")
        clock.wait(0.5)
        monitor.result("validation", 0, {"loss": 0.75, "accuracy": 0.5})
        clock.wait(2)
        monitor.step(1, scalars(0.5), samples=16)
        clock.wait(2)
        monitor.step(2, scalars(0.25), samples=16)
        lines = jsonl(tmp_path / "run")  # on disk while the run goes on
    assert lines == [
        {
            "step": 0,
            "time_s": 0.5,
            "split": "validation",
            "scalars": {"eval/validation/loss": 0.75, "eval/validation/accuracy": 0.5},
        },
        {"step": 1, "time_s": 2.5, "scalars": scalars(0.5)},
        {"step": 2, "time_s": 4.5, "scalars": {**scalars(0.25), "throughput/samples_per_s": 8.0}},
    ]
    in_events = {tag: points(tmp_path / "run", tag) for tag in events(tmp_path / "run").Tags()["scalars"]}
    in_lines: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for tag, value in line["scalars"].items():
            in_lines.setdefault(tag, []).append((line["step"], value))
    assert in_events == in_lines
    (text,) = events(tmp_path / "run").Tensors("config/text_summary")
    assert text.tensor_proto.string_val == [b"# resolved"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_null(tmp_path: Path, bad: float) -> None:
    console = plain()
    with Monitor.open(tmp_path, is_main=True, num_steps=2, console=console) as monitor:
        monitor.step(1, scalars(bad), samples=1)
        monitor.result("test", 1, {"loss": bad})
    step, result = jsonl(tmp_path)
    assert step["scalars"] == {"loss/train": None, "projected_gradient": 0.5, "wire/payload_bytes": 256}
    assert result["scalars"] == {"eval/test/loss": None}
    assert f"loss {bad}" in shown(console)
    assert [step for step, _ in points(tmp_path, "loss/train")] == [1]


def test_a_resumed_run_goes_on_with_the_files(tmp_path: Path) -> None:
    with Monitor.open(tmp_path, is_main=True, num_steps=4, console=plain()) as monitor:
        for step in (1, 2, 3):
            monitor.step(step, {"loss/train": step / 8}, samples=1)
            monitor.result("validation", step, {"loss": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "sca')  # killed while writing
    with Monitor.open(tmp_path, is_main=True, num_steps=4, first_step=2, console=plain()) as monitor:
        for step in (3, 4):
            monitor.step(step, {"loss/train": step / 4}, samples=1)
    assert [line["step"] for line in jsonl(tmp_path)] == [1, 1, 2, 2, 3, 3, 3, 4]
    assert points(tmp_path, "loss/train") == [(1, 0.125), (2, 0.25), (3, 0.75), (4, 1.0)]
    # The evaluation after step 2 belongs to what is resumed, the one after step 3 does not.
    assert points(tmp_path, "eval/validation/loss") == [(1, 0.5), (2, 0.5)]


def test_a_new_run_replaces_the_files(tmp_path: Path) -> None:
    for loss in (0.5, 0.25):
        with Monitor.open(tmp_path, is_main=True, num_steps=4, console=plain()) as monitor:
            monitor.result("test", 0, {"loss": loss})
    assert [line["scalars"] for line in jsonl(tmp_path)] == [{"eval/test/loss": 0.25}]
    assert points(tmp_path, "eval/test/loss") == [(0, 0.25)]


def test_other_ranks_show_and_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    console = terminal(monkeypatch)
    with Monitor.open(tmp_path / "run", is_main=False, num_steps=2, console=console) as monitor:
        monitor.say("words")
        monitor.table("Facts", [("seed", "1")])
        monitor.text("config", "# resolved")
        with monitor.evaluation("test", 2) as advance:
            advance(2)
        monitor.result("test", 0, {"loss": 0.5})
        for step in (1, 2):
            monitor.step(step, scalars(0.5), samples=1)
    assert shown(console) == ""
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_neither_torch_at_import_nor_tensorflow_at_all(tmp_path: Path) -> None:
    """TensorBoard imports TensorFlow if it finds it; the command line is to answer fast."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise SystemExit('TensorFlow was imported')")
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from pathlib import Path
from mezo_dist.monitor import Monitor
assert "torch" not in sys.modules
with Monitor.open(Path({str(tmp_path / "run")!r}), is_main=True, num_steps=1) as monitor:
    monitor.step(1, {{"loss/train": 0.5}}, samples=1)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, cwd=Path(__file__).parents[2])
    assert points(tmp_path / "run", "loss/train") == [(1, 0.5)]


# ---- words and logs


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (83, "1m23s"),
        (3600, "1h00m"),
        (7530, "2h05m"),
        (86399.9, "1d00h"),
        (3 * 86400 + 4 * 3600 + 1, "3d04h"),
    ],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    package = logging.getLogger("mezo_dist")
    handlers, level = package.handlers, package.level
    yield logging.getLogger("mezo_dist.test")
    package.handlers, package.level = handlers, level


@pytest.mark.parametrize(("rank", "info"), [(0, "[rank 0] INFO: facts\n"), (3, "")])
def test_logs_name_the_rank(log: logging.Logger, capsys: pytest.CaptureFixture[str], rank: int, info: str) -> None:
    for _ in range(2):  # a second time changes nothing
        configure_logging(rank, is_terminal=True)
    log.info("facts")
    log.warning("step %d skipped", 7)
    assert capsys.readouterr() == ("", f"{info}[rank {rank}] WARNING: step 7 skipped\n")


def test_logs_in_a_file_name_date_and_module(log: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(1, is_terminal=False)
    log.warning("skipped")
    line = capsys.readouterr().err
    assert re.fullmatch(r"\[rank 1\] \d{4}-\d\d-\d\d [\d:,]+ WARNING mezo_dist\.test: skipped\n", line)


@pytest.mark.parametrize("stderr_is_terminal", [True, False])
def test_logs_go_above_the_bars_unless_they_go_elsewhere(
    log: logging.Logger,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stderr_is_terminal: bool,
) -> None:
    configure_logging(0, is_terminal=True)
    console = terminal(monkeypatch)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: stderr_is_terminal)
    with Monitor.open(None, is_main=True, num_steps=9, console=console) as monitor:
        monitor.step(1, scalars(0.5), samples=1)
        log.warning("skipped")
    line = "[rank 0] WARNING: skipped\n"
    assert (line in without_codes(shown(console))) is stderr_is_terminal
    assert capsys.readouterr().err == ("" if stderr_is_terminal else line)
