"""The examples for people with a Trainer script or a loop of their own run, on one process and on two."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest

from mezo_dist.storage import trajectory
from mezo_dist.testing import write_tiny_model
from tests import forked_ranks
from tests.forked import ROOT, output_of

PATH = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("name", ["trainer", "own_loop"])
def test_they_are_short(name: str) -> None:
    assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) <= 40


@pytest.mark.assets
def test_trainer(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", "llama-tied")
    text = (ROOT / "examples" / "trainer.py").read_text()
    assert sum("# MeZO" in line for line in text.split('"""')[2].splitlines()) == 3, "three changed lines"
    command = ["examples/trainer.py", "--model", str(model), "--steps", "2", "--output", str(tmp_path / "run")]
    output = output_of(command, environment=ENVIRONMENT)
    assert "before {'eval_loss'" in output
    assert len(trajectory.read(tmp_path / "run" / "trajectory.jsonl").steps) == 2
    assert (tmp_path / "run" / "checkpoint-2" / "model.safetensors").exists()


def test_lightning(tmp_path: Path) -> None:
    if importlib.util.find_spec("pytorch_lightning") is None:
        pytest.skip("Lightning is not installed (pip install --no-deps pytorch-lightning)")
    output = output_of(["examples/lightning.py", str(tmp_path)], environment=ENVIRONMENT)
    loss = re.search(r"loss ([\d.]+) after 192 steps", output)
    assert loss, output
    assert float(loss[1]) < 0.6
    assert len(trajectory.read(tmp_path / "steps.jsonl").steps) == 192


@pytest.mark.distributed
def test_own_loop_under_accelerate_launch(tmp_path: Path) -> None:
    """Each of two processes gets its batches from accelerate, and both have the same weights."""
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--mixed_precision", "no"]
    launch += ["--num_machines", "1", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = ["-m", *launch, "examples/own_loop.py", str(tmp_path / "steps.jsonl")]
    with forked_ranks.environment() as environment:
        output = output_of(command, environment={**environment, "PYTHONPATH": PATH})
    ranks = dict(re.findall(r"rank (\d) of 2: weights (\w{16})", output))
    assert ranks.keys() == {"0", "1"}
    assert len(set(ranks.values())) == 1
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", output)]
    assert losses[-1] < losses[0] - 0.1
    assert len(trajectory.read(tmp_path / "steps.jsonl").steps) == 12 * 8
