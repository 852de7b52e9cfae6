"""The output of a run: console, a JSON line per measurement, and monitors. Only rank 0 shows and writes.

A step number here is always the number of steps done: a training step is reported under its own count (1 is
the first, ``num_steps`` the last), an evaluation under the steps that came before it (0: before the first).
So a number means the same on the console and in the files, and after a resume nothing is out of order.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import final

from mezo_dist.errors import needs, printable
from mezo_dist.json_types import JsonObject
from mezo_dist.monitoring.scalars import Curves, figure, train_loss_tag
from mezo_dist.patience import show_with

with needs("rich", "rich, which draws the console"):
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn
    from rich.text import Text

Clock = Callable[[], float]
"""Seconds from any origin."""
LINE_INTERVAL_S = 10.0
"""Without a terminal, the least time between two progress lines."""
RECENT_STEPS = 20
"""Steps that samples/s is averaged over."""
HEADLINE: dict[str, tuple[str, Callable[[float], str]]] = {
    train_loss_tag(calibrated=False): ("loss", figure),
    train_loss_tag(calibrated=True): ("calib.loss", figure),
    "projected_gradient": ("proj.grad", "{:+.1e}".format),
    "rate/lr": ("lr", "{:.1e}".format),
    "gradient_norm": ("gradient", "{:.1e}".format),
}
"""The scalars of a step that the console shows, and how: a line fits 80 columns, so a rate that is found
(``algorithm.lr: auto``) stands in place of the projected gradient. Files get all scalars."""


@final
class Monitor:
    """The console and the files of one run. `open` makes one; on ranks other than 0 it does nothing.

    Control characters in what is shown are replaced: model names, paths and metrics come from files.

    Args:
        console: where to show.
        files: metrics.jsonl and what else gets its scalars; None for the console alone.
        num_steps: steps of the whole run.
        first_step: steps done before.
        clock: times the run.
    """

    def __init__(self, console: Console, files: Curves | None, num_steps: int, first_step: int, clock: Clock) -> None:
        self._console, self._files, self._clock = console, files, clock
        self._num_steps, self._first_step = num_steps, first_step
        self._began_s = self._last_line_s = clock()
        self._pace = _Pace(clock)
        self._bars = _make_bars(console)
        self._train_bar: TaskID | None = None

    @staticmethod
    @contextmanager
    def open(
        folder: Path | None,
        *,
        is_main: bool,
        num_steps: int,
        first_step: int | None = None,
        monitors: Sequence[str] = ("tensorboard",),
        console: Console | None = None,
        clock: Clock = time.monotonic,
    ) -> Iterator[Monitor]:
        """Context manager; leaving it, by an error or Ctrl-C too, ends the bars and closes the files.

        Args:
            folder: gets ``metrics.jsonl`` and the files of monitors; None: console only.
            is_main: True on rank 0. Elsewhere every method does nothing.
            num_steps: steps of the whole run.
            first_step: steps done before, if this run resumes one, be it before its first step. Then ``metrics.jsonl``
                is appended to, and monitors go on with the same run. If None, an older ``metrics.jsonl`` is replaced.
            monitors: what else gets the scalars, as ``monitor`` in a config names it.
            console: where to show; None: standard output. Bars need a terminal; anything else gets lines.
            clock: times the run.

        Raises:
            OSError: ``folder`` cannot be written to.
        """
        with ExitStack() as stack:
            if not is_main:
                folder, console = None, Console(quiet=True)
            elif console is None:  # rich alone would believe FORCE_COLOR and draw bars into a log file
                console = Console(force_terminal=sys.stdout.isatty())
            files = stack.enter_context(Curves.open(folder, first_step, monitors)) if folder is not None else None
            monitor = Monitor(console, files, num_steps, first_step or 0, clock)
            stack.callback(monitor._bars.stop)
            yield monitor

    def say(self, text: str) -> None:
        """Show a line as it is, above the bars."""
        self._print(Text(printable(text)))

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Show rows of (name, value) under a title; one line each, so that grep finds them."""
        shown = [(printable(name), printable(value)) for name, value in rows]
        width = max((len(name) for name, _ in shown), default=0)
        self._print(Text(printable(title), style="bold"))
        for name, value in shown:
            self._print(Text.assemble("  ", (name.ljust(width), "cyan"), "  ", value))

    def settings(self, settings: JsonObject) -> None:
        """Give monitors the resolved config, as `RunConfig.to_dict` has it."""
        if self._files is not None:
            self._files.settings(settings)

    def step(self, step: int, scalars: Mapping[str, float], *, samples: int) -> None:
        """Report a training step.

        Args:
            step: steps done, this one included.
            scalars: tag -> value. A tag ends in its unit if it has one (``time/update_s``). From the second
                step on, files get ``throughput/samples_per_s`` as well.
            samples: samples the step went through, for samples/s.
        """
        pace = self._pace.add(samples)
        shown = [f"step {step}/{self._num_steps}"]
        left_out = "projected_gradient" if "rate/lr" in scalars else None
        for tag, (name, form) in HEADLINE.items():
            if tag in scalars and tag != left_out:
                shown.append(f"{name} {form(scalars[tag])}")
        if pace is not None:
            rate, step_s = pace
            shown += [f"{rate:.1f} samples/s", f"ETA {format_duration((self._num_steps - step) * step_s)}"]
            scalars = {**scalars, "throughput/samples_per_s": rate}
        self._record(step, scalars)
        self._show_step(step, "  ".join(shown))

    @contextmanager
    def evaluation(self, split: str, total: int, doing: str = "evaluate") -> Iterator[Callable[[int], None]]:
        """Context manager around an evaluation of ``total`` samples of a split, with a bar that says what is being
        done.

        It gives ``advance(n)``, to be called after every ``n`` samples. Its time does not count in samples/s.
        """
        began_s, done, split = self._clock(), 0, printable(split)
        bar = self._add_bar(f"{doing} {split} 0/{total}", total)

        def advance(num_samples: int) -> None:
            nonlocal done
            done += num_samples
            line = f"{doing} {split} {done}/{total}"
            self._bars.update(bar, completed=done, description=line)
            if self._line_is_due():
                self._say_progress(line)

        try:
            yield advance
        finally:
            self._remove_bar(bar)
            self._pace.leave_out(self._clock() - began_s)

    def result(self, split: str, step: int, metrics: Mapping[str, float]) -> None:
        """Report metrics of a split: a line, and scalars ``eval/<split>/<name>``.

        Args:
            split: its name.
            step: steps done.
            metrics: name -> value, the loss among them.
        """
        self._record(step, {f"eval/{split}/{name}": value for name, value in metrics.items()}, split=split)
        shown = [f"{name} {figure(value)}" for name, value in metrics.items()]
        self.say("  ".join([f"eval {split} step {step}/{self._num_steps}", *shown]))

    def _record(self, step: int, scalars: Mapping[str, float], **facts: str) -> None:
        if self._files is not None:
            self._files.write(step, scalars, time_s=round(self._clock() - self._began_s, 3), **facts)

    def _show_step(self, step: int, line: str) -> None:
        is_first, is_last = step == self._first_step + 1, step == self._num_steps
        if is_last or (is_first and self._bars.disable) or self._line_is_due():
            self._say_progress(line)
        if self._train_bar is None:
            self._train_bar = self._add_bar(line, self._num_steps)
        self._bars.update(self._train_bar, completed=step, description=line)
        if is_last:  # the results that follow are to stand last on the screen
            self._remove_bar(self._train_bar)
            self._train_bar = None

    def _say_progress(self, line: str) -> None:
        self._last_line_s = self._clock()
        self.say(line)

    def _line_is_due(self) -> bool:
        return self._bars.disable and self._clock() - self._last_line_s >= LINE_INTERVAL_S

    def _add_bar(self, line: str, total: int) -> TaskID:
        self._bars.start()
        # rich hides the cursor while bars are up, and a process that is killed (launchers kill all ranks when
        # one fails) cannot bring it back: so it stays visible.
        self._console.show_cursor(True)
        return self._bars.add_task(line, total=total)

    def _remove_bar(self, bar: TaskID) -> None:
        self._bars.remove_task(bar)
        self._bars.refresh()  # else the next line would draw it once more

    def _print(self, text: Text) -> None:
        # Text: nothing in it is markup. soft_wrap: a line stays a line, to be searched and copied.
        self._console.print(text, soft_wrap=True)


def format_duration(seconds: float) -> str:
    """Write seconds in at most two units: ``45s``, ``1m23s``, ``2h05m``, ``3d04h``."""
    minutes, whole_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole_seconds:02d}s" if minutes else f"{whole_seconds}s"


def configure_logging(rank: int, is_terminal: bool) -> None:
    """Send the package's log to standard error: INFO and up from rank 0, WARNING and up from other ranks.

    Only the command line calls it, since a library leaves logging to its user. Lines name their rank and,
    without a terminal, date and module. Calling it again replaces what it set up.

    Args:
        rank: this process's.
        is_terminal: whether standard error is one.
    """
    short, full = "%(levelname)s: %(message)s", "%(asctime)s %(levelname)s %(name)s: %(message)s"
    handler = logging.StreamHandler(_CurrentStderr())
    handler.setFormatter(_PrintableFormatter(f"[rank {rank}] {short if is_terminal else full}"))
    logger = logging.getLogger("mezo_dist")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    is_shown = is_terminal and rank == 0
    show_with((lambda what: Console(stderr=True).status(Text(f"{printable(what)} ..."))) if is_shown else None)


class _PrintableFormatter(logging.Formatter):
    """Replaces control characters in messages; a traceback after the message keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)


class _CurrentStderr:
    """Standard error as it is when written to: while bars are up, rich puts in one that writes above them."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)


class _Pace:
    """The rate of steps. Time starts at the end of the first, which compiles kernels and fills caches."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._num_steps = self._num_samples = 0
        self._first_s = self._left_out_s = 0.0
        self._recent: deque[tuple[float, int]] = deque(maxlen=RECENT_STEPS + 1)  # training s, samples so far

    def leave_out(self, seconds: float) -> None:
        """Do not count that much time in samples/s."""
        self._left_out_s += seconds

    def add(self, num_samples: int) -> tuple[float, float] | None:
        """Count a step that just ended. Returns (samples/s, s/step), None after the first step.

        Samples/s are those of the most recent steps. Seconds per step, from which the time left follows, are those of
        the whole run, evaluations included.
        """
        now_s = self._clock()
        self._num_steps += 1
        self._num_samples += num_samples
        self._recent.append((now_s - self._left_out_s, self._num_samples))
        if self._num_steps == 1:
            self._first_s = now_s
            return None
        (from_s, from_samples), (to_s, to_samples) = self._recent[0], self._recent[-1]
        samples_per_s = (to_samples - from_samples) / max(to_s - from_s, 1e-9)
        return samples_per_s, (now_s - self._first_s) / (self._num_steps - 1)


def _make_bars(console: Console) -> Progress:
    """Bars on a terminal that can draw them; elsewhere an object that keeps count and shows nothing."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        console=console,
        refresh_per_second=4,
        redirect_stderr=sys.stderr.isatty(),  # a log file that standard error goes to keeps its lines
        disable=console.quiet or not console.is_interactive,
    )
