"""What a run shows: lines without a terminal, bars on one."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest
from rich.console import Console

from mezo_dist.monitoring import console as monitor_module
from mezo_dist.monitoring.console import HEADLINE, Monitor
from mezo_dist.monitoring.scalars import train_loss_tag
from tests.monitoring.consoles import Clock, plain, scalars, shown, terminal, without_codes

BAR = "\N{BOX DRAWINGS HEAVY HORIZONTAL}"
ESCAPE = "\x1b"
SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"


def drawn_with(console: Console, words: str) -> list[str]:
    """All lines drawn so far, as soon as ``words`` are among them: bars are drawn a few times a second."""
    deadline_s = time.monotonic() + 60
    while words not in (text := without_codes(shown(console))):
        assert time.monotonic() < deadline_s, text
        time.sleep(0.01)
    return text.splitlines()


# Without a terminal


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


def test_a_rate_that_is_found_stands_in_place_of_the_projected_gradient(clock: Clock) -> None:
    console = plain()
    with Monitor.open(None, is_main=True, num_steps=2, console=console, clock=clock) as monitor:
        monitor.step(1, scalars(0.5) | {"rate/lr": 0.0123}, samples=1)
    assert shown(console) == "step 1/2  loss 0.5000  lr 1.2e-02\n"


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


# On a terminal


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


# Names come from files


NAME = "a\x1b[2J\x07\x9b31m\nb\u202e"
SEEN = r"a\x1b[2J\x07\x9b31m\nb\u202e"


def test_control_characters_are_shown_and_not_sent() -> None:
    console = plain(width=400)
    with Monitor.open(None, is_main=True, num_steps=1, console=console) as monitor:
        monitor.say(NAME)
        monitor.table(NAME, [(NAME, NAME), ("b", "c")])
        with monitor.evaluation(NAME, 1) as advance:
            advance(1)
        monitor.result(NAME, 1, {NAME: 0.5})
    assert shown(console).splitlines() == [
        SEEN,
        SEEN,
        f"  {SEEN}  {SEEN}",
        f"  b{' ' * (len(SEEN) - 1)}  c",
        f"eval {SEEN} step 1/1  {SEEN} 0.5000",
    ]


def test_control_characters_are_not_drawn_on_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    console = terminal(monkeypatch, width=200)
    with (
        Monitor.open(None, is_main=True, num_steps=1, console=console) as monitor,
        monitor.evaluation(NAME, 4) as advance,
    ):
        advance(1)
        drawn_with(console, f"evaluate {SEEN} 1/4")


def test_a_calibrated_loss_says_so() -> None:
    console = plain()
    with Monitor.open(None, is_main=True, num_steps=1, console=console) as monitor:
        monitor.step(1, {train_loss_tag(calibrated=True): 0.5}, samples=1)
    assert shown(console) == "step 1/1  calib.loss 0.5000\n"


def test_small_losses_of_steps_are_not_shown_as_nothing() -> None:
    """The names and forms of a step's line, as for a reward of 1e-6."""
    shown_as = {tag: f"{name} {form(-1e-6)}" for tag, (name, form) in HEADLINE.items()}
    assert shown_as["loss/train"] == "loss -1e-06"
    assert shown_as["rate/lr"] == "lr -1.0e-06"
