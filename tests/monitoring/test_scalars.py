"""What a run writes: metrics.jsonl and TensorBoard's events."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from mezo_dist.monitoring.console import Monitor
from mezo_dist.monitoring.scalars import figure, train_loss_tag
from tests.monitoring.consoles import Clock, plain, scalars, shown, terminal


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


def test_files_hold_all_scalars(tmp_path: Path, clock: Clock) -> None:
    with Monitor.open(tmp_path / "run", is_main=True, num_steps=2, console=plain(), clock=clock) as monitor:
        monitor.settings({"seed": 1})
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
    assert text.tensor_proto.string_val == [b'```json\n{\n  "seed": 1\n}\n```']


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_null(tmp_path: Path, bad: float) -> None:
    console = plain()
    with Monitor.open(tmp_path, is_main=True, num_steps=2, console=console) as monitor:
        monitor.step(1, scalars(bad), samples=1)
        monitor.result("test", 1, {"loss": bad})
    step, result = jsonl(tmp_path)
    assert step["scalars"] == {"loss/train": None, "projected_gradient": 0.5, "communicator/payload_bytes": 256}
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


def test_files_of_one_second_are_read_in_the_order_in_which_they_were_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter((9, 10))  # TensorBoard counts the files of a process: the name of number 10 sorts before number 9's
    monkeypatch.setattr(event_file_writer, "_global_uid", SimpleNamespace(get=lambda: next(counts)))
    for step in (1, 2):
        with Monitor.open(tmp_path, is_main=True, num_steps=2, first_step=step - 1, console=plain()) as monitor:
            monitor.step(step, {"loss/train": step / 4}, samples=1)
    assert points(tmp_path, "loss/train") == [(1, 0.25), (2, 0.5)]


def test_a_run_that_goes_on_before_its_first_step_keeps_what_was_evaluated(tmp_path: Path) -> None:
    monitors = ("tensorboard", "csv")
    with Monitor.open(tmp_path, is_main=True, num_steps=4, monitors=monitors, console=plain()) as monitor:
        monitor.result("test", 0, {"loss": 0.5})
        monitor.step(1, {"loss/train": 0.25}, samples=1)
    with Monitor.open(tmp_path, is_main=True, num_steps=4, first_step=0, monitors=monitors, console=plain()) as monitor:
        monitor.step(1, {"loss/train": 0.125}, samples=1)
    assert [line["step"] for line in jsonl(tmp_path)] == [0, 1, 1]
    assert points(tmp_path, "eval/test/loss") == [(0, 0.5)]
    assert points(tmp_path, "loss/train") == [(1, 0.125)]
    table = (tmp_path / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in table[1:]] == [["0", "0.5"], ["1", ""]]


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
        monitor.settings({"seed": 1})
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
from mezo_dist.monitoring.console import Monitor
assert "torch" not in sys.modules
with Monitor.open(Path({str(tmp_path / "run")!r}), is_main=True, num_steps=1) as monitor:
    monitor.step(1, {{"loss/train": 0.5}}, samples=1)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, cwd=Path(__file__).parents[2])
    assert points(tmp_path / "run", "loss/train") == [(1, 0.5)]


def test_tensorboard_on_a_full_disk_is_left_out_with_one_warning(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(pytest fails a test for a thread that ends with a traceback.)"""

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Monitor.open(tmp_path, is_main=True, num_steps=9, console=plain(), clock=clock) as monitor:
        guarded: Any = monitor._files._writers[0]  # type: ignore[union-attr]
        thread = guarded._writer._writer._get_file_writer().event_writer._async_writer._worker
        monkeypatch.setattr(thread._record_writer, "write", full)
        monkeypatch.setattr(thread._record_writer, "flush", full)
        monitor.step(1, scalars(0.5), samples=16)
        thread.join(60)  # its error comes in its own time
        assert not thread.is_alive()
        monitor.step(2, scalars(0.5), samples=16)
        monitor.step(3, scalars(0.5), samples=16)
    (line,) = [record.getMessage() for record in caplog.records]
    assert re.search(
        r"monitor: tensorboard failed at step [12] \(OSError: \[Errno 28\] No space left on device\)", line
    )
    assert "goes on without it" in line
    assert [line["step"] for line in jsonl(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("kind", ["folder", "fifo", "link", "dangling"])
@pytest.mark.parametrize("first_step", [0, 2])
def test_what_lies_in_place_of_the_files_does_not_stop_a_run(tmp_path: Path, kind: str, first_step: int) -> None:
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (elsewhere / "file").write_text("precious")
    for name, target in (("metrics.jsonl", elsewhere / "file"), ("tensorboard", elsewhere)):
        match kind:
            case "folder" if name == "metrics.jsonl":
                (folder / name).mkdir()
            case "folder":
                (folder / name).write_text("a file")
            case "fifo":
                os.mkfifo(folder / name)
            case "link":
                (folder / name).symlink_to(target)
            case "dangling":
                (folder / name).symlink_to(tmp_path / "nowhere")
    with Monitor.open(folder, is_main=True, num_steps=9, first_step=first_step, console=plain()) as monitor:
        monitor.step(first_step + 1, {"loss/train": 0.5}, samples=1)
    assert [line["step"] for line in jsonl(folder)] == [first_step + 1]
    assert points(folder, "loss/train") == [(first_step + 1, 0.5)]
    assert [path.name for path in elsewhere.iterdir()] == ["file"]
    assert (elsewhere / "file").read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()
    assert os.path.lexists(folder / "metrics.jsonl.aside")
    assert os.path.lexists(folder / "tensorboard.aside")


def test_damage_in_an_older_part_stays_where_it_is(tmp_path: Path) -> None:
    damaged = b"\xff" * 100 + b"\n" + b"[" * 10**5 + b"\n"
    (tmp_path / "metrics.jsonl").write_bytes(damaged + b"torn")
    with Monitor.open(tmp_path, is_main=True, num_steps=9, first_step=2, console=plain()) as monitor:
        monitor.step(3, {"loss/train": 0.5}, samples=1)
    content = (tmp_path / "metrics.jsonl").read_bytes()
    assert content.startswith(damaged + b'{"step": 3')


def test_the_tag_of_a_calibrated_loss_says_so() -> None:
    assert train_loss_tag(calibrated=False) == "loss/train"
    assert "biased_low" in train_loss_tag(calibrated=True)


def test_small_figures_are_not_shown_as_nothing() -> None:
    """A reward of 2e-6 is no 0.0000."""
    assert [figure(value) for value in (0.40512, 2.5e-6, -4e-4, -0.12345678, 0.0, 12345678.0)] == [
        "0.4051", "2.5e-06", "-0.0004", "-0.1235", "0.0000", "1.235e+07"
    ]  # fmt: skip
    assert [figure(value, 3) for value in (0.6875, 0.0049, 0.0)] == ["0.688", "0.0049", "0.000"]
    assert figure(float("nan")) == "nan"
