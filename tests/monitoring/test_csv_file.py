"""metrics.csv: a row for each step, whatever was killed in between."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from mezo_dist.monitoring.console import Monitor
from tests.monitoring.consoles import plain


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_holds_what_is_known_after_so_many_steps(tmp_path: Path) -> None:
    with Monitor.open(tmp_path, is_main=True, num_steps=2, monitors=["csv"], console=plain()) as monitor:
        monitor.result("test", 0, {"loss": 0.75})
        monitor.step(1, {"loss/train": 0.5, "a, b": 1e-7}, samples=1)
        monitor.result("test", 1, {"loss": float("nan")})
        monitor.step(2, {"loss/train": 0.25, "new": 3}, samples=1)
    first, second, third = rows(tmp_path)
    assert first == {**dict.fromkeys(second, ""), "step": "0", "eval/test/loss": "0.75"}
    assert (second["step"], second["loss/train"], second["a, b"], second["eval/test/loss"]) == ("1", "0.5", "1e-07", "")
    assert (third["step"], third["loss/train"], third["new"], third["a, b"]) == ("2", "0.25", "3.0", "")
    assert float(third["throughput/samples_per_s"]) > 0


@pytest.mark.parametrize("damage", ["", "4,0.", "torn\x00"])
def test_a_run_that_goes_on_has_each_step_once(tmp_path: Path, damage: str) -> None:
    for first_step, steps in ((None, (1, 2, 3)), (2, (3, 4))):
        with Monitor.open(
            tmp_path, is_main=True, num_steps=4, first_step=first_step, monitors=["csv"], console=plain()
        ) as monitor:
            for step in steps:
                monitor.step(step, {"loss/train": step / (8 if first_step else 16)}, samples=1)
                if step == 2:
                    monitor.result("test", 2, {"loss": 0.5})
        if not first_step:
            with (tmp_path / "metrics.csv").open("a") as file:
                file.write(damage)
    assert [(row["step"], row["loss/train"]) for row in rows(tmp_path)] == [
        ("1", "0.0625"),
        ("2", "0.125"),
        ("3", "0.375"),
        ("4", "0.5"),
    ]
    assert [row["eval/test/loss"] for row in rows(tmp_path)] == ["", "0.5", "", ""]


def test_what_is_evaluated_after_a_break_stands_in_the_row_of_its_step(tmp_path: Path) -> None:
    with Monitor.open(tmp_path, is_main=True, num_steps=1, monitors=["csv"], console=plain()) as monitor:
        monitor.step(1, {"loss/train": 0.5}, samples=1)
    with Monitor.open(tmp_path, is_main=True, num_steps=1, first_step=1, monitors=["csv"], console=plain()) as monitor:
        monitor.result("test", 1, {"loss": 0.25})
    assert rows(tmp_path) == [{"step": "1", "loss/train": "0.5", "eval/test/loss": "0.25"}]


def test_a_new_run_has_a_new_table(tmp_path: Path) -> None:
    for loss in (0.5, 0.25):
        with Monitor.open(tmp_path, is_main=True, num_steps=1, monitors=["csv"], console=plain()) as monitor:
            monitor.result("test", 0, {"loss": loss})
    assert rows(tmp_path) == [{"step": "0", "eval/test/loss": "0.25"}]
