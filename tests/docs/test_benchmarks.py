"""The benchmarks run, on tiny shapes, and end with the line for machines that they promise."""

from __future__ import annotations

import importlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.forked import ROOT, output_of


def run(*arguments: str) -> dict[str, Any]:
    """The last line of a benchmark's output."""
    output = output_of(arguments, environment={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    figures: dict[str, Any] = json.loads(output.splitlines()[-1])
    return figures


BENCHMARKS = ROOT / "examples" / "benchmarks"
PARTS_OF_OTHERS = {"harness.py", "shapes.py", "one_start.py"}


def test_all_have_the_same_options_and_a_section_with_their_figures() -> None:
    document = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    for path in sorted(BENCHMARKS.glob("*.py")):
        if path.name not in PARTS_OF_OTHERS:
            code = path.read_text(encoding="utf-8")
            assert all(call in code for call in ("harness.parser(", "harness.parse(", "harness.begin(", "harness.end("))
            assert not re.search('"--(json|fast)"', code), path
            assert f"python examples/benchmarks/{path.name}" in document, path
            assert re.search(rf"\[`{path.name}`\]\(#[\w-]+\)", document), path
    headings = {
        re.sub(r"[^\w -]", "", line[3:]).lower().replace(" ", "-")
        for line in document.splitlines()
        if line[:3] == "## "
    }
    assert set(re.findall(r"\]\(#([\w-]+)\)", document)) == headings


def test_options_that_are_given_count_beside_fast(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    harness = importlib.import_module("harness")
    parser = harness.parser("What it is.\n\nMore.")
    parser.add_argument("--shape", default="large")
    parser.add_argument("--repeats", type=int, default=5)
    fast = {"shape": "tiny", "repeats": 1}
    assert vars(harness.parse(parser, fast, [])) == {"json": False, "fast": False, "shape": "large", "repeats": 5}
    arguments = harness.parse(parser, fast, ["--fast", "--repeats", "3", "--json"])
    assert vars(arguments) == {"json": True, "fast": True, "shape": "tiny", "repeats": 3}
    monkeypatch.setattr(os, "getloadavg", lambda: (100.0, 1.0, 1.0))
    harness.end(arguments, harness.begin(), {"ratio": 2.0})
    shown = capsys.readouterr()
    assert "the machine is busy (load 100.0)" in shown.err
    figures = json.loads(shown.out)
    assert figures["ratio"] == 2.0
    assert set(figures["about"]) == {"command", "commit", "versions", "machine", "date", "load"}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured by Linux' peak counters")
def test_memory() -> None:
    sizes = ["--shape", "tiny", "--sizes", "2x16", "--methods", "forward", "svrg"]
    figures = run("examples/benchmarks/memory.py", "--json", *sizes)
    (row,) = figures["rows"]
    assert row["size"] == "2x16"
    assert row["forward_gib"] > row["weights_gib"] > 0
    assert figures["svrg_over_forward"] == row["svrg_over_forward"]
    assert figures["svrg_over_forward"] == pytest.approx(row["svrg_gib"] / row["forward_gib"], rel=0.01)


def test_a_case_that_fails_is_told_and_left_out() -> None:
    figures = run("examples/benchmarks/memory.py", "--json", "--shape", "tiny", "--sizes", "0x1", "--methods", "sgd")
    assert figures["svrg_over_forward"] is None
    assert figures["rows"][0]["sgd_gib"] is None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured by Linux' peak counters")
def test_equal_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases in this process, as imports take longer than all that they do."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
    equal_memory = importlib.import_module("equal_memory")
    every = {choice.label: choice for choice in equal_memory.choices(2)}
    taken = {}
    for label in (equal_memory.LIMIT, "AdamW, last 1 of 2 blocks", "AdamW, LoRA, checkpointing"):
        settings = every[label].settings(every[label].rate, 2, seed=0)
        taken[label] = equal_memory.run_case(settings, fast=True, is_scored=True)
        assert taken[label]["peak_gib"] > taken[label]["weights_gib"] > 0
        assert taken[label]["steps"] == 2
        assert all(
            0 < loss < 10 and 0 <= accuracy <= 1 for loss, accuracy in map(taken[label].get, ("validation", "test"))
        )
    assert [figures["passes"] for figures in taken.values()] == [2 * 8 + 4 * 4, 2 * 3 * 4, 2 * 4 * 4]


def test_equal_memory_takes_the_largest_that_fits_at_its_best_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
    equal_memory = importlib.import_module("equal_memory")
    peaks = {equal_memory.LIMIT: 1.0, "AdamW, all weights": 3.5, "AdamW, last 1 of 30 blocks": 0.8}
    peaks |= {"AdamW, last 2 of 30 blocks": 0.9, "AdamW, last 4 of 30 blocks": 1.01}
    rows = [(c, {"peak_gib": peaks[c.label]} if c.label in peaks else None) for c in equal_memory.choices(30)]
    assert [c.label for c in equal_memory.fitting(rows, 1.0)] == [equal_memory.LIMIT, "AdamW, last 2 of 30 blocks"]
    assert [c.label for c in equal_memory.fitting(rows, 1.1)] == [equal_memory.LIMIT, "AdamW, last 4 of 30 blocks"]

    tried: list[float] = []

    class Cases:
        def run(self, settings: list[str], *, is_scored: bool) -> dict[str, Any] | None:
            rate = next(float(item.partition("=")[2]) for item in settings if item.startswith("algorithm.lr="))
            tried.append(rate)
            figures = {"steps": 5, "passes": 60, "seconds": 1.0, "peak_gib": 0.9}
            scores = {"validation": [0.5, min(rate, 1.0) / 2], "test": [0.4, 0.75]}
            return None if rate > 2 else figures | scores

    (choice,) = (c for c in equal_memory.choices(30) if c.label == "AdamW, LoRA, checkpointing")
    best = equal_memory.learn(Cases(), choice, 5, [0, 1])
    assert tried == [0.00032, 0.001, 0.0032, 0.01, 0.032, 0.032, 0.032], "the grid grows twice at most"
    assert best == {
        "rate": 0.032,
        "steps": 5,
        "passes": 60,
        "seconds": 1.0,
        "peak_gib": 0.9,
        "loss": 0.4,
        "accuracy": 0.75,
    }


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured by Linux' peak counters")
def test_what_fits_is_measured_on_settings_of_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    fits, equal_memory = importlib.import_module("fits"), importlib.import_module("equal_memory")
    choice = next(c for c in equal_memory.choices(2) if c.label == "AdamW, last 1 of 2 blocks")
    figures = equal_memory.run_case(fits.settings_of(choice, "tiny", 16), fast=True, is_scored=False)
    assert figures["peak_gib"] > figures["weights_gib"] > 0
    assert (figures["steps"], figures["passes"]) == (2, 2 * 3)


def test_what_fits_asks_for_more_blocks_until_they_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    fits = importlib.import_module("fits")
    asked: list[dict[str, str]] = []

    class Cases:
        def run(self, settings: list[str], *, is_scored: bool) -> dict[str, Any] | None:
            case = dict(item.split("=", 1) for item in settings)
            asked.append(case)
            blocks = case.get("model.trainable", "").count("layers") or 3
            return {"peak_gib": 1.0 + 0.2 * (blocks - 3)}

    monkeypatch.setattr(fits, "source", lambda model: f"random:{model}")
    row = fits.measured(Cases(), "smollm2-360m", 512)
    assert row["last"] == {f"AdamW, last {k} of 32 blocks": pytest.approx(1.0 + 0.2 * (k - 3)) for k in (1, 2, 4)}
    assert {case["train.max_tokens"] for case in asked} == {"512"}
    assert {case["train.batch_size"] for case in asked} == {"1"}
    assert [case.get("train.full_size") for case in asked] == ["1"] + [None] * 5
    assert "2: **0.800**, 4: 1.200 |" in fits.measured_table([{**row, fits.LIMIT: 1.0}])


def test_lora_needs_more_than_forward_passes_from_some_length_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    fits = importlib.import_module("fits")
    beyond = fits.lora_from("opt-13b")
    before, after = (fits.planned("opt-13b", tokens) for tokens in (beyond // 2, beyond))
    assert before["LoRA"] <= before["replayed"] < before["stored"] < before["SGD"] < before["AdamW"]
    assert after["LoRA"] > after["replayed"]


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["fsdp", "zero"])
def test_seven_billion(engine: str) -> None:
    sizes = ["--shape", "tiny", "--text", "random", "--engines", engine]
    figures = run("examples/benchmarks/seven_billion.py", "--json", *sizes)[engine]
    assert figures["gathered_over_weights"] == pytest.approx(
        2.0, rel=0.05
    )  # the anchor step's pass and the inner step's
    assert figures["peak_rss_gib"] >= figures["loading_peak_rss_gib"] > figures["weights_gib"] > 0
    parts = [figures[part] for part in ("wait", "gather", "materialise", "forward", "update")]
    assert min(parts) >= 0
    assert sum(parts) <= figures["cycle_s"] + 0.01


def test_growth(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its parts in this process, as imports take longer than all that they do."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
    growth = importlib.import_module("growth")
    for part, size in (("trajectory", 120), ("evaluation", 8), ("directions", 2)):
        (folder := tmp_path / part).mkdir()
        figures = growth.PARTS[part](size, folder)
        assert all(value > 0 for value in figures.values()), (part, figures)
    rows = [{"read_s": 1.0, "append_us": 2.0}, {"read_s": 10.0, "append_us": 3.0}]
    assert growth.growth([100, 1_000], rows) == {"read_s": 1.0, "append_us": 1.5}
