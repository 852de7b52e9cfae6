"""Joint losses: a metric of the batch as what is optimised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mezo_dist.config import reader
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.objectives.joint import joint_objective
from mezo_dist.runs import training
from mezo_dist.runs.build import build_run
from mezo_dist.storage import trajectory
from mezo_dist.testing import write_tiny_config

METRIC = ["train.objective=metric", "algorithm.lr=1e-3", "algorithm.eps=0.05", "output.test=false"]


@pytest.mark.parametrize("metric", ["accuracy", "f1", "macro-f1", "matthews"])
def test_losses_are_minus_the_metric_of_the_batch(tmp_path: Path, metric: str) -> None:
    config = reader.load(write_tiny_config(tmp_path, "opt", "mezo"), [*METRIC, f"task.metric={metric}"])
    run = build_run(config, Communicator())
    result, _ = training.evaluate_step(run, run.algorithm.init(), 0)
    batch, joint = run.batch("minibatch", 0), joint_objective(config, run.kind)
    assert joint is not None
    assert joint.is_discrete
    assert joint.each_sample == (metric == "accuracy")
    logits = torch.zeros(1, 6, 2)
    logits[0, :4, 1] = 1.0
    labels = [run.splits["train"][i].label for i in run.order.batch(0)]  # type: ignore[attr-defined]
    losses = joint.losses(logits, batch)
    loss = float(losses.mean()) if joint.each_sample else float(losses[0])
    wanted = run.kind.summarise(0.0, logits[0], batch)[metric]
    assert loss == pytest.approx(-wanted)
    if metric == "accuracy":
        assert wanted == pytest.approx(sum(map(int.__eq__, [1, 1, 1, 1, 0, 0], labels)) / 6)
        assert all(round(6 * mean, 6).is_integer() for mean in result.rounds[0].mean)


def test_the_share_of_differences_that_are_zero_is_shown(tmp_path: Path) -> None:
    path = write_tiny_config(tmp_path, "opt", "mezo")
    options = [*METRIC, "algorithm.directions=3", "output.export=false"]
    folder = training.train(reader.load(path, options), Communicator(), quiet=True)
    scalars = [json.loads(line)["scalars"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shown = [step["objective/zero_differences"] for step in scalars if "loss/train" in step]
    steps = trajectory.read(folder / "trajectory.jsonl").steps
    pairs = [list(zip(s.rounds[0].mean[0::2], s.rounds[0].mean[1::2], strict=True)) for s in steps]
    assert shown == [sum(plus == minus for plus, minus in some) / 3 for some in pairs]
    assert any(share > 0 for share in shown), "six samples often agree"


def test_people_are_told_when_nothing_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["train.objective=metric", "algorithm.eps=1e-6", "algorithm.lr=auto", "output.test=false"]
    path = write_tiny_config(tmp_path, "opt", "mezo")
    training.train(reader.load(path, [*options, "train.steps=12", "output.export=false"]), Communicator())
    said = capsys.readouterr()
    assert (said.out + said.err).count(
        "in 10 steps no loss has differed along any direction, so nothing is learnt"
    ) == 1
    assert "step 10/12" in said.out + said.err


def test_a_loss_that_changes_smoothly_has_no_such_share(tmp_path: Path) -> None:
    options = ["output.test=false", "output.export=false", "train.steps=1"]
    folder = training.train(
        reader.load(write_tiny_config(tmp_path, "opt", "mezo"), options), Communicator(), quiet=True
    )
    assert "zero_differences" not in (folder / "metrics.jsonl").read_text()


def test_ranks_meet_in_directions_per_sample_too(tmp_path: Path) -> None:
    """Accuracy is a mean over samples, so each sample may have a direction of its own."""
    options = [*METRIC, "law=lowrank", "algorithm.per_sample=true", "train.steps=1", "output.export=false"]
    path = write_tiny_config(tmp_path, "opt", "mezo")
    folder = training.train(reader.load(path, options), Communicator(), quiet=True)
    (step,) = trajectory.read(folder / "trajectory.jsonl").steps
    assert {loss for row in step.rounds[0].each for loss in row} <= {0.0, -1.0}
