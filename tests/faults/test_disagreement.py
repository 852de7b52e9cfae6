"""Ranks that disagree, each really caused: other settings, data or code, another direction, a flipped bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mezo_dist.storage import snapshots
from mezo_dist.testing import write_tiny_data
from tests.faults.jobs import arguments, run, steps_of
from tests.faults.outcomes import finish

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    ("what", "option"), [("config", "--algorithm.lr=7e-5"), ("config", "--seed=1"), ("data", "--task.data={other}")]
)
def test_a_rank_that_starts_with_something_else(root: Path, tmp_path: Path, what: str, option: str) -> None:
    write_tiny_data(tmp_path / "other.jsonl", seed=1)
    more = {1: [option.format(other=tmp_path / "other.jsonl")]}
    codes, output = run(tmp_path, 2, arguments(root, tmp_path / "run"), more=more)
    assert codes == [2, 2], output
    assert output.count(" of rank(s) [1] differs from rank 0's; all ranks must run the same") == 2
    assert f"error: {what} of rank" in output or what == "data"
    assert not (tmp_path / "run" / "trajectory.jsonl").exists()


@dataclass(frozen=True)
class OtherCode:
    """A rank on which the package's sources are not the same."""

    rank: int

    def install(self) -> None:
        from mezo_dist.runs import model

        setattr(model, "code_digest", lambda: "another checkout")  # noqa: B010 (it is another module's)


def test_a_rank_with_other_code(root: Path, tmp_path: Path) -> None:
    codes, output = run(tmp_path, 2, arguments(root, tmp_path / "run"), OtherCode(1))
    assert codes == [2, 2], output
    assert output.count("error: code of mezo_dist of rank(s) [1] differs from rank 0's") == 2


@dataclass(frozen=True)
class OtherDirection:
    """A rank that takes another direction in its sixth step: a fault of software or memory."""

    rank: int

    def install(self) -> None:
        from mezo_dist.algorithms.base import Problem

        real = Problem.direction_seed

        def direction_seed(problem: Problem, step: int, index: int = 0) -> int:
            return real(problem, step, index) ^ (step == 5)

        setattr(Problem, "direction_seed", direction_seed)  # noqa: B010 (mypy refuses to assign methods)


@dataclass(frozen=True)
class FlippedBit:
    """A rank on which one bit of one weight changes in the sixth step."""

    rank: int

    def install(self) -> None:
        from mezo_dist.engines.engine import Engine

        real, calls = Engine.advance, [0]

        def advance(engine: Engine, *args: Any) -> None:
            real(engine, *args)
            calls[0] += 1
            if calls[0] == 6:
                next(iter(engine.shards())).tensor.view(-1)[:1].view(torch.int32).bitwise_xor_(1)

        setattr(Engine, "advance", advance)  # noqa: B010 (mypy refuses to assign methods)


def test_a_rank_that_falls_out_of_step_is_named(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codes, output = run(tmp_path, 3, arguments(root, tmp_path / "run"), OtherDirection(2))
    assert 0 not in codes
    for rank in range(3):
        assert f"rank(s) [2] evaluate another round than the other ranks (seen on rank {rank}, " in output
    assert "step 6): step, seeds or settings differ" in output
    assert len(steps_of(tmp_path / "run")) == 5
    finish(root, tmp_path / "run", capsys)


def test_weights_that_differ_are_found_before_they_are_saved(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes, output = run(tmp_path, 2, arguments(root, tmp_path / "run"), FlippedBit(1))
    assert codes == [2, 2]
    assert "error: weights after step 8 of rank(s) [1] differs from rank 0's" in output
    assert [p.name for p in snapshots.snapshots(tmp_path / "run" / "snapshots")] == ["step-00000004"]
