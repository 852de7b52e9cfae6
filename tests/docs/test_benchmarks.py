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
PARTS_OF_OTHERS = {"equal_choices.py", "harness.py", "shapes.py", "one_start.py"}


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
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    equal_memory = importlib.import_module("equal_memory")
    for name, kind in equal_memory.TINY.items():
        contest = equal_memory.CONTESTS[name]
        every = {choice.label: choice for choice in equal_memory.choices(contest)}
        taken = {}
        for label in (equal_memory.LIMIT, "AdamW, last 1 of 2 blocks", "AdamW, LoRA, checkpointing"):
            settings = equal_memory.merged(contest.overrides, every[label].settings(every[label].rate, 2, seed=0))
            taken[label] = equal_memory.run_case(settings, tiny=kind, is_scored=True)
            assert taken[label]["peak_gib"] > taken[label]["weights_gib"] > 0
            assert taken[label]["steps"] == 2
            assert all(
                0 < loss < 10 and 0 <= accuracy <= 1 for loss, accuracy in map(taken[label].get, ("validation", "test"))
            )
        assert [figures["passes"] for figures in taken.values()] == [2 * 8 + 4 * 4, 2 * 3 * 4, 2 * 4 * 4]


def test_contests_of_equal_memory_are_settings_that_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a typing error would break, without the models."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    equal_memory = importlib.import_module("equal_memory")
    for name, contest in equal_memory.CONTESTS.items():
        if name not in equal_memory.TINY:
            for choice in equal_memory.choices(contest):
                config = equal_memory.config_of(
                    equal_memory.merged(contest.overrides, choice.settings(choice.rate, 2, 0)), tmp_path
                )
                assert config.train.batch_size == (1 if "batch 1" in choice.label else 4 if name == "news" else 16)
                assert ("minilm" in config.model.name) == (name == "minilm")
                assert (config.algorithm.lr == "auto") == (
                    choice.label == importlib.import_module("equal_choices").AUTO
                )
                named = re.search(r"last (\d+) of (\d+)", choice.label)
                if named:
                    blocks = [re.search(r"layers?\.(\d+)", pattern) for pattern in config.model.trainable]
                    numbers = [int(block[1]) for block in blocks if block]
                    assert numbers == list(range(int(named[2])))[-int(named[1]) :]


def test_equal_memory_asks_for_more_blocks_until_they_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    equal_memory = importlib.import_module("equal_memory")

    class Cases:
        def run(self, settings: list[str], *, is_scored: bool) -> dict[str, Any] | None:
            assert not is_scored
            trainable = next((item for item in settings if item.startswith("model.trainable")), "")
            return {"peak_gib": 0.8 + 0.15 * trainable.count("layer.") if trainable else 1.0}

    rows = equal_memory.remembered(Cases(), equal_memory.CONTESTS["minilm"], 1.0, ["AdamW, last 1 of 6 blocks"])
    assert [choice.label for choice, _ in rows][2:] == ["AdamW, last 1 of 6 blocks"]
    rows = equal_memory.remembered(Cases(), equal_memory.CONTESTS["minilm"], 1.0, [])
    blocks = [choice.label for choice, _ in rows if choice.family == "last blocks"]
    assert blocks == ["AdamW, last 1 of 6 blocks", "AdamW, last 2 of 6 blocks"], "four are not tried"
    assert "AdamW, last 1 of 6 blocks" in [choice.label for choice in equal_memory.fitting(rows, 1.0)]


def test_equal_memory_takes_the_largest_that_fits_at_its_best_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
    equal_memory = importlib.import_module("equal_memory")
    peaks = {equal_memory.LIMIT: 1.0, importlib.import_module("equal_choices").AUTO: 1.2, "AdamW, all weights": 3.5}
    peaks |= {f"AdamW, last {k} of 30 blocks": peak for k, peak in ((1, 0.8), (2, 0.9), (4, 1.01))}
    contest = equal_memory.CONTESTS["movie"]
    every = equal_memory.choices(contest)
    rows = [(c, {"peak_gib": peaks[c.label]} if c.label in peaks else None) for c in every]
    by_passes = [equal_memory.LIMIT, importlib.import_module("equal_choices").AUTO]
    assert [c.label for c in equal_memory.fitting(rows, 1.0)] == [*by_passes, "AdamW, last 2 of 30 blocks"]
    assert [c.label for c in equal_memory.fitting(rows, 1.1)] == [*by_passes, "AdamW, last 4 of 30 blocks"]

    tried: list[float] = []

    class Cases:
        def run(self, settings: list[str], *, is_scored: bool) -> dict[str, Any] | None:
            value = next(item.partition("=")[2] for item in settings if item.startswith("algorithm.lr="))
            tried.append(rate := 0.5 if value == "auto" else float(value))
            figures = {"steps": 5, "passes": 60, "seconds": 1.0, "peak_gib": 0.9}
            scores = {"validation": [0.5, min(rate, 1.0) / 2], "test": [0.4, 0.75]}
            return None if rate > 2 else figures | scores

    (choice,) = (c for c in every if c.label == "AdamW, LoRA, checkpointing")
    best = equal_memory.learn(Cases(), contest, choice, 5, [0, 1])
    assert tried == [0.00032, 0.001, 0.0032, 0.01, 0.032, 0.032, 0.032], "the grid grows twice at most"
    assert best == {
        "rate": 0.032,
        "steps": 5,
        "passes": 60,
        "seconds": 1.0,
        "peak_gib": 0.9,
        "loss": 0.4,
        "accuracy": 0.75,
        "accuracies": [0.75, 0.75],
    }
    tried.clear()
    (auto,) = (c for c in every if c.label == importlib.import_module("equal_choices").AUTO)
    assert equal_memory.learn(Cases(), contest, auto, 5, [0, 1])["rate"] == "auto"
    assert tried == [0.5, 0.5], "no grid"
    tried.clear()
    assert equal_memory.learn(Cases(), contest, choice, 5, [0, 1], untuned=True)["rate"] == choice.rate
    assert tried == [choice.rate, choice.rate], "the middle of the grid"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured by Linux' peak counters")
def test_what_fits_is_measured_on_settings_of_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    fits, equal_memory = importlib.import_module("fits"), importlib.import_module("equal_memory")
    choice = next(
        c for c in equal_memory.choices(equal_memory.CONTESTS["tiny"]) if c.label == "AdamW, last 1 of 2 blocks"
    )
    figures = equal_memory.run_case(fits.settings_of(choice, "tiny", 16), tiny="llama-tied", is_scored=False)
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
