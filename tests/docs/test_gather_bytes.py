"""The benchmark of gathered bytes runs, and finds what it is there to show."""

from __future__ import annotations

import json
import os

import pytest

from tests.forked import ROOT, output_of


@pytest.mark.distributed
def test_a_step_gathers_the_weights_once_and_the_naive_way_four_times() -> None:
    command = ["examples/benchmarks/gather_bytes.py", "--json", "--shape", "tiny"]
    output = output_of(command, environment={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    by_layout = json.loads(output.splitlines()[-1])
    assert list(by_layout) == ["fsdp", "zero", "about"]
    for figures in (by_layout["fsdp"], by_layout["zero"]):
        assert 1 <= figures["mezo_over_weights"] <= 1.05
        assert 1 <= figures["svrg_over_weights"] <= 1.05
        assert 4 <= figures["naive_svrg_over_weights"] <= 4.2
