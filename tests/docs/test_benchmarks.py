"""The benchmarks run, on tiny shapes, and end with the line for machines that they promise."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.forked import ROOT, output_of


def run(*arguments: str) -> dict[str, Any]:
    """The last line of a benchmark's output."""
    output = output_of(arguments, environment={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    figures: dict[str, Any] = json.loads(output.splitlines()[-1])
    return figures


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
def test_equal_memory(tmp_path: Path) -> None:
    """What is known already is not run again; what takes too much, or fails, does not learn."""
    script, labels = "examples/benchmarks/equal_memory.py", ["AdamW, last 1 of 2 blocks", "AdamW, last 2 of 2 blocks"]
    given = ["--fast", "--json", "--seconds", "0.01", "--out", str(tmp_path / "results.jsonl"), "--only", *labels]
    figures = run(script, *given, "--room", "2")
    assert set(figures["peaks_gib"]) == {"MeZO-SVRG, all weights", *labels}
    assert min(figures["peaks_gib"].values()) > 0
    assert set(figures["learnt"]) == {"MeZO-SVRG, all weights", labels[1]}, "the larger of what fits"
    assert figures["learnt"][labels[1]]["passes"] == 12 * figures["learnt"][labels[1]]["steps"]
    rows = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len(rows) >= 3 + 2 * 3
    assert run(script, *given, "--room", "0.01")["learnt"] == {}
    assert (tmp_path / "results.jsonl").read_text().splitlines() == rows


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
