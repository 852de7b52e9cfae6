"""What a training run says and records on the way, beside its steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mezo_dist.config import reader
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.runs import training
from mezo_dist.runs.load import audit, open_run
from mezo_dist.storage import trajectory
from mezo_dist.testing import write_tiny_config

OPTIONS = [
    "model.weights=bfloat16",
    "model.trainable=['*norm*']",
    "algorithm.lr=1e-3",
    "algorithm.eps=auto",
    "algorithm.annealing.divisor=4",
    "algorithm.annealing.window=1",
    "algorithm.annealing.threshold=0.1",
    "output.test=false",
    "output.export=false",
]


def test_a_division_is_said_and_a_chosen_eps_recorded_and_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_tiny_config(tmp_path, "llama", "mezo", steps=7)
    folder = training.train(reader.load(config, OPTIONS), Communicator())
    output = capsys.readouterr().out
    assert "step 5/7: the training loss has stopped falling: learning rates are 0.25 of what they were" in output
    assert output.count("has stopped falling") == 3
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    factors = [line["scalars"]["annealing/factor"] for line in lines if "annealing/factor" in line["scalars"]]
    assert factors == [1.0] * 4 + [0.25, 0.0625, 0.015625]
    header = trajectory.read(folder / trajectory.FILE).header
    assert (header.eps, header.num_train) == (5e-3, 30)
    assert header.config["algorithm"]["eps"] == "auto"
    _, text = audit(open_run(folder, None, Communicator()), Communicator())
    assert "verified 1 recorded fingerprint(s), after steps [7]" in text
