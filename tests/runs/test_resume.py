"""A fine-tuned model is its base model plus the trajectory: a run that was cut short goes on as if nothing had been,
and any of its models can be made again."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from mezo_dist import cli
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.errors import UserError
from mezo_dist.runs import build, training
from mezo_dist.runs.export import export_model
from mezo_dist.storage import replay as storage_replay
from mezo_dist.storage import trajectory
from mezo_dist.storage.replay import replay_steps
from mezo_dist.storage.trajectory import Step
from mezo_dist.storage.trajectory_writer import TrajectoryWriter
from tests.cases import RESUMED
from tests.run_folders import loaded_run, results
from tests.runs.cut_short import STEPS, TORN, killed, load, train_undisturbed


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Undisturbed runs, each in NAME/run."""
    root = tmp_path_factory.mktemp("resume")
    train_undisturbed(root, RESUMED)
    return root


every_run = pytest.mark.parametrize("name", RESUMED)


@pytest.mark.parametrize(
    ("name", "num_steps", "torn"),
    [
        *((name, 4, TORN) for name in RESUMED),  # of mezo-svrg: in the middle between two anchors
        ("mezo-svrg", 3, b""),  # right before an anchor
        ("mezo-svrg", 0, TORN),
        ("mezo-svrg", STEPS, b""),  # before the last evaluation
    ],
)
def test_a_run_cut_short_ends_as_the_undisturbed_one(
    root: Path, tmp_path: Path, name: str, num_steps: int, torn: bytes
) -> None:
    folder = killed(root, name, num_steps, tmp_path / "run", torn)
    training.train(load(root, name, f"output.dir={folder}", "output.if_exists=resume"), Communicator())
    whole = root / name / "run"
    assert (folder / "trajectory.jsonl").read_bytes() == (whole / "trajectory.jsonl").read_bytes()
    assert results(folder) == results(whole)
    for file in ("model/model.safetensors", "model/config.json", "config.yaml"):
        assert (folder / file).read_bytes() == (whole / file).read_bytes(), file


@pytest.mark.parametrize("terms_at_once", [storage_replay.TERMS_AT_ONCE, 3])
def test_a_stored_anchor_is_kept_again_or_comes_with_a_snapshot(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terms_at_once: int
) -> None:
    """The steps 0 and 5 are anchors. The run dies in step 5 or in 6, and goes on from the weights after 4
    steps, or with anchors left out, from the base."""
    monkeypatch.setattr(storage_replay, "TERMS_AT_ONCE", terms_at_once)
    options = [f"output.dir={tmp_path / 'run'}", "output.snapshot_every=4", "output.export=false"]
    training.train(load(root, "stored", *options), Communicator())
    lines = (tmp_path / "run" / "trajectory.jsonl").read_bytes().splitlines(keepends=True)
    for done, snapshot in ((5, 4), (6, 4), (5, 0), (6, 0)):
        stop = next(i for i, line in enumerate(lines) if line.startswith(b'{"step":%d,' % done))
        (tmp_path / "run" / "trajectory.jsonl").write_bytes(b"".join(lines[:stop]))
        if not snapshot:
            shutil.rmtree(tmp_path / "run" / "snapshots", ignore_errors=True)
        training.train(load(root, "stored", *options, "output.if_exists=resume"), Communicator())
        assert results(tmp_path / "run") == results(root / "stored" / "run")
        diary = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
        resumed = [event for event in map(json.loads, diary) if event["event"] == "resumed"]
        assert resumed[-1]["snapshot"] == snapshot


def test_a_resumed_run_counts_the_steps_that_were_skipped(root: Path, tmp_path: Path) -> None:
    """Two were skipped in a row before the run died; one more is too much for it."""
    folder = killed(root, "mezo", 4, tmp_path / "run", b"")
    recorded = trajectory.read(folder / "trajectory.jsonl")
    writer = TrajectoryWriter.go_on(folder / "trajectory.jsonl", recorded)
    for number in (4, 5):
        writer.append(Step(number, (), skipped="a loss is not finite"))
    writer.close()
    run = build.build_run(load(root, "mezo"), Communicator())
    recorded = trajectory.read(folder / "trajectory.jsonl")
    progress = replay_steps(run.engine, 0, run.algorithm, recorded, 6)
    assert (progress.step, progress.skipped, progress.skipped_in_a_row) == (6, 2, 2)


def test_what_changes_no_result_may_differ(root: Path, tmp_path: Path) -> None:
    folder = killed(root, "mezo", STEPS, tmp_path / "run", b"")
    options = ["output.if_exists=resume", "output.export=false", "distributed.timeout_s=33"]
    training.train(load(root, "mezo", f"output.dir={folder}", *options), Communicator())
    assert results(folder) == results(root / "mezo" / "run")
    assert not (folder / "model").exists()


def test_a_file_torn_inside_its_header_is_no_run_yet(root: Path, tmp_path: Path) -> None:
    """Headers appear whole or not at all, but a copy of a run folder may have been cut short."""
    folder = killed(root, "mezo", 0, tmp_path / "run", b"")
    path = folder / "trajectory.jsonl"
    path.write_bytes(path.read_bytes()[:100])
    training.train(load(root, "mezo", f"output.dir={folder}", "output.if_exists=resume"), Communicator())
    assert results(folder) == results(root / "mezo" / "run")


# Evaluate and export


@pytest.mark.parametrize("name", ["auto rate", "auto rates, calibrated"])
def test_the_run_that_finds_its_rate_has_looked_back(root: Path, name: str) -> None:
    """What the cases of this file and of others rest on."""
    steps = trajectory.read(root / name / "run" / "trajectory.jsonl").steps
    assert [step.step for step in steps if len(step.rounds) > 1] == [4]


@every_run
def test_base_and_trajectory_give_the_trained_weights(root: Path, name: str) -> None:
    run = loaded_run(root / name / "run")
    assert run.step == STEPS
    assert run.engine.fingerprint() == results(root / name / "run")["weights"] != run.loaded.base_fingerprint
    exported = _load(root / name / "run" / "model")
    for key, weight in run.pretrained.model.named_parameters():
        assert torch.equal(exported.get_parameter(key), weight.cpu()), key


@every_run
def test_replay_verifies_a_run_and_makes_its_model(
    root: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """From base and trajectory alone: the data is gone."""
    data, away = root / name / "data.jsonl", tmp_path / "away"
    data.rename(away)
    try:
        assert cli.main(["replay", str(root / name / "run"), "--export", str(tmp_path / "model")]) == 0
        assert cli.main(["replay", str(root / name / "run"), "--step", "3"]) == 0
    finally:
        away.rename(data)
    whole, part = capsys.readouterr().out.split(f"wrote {tmp_path / 'model'}\n")
    assert f"+ {STEPS} steps (0 skipped) in " in whole
    assert f"fingerprint {results(root / name / 'run')['weights']}\n" in whole
    assert f"verified 1 recorded fingerprint(s), after steps [{STEPS}]" in whole
    assert "+ 3 steps" in part
    assert "verified 0 recorded" in part
    again, first = tmp_path / "model" / "model.safetensors", root / name / "run" / "model" / "model.safetensors"
    assert again.read_bytes() == first.read_bytes()


@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_any_step_can_be_made_again(root: Path, num_steps: int) -> None:
    run = loaded_run(root / "bf16" / "run", num_steps)
    live = build.build_run(load(root, "bf16"), Communicator())
    state = live.algorithm.init()
    for number in range(num_steps):
        result, _ = training.evaluate_step(live, state, number)
        training.apply_step(live, result)
        assert result.update is not None
        state = result.update.state
    assert run.engine.fingerprint() == live.engine.fingerprint()
    assert (run.engine.fingerprint() == run.loaded.base_fingerprint) == (num_steps == 0)


def test_step_0_is_the_base_model(root: Path, tmp_path: Path) -> None:
    run = loaded_run(root / "mezo-svrg" / "run", 0)
    export_model(run.engine, run.pretrained.tokenizer, tmp_path / "base", Communicator())
    base, exported = _load(root / "mezo-svrg" / "model"), _load(tmp_path / "base")
    for key, weight in base.named_parameters():
        assert torch.equal(exported.get_parameter(key), weight), key


@pytest.mark.parametrize("number", [-1, STEPS + 1])
def test_a_step_that_there_is_not_is_an_error(root: Path, number: int) -> None:
    with pytest.raises(UserError, match=f"--step {number}: .* has {STEPS} steps"):
        loaded_run(root / "mezo" / "run", number)


def _load(folder: Path) -> nn.Module:
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    model: nn.Module = getattr(transformers, name).from_pretrained(folder)
    return model


@pytest.mark.parametrize("name", ["mezo-svrg", "bf16"])
def test_an_exported_folder_loads_with_equal_logits(root: Path, tmp_path: Path, name: str) -> None:
    """As people will use it: through transformers alone, with the tokeniser that lies beside it."""
    run = loaded_run(root / name / "run")
    export_model(run.engine, run.pretrained.tokenizer, tmp_path / "model", Communicator())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    model = run.pretrained.model
    ids = tokenizer("a dull slow film . It was", return_tensors="pt")["input_ids"].to(model.device)
    run.evaluator.forward._head_slice.detach()  # type: ignore[attr-defined]
    with torch.no_grad():
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").to(model.device)
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_an_export_that_fails_leaves_no_folder(root: Path, tmp_path: Path) -> None:
    run = loaded_run(root / "mezo" / "run", 0)
    with (
        full_disk(),
        pytest.raises(UserError, match=r"export to .*model failed: .*; the run folder is as it was"),
    ):
        export_model(run.engine, run.pretrained.tokenizer, tmp_path / "model", Communicator())
    assert not (tmp_path / "model").exists()


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file can grow beyond 16 KiB. No longer than needed: the log that pytest writes to may be a file too."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 * 1024, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
