"""Runs of the first-order baselines: from the command line, gone on with from their snapshots, and refused."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from mezo_dist import MeZO, Optimizer, cli
from mezo_dist.algorithms.first_order import SGD, AdamW
from mezo_dist.config import reader
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.engine import Engine
from mezo_dist.errors import UserError
from mezo_dist.monitoring.console import Monitor
from mezo_dist.runs import training
from mezo_dist.storage import snapshot_writer, trajectory
from mezo_dist.testing import spawn, tiny_model, write_tiny_config
from tests.parts import Parts, run_parts
from tests.run_folders import results

STEPS = 5
KINDS = {
    "adamw": ["algorithm.name=adamw", "algorithm.lr=3e-3", "algorithm.weight_decay=0.1"],
    "sgd": ["algorithm.name=sgd", "algorithm.lr=0.05", "algorithm.momentum=0.9", "algorithm.schedule.kind=linear"],
}
EVERY = pytest.mark.parametrize("kind", KINDS)
SNAPSHOTS = "output.snapshot_every=2"
ZERO = "layout.name=zero"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of every kind, in KIND/run, with snapshots after steps 2, 4 and 5."""
    root = tmp_path_factory.mktemp("first_order")
    for kind in KINDS:
        write_tiny_config(root / kind, "llama-tied", "mezo", steps=STEPS, batch_size=5, micro_batch=3)
        train(root, kind, root / kind / "run")
    return root


def options(kind: str, folder: Path, *more: str) -> list[str]:
    return [*KINDS[kind], SNAPSHOTS, "output.snapshots_kept=9", f"output.dir={folder}", *more]


def train(root: Path, kind: str, folder: Path, *more: str, comm: Communicator | None = None) -> Path:
    config = reader.load(root / kind / "config.yaml", options(kind, folder, *more))
    return training.train(config, comm or Communicator(), quiet=True)


def killed(run: Path, to: Path, num_steps: int, snapshots: Sequence[int]) -> Path:
    """A copy of a run as it would be if it had died after ``num_steps`` steps with these snapshots."""
    shutil.copytree(run, to)
    lines = (to / "trajectory.jsonl").read_bytes().splitlines(keepends=True)
    stop = next(i for i, line in enumerate(lines) if line.startswith(b'{"step":%d,' % num_steps))
    (to / "trajectory.jsonl").write_bytes(b"".join(lines[:stop]) + b'{"step":')
    for path in (to / "snapshots").iterdir():
        if int(path.name.removeprefix("step-")) not in snapshots:
            shutil.rmtree(path)
    shutil.rmtree(to / "model")
    return to


@EVERY
@pytest.mark.parametrize(("num_steps", "snapshots"), [(3, [2]), (4, [2, 4]), (4, [2]), (3, [])])
def test_a_run_goes_on_from_its_last_snapshot_with_the_same_bits(
    root: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    num_steps: int,
    snapshots: Sequence[int],
) -> None:
    folder = killed(root / kind / "run", tmp_path / "run", num_steps, snapshots)
    train(root, kind, folder, "output.if_exists=resume")
    lost = num_steps - max(snapshots, default=0)
    assert (f"the {lost} step(s) after it are taken again" in caplog.text) == bool(lost)
    assert ("there is no snapshot, only the base model" in caplog.text) == (not snapshots)
    whole = root / kind / "run"
    assert results(folder) == results(whole)
    assert (folder / "trajectory.jsonl").read_bytes() == (whole / "trajectory.jsonl").read_bytes()
    for file in ("model/model.safetensors", "snapshots/step-00000005/rank-00000.safetensors"):
        assert (folder / file).read_bytes() == (whole / file).read_bytes(), file


def everywhere(comm: Communicator, root: Path, folder: Path) -> Parts:
    """On two processes: the run that was killed goes on with shards, and so do runs on layout zero."""

    def go_on(layout: str, source: Path, name: str, *more: str) -> None:
        if comm.rank == 0:
            killed(source, folder / name, 3, [2])
        comm.synchronize("copied")
        train(root, "adamw", folder / name, "output.if_exists=resume", layout, *more, comm=comm)

    def anew(name: str, *more: str) -> None:
        train(root, "adamw", folder / name, *more, comm=comm)

    def apart() -> str:
        """Each rank has a folder that the other does not see."""
        (folder / f"apart-{comm.rank}").mkdir()
        before = Path.cwd()
        os.chdir(folder / f"apart-{comm.rank}")
        try:
            train(root, "adamw", Path("run"), comm=comm)
        except UserError as error:
            return str(error)
        finally:
            os.chdir(before)
        return ""

    gc.freeze()  # DeepSpeed collects garbage as it makes an engine
    halves = [ZERO, "model.weights=bfloat16"]
    return run_parts(
        {
            "fsdp": lambda: go_on("layout.name=fsdp", root / "adamw" / "run", "fsdp"),
            "zero": lambda: go_on(ZERO, root / "adamw" / "run", "zero"),
            "zero whole": lambda: anew("zero whole", ZERO),
            "zero resumed": lambda: go_on(ZERO, folder / "zero whole", "zero resumed"),
            "bf16 whole": lambda: anew("bf16 whole", *halves),
            "apart": apart,
            "bf16 resumed": lambda: go_on(ZERO, folder / "bf16 whole", "bf16 resumed", halves[1]),
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("everywhere")


@pytest.fixture(scope="module")
def parts(root: Path, folder: Path) -> Parts:
    return spawn(everywhere, 2, root, folder, timeout_s=500)[0]


def check_equal_but_for_rounding(root: Path, folder: Path) -> None:
    """Sums of gradients are added in another order on two processes, so that the last bits of losses may differ."""
    whole, resumed = (trajectory.read(path / "trajectory.jsonl").steps for path in (root / "adamw" / "run", folder))
    assert resumed[:2] == whole[:2]
    assert [s.rounds[0].mean[0] for s in resumed] == pytest.approx([s.rounds[0].mean[0] for s in whole], rel=1e-4)
    after = results(folder)["after"]["loss"]
    assert after == pytest.approx(results(root / "adamw" / "run")["after"]["loss"], rel=1e-4)
    assert after != results(root / "adamw" / "run")["before"]["loss"]


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["fsdp", "zero"])
def test_a_run_goes_on_with_shards_on_two_processes(root: Path, folder: Path, parts: Parts, layout: str) -> None:
    assert parts[layout] is None
    check_equal_but_for_rounding(root, folder / layout)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["zero", "bf16"])
def test_a_run_on_layout_zero_goes_on_with_the_same_bits(folder: Path, parts: Parts, kind: str) -> None:
    """In bfloat16, too: DeepSpeed's weights in float32 are in the snapshot."""
    assert parts[f"{kind} resumed"] is None
    whole, resumed = folder / f"{kind} whole", folder / f"{kind} resumed"
    assert results(resumed) == results(whole)
    assert (resumed / "trajectory.jsonl").read_bytes() == (whole / "trajectory.jsonl").read_bytes()
    for rank in (0, 1):
        file = f"snapshots/step-00000005/rank-0000{rank}.safetensors"
        assert (resumed / file).read_bytes() == (whole / file).read_bytes()
    names = json.loads((whole / "snapshots/step-00000005/snapshot.json").read_text())["weights"]
    assert ("optimizer:master:model.norm.weight" in names) == (kind == "bf16")


@pytest.mark.distributed
def test_a_run_on_layout_zero_goes_on_without_shards(root: Path, folder: Path, parts: Parts, tmp_path: Path) -> None:
    """Its snapshots are those of other layouts, but for DeepSpeed's weights in float32 of bfloat16 ones."""
    assert parts["bf16 resumed"] is None
    killed(folder / "zero whole", tmp_path / "run", 3, [2])
    train(root, "adamw", tmp_path / "run", "output.if_exists=resume")
    losses = results(tmp_path / "run")["after"]["loss"]
    assert losses == pytest.approx(results(folder / "zero whole")["after"]["loss"], rel=1e-4)
    killed(folder / "bf16 whole", tmp_path / "half", 3, [2])
    other = r"another kind of weights \(bfloat16 of float32 \(DeepSpeed\), by adamw of torch.* there, bfloat16, by"
    with pytest.raises(UserError, match=other):
        train(root, "adamw", tmp_path / "half", "output.if_exists=resume", "model.weights=bfloat16")


@pytest.mark.distributed
def test_a_folder_that_ranks_do_not_share_is_refused_before_training(folder: Path, parts: Parts) -> None:
    """No rank's snapshot would be whole."""
    assert "output.dir: rank(s) [1] do not see run of rank 0" in parts["apart"]
    assert not list((folder / "apart-0").iterdir())


def test_a_damaged_optimiser_state_is_passed_over(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = killed(root / "adamw" / "run", tmp_path / "run", 4, [2, 4])
    index = folder / "snapshots/step-00000004/snapshot.json"
    content = json.loads(index.read_text())
    del content["weights"]["optimizer:exp_avg:model.norm.weight"]
    index.write_text(json.dumps(content))
    train(root, "adamw", folder, "output.if_exists=resume")
    assert "optimizer:exp_avg:model.norm.weight is only in one of the two" in caplog.text
    assert results(folder) == results(root / "adamw" / "run")


@pytest.mark.parametrize("export", [True, False])
def test_a_run_whose_last_weights_cannot_be_saved_is_no_success(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, export: bool
) -> None:
    """They are nowhere else, but for the export; once there is room, steps since the last snapshot are taken again."""

    def full(folder: Path, engine: Engine, step: int, comm: Communicator, **options: Any) -> Path:
        if step == STEPS:
            raise UserError("no room")
        return save(folder, engine, step, comm, **options)

    save, folder = snapshot_writer.save_snapshot, tmp_path / "run"
    monkeypatch.setattr(snapshot_writer, "save_snapshot", full)
    given = [f"--{option}" for option in options("sgd", folder, f"output.export={json.dumps(export)}")]
    status, text = run_cli(capsys, "train", root / "sgd" / "config.yaml", *given)
    assert status == 2
    assert f"output.dir: {folder} has no snapshot of the weights after the last step" in text
    assert "in the last snapshot" not in text
    assert ("/model alone." if export else "The weights are not saved.") in text.replace("\n", "")
    monkeypatch.undo()
    train(root, "sgd", folder, "output.if_exists=resume")
    assert results(folder) == results(root / "sgd" / "run")


# The command line


def run_cli(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_the_command_line(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, folder = root / "adamw" / "config.yaml", tmp_path / "run"
    given = [f"--{option}" for option in options("adamw", folder, "train.gradient_checkpointing=true")]
    status, text = run_cli(capsys, "train", config, *given)
    assert status == 0, text
    assert "by back-propagation, in 5 steps" in text
    assert "exact gradients, by back-propagation, with blocks computed again" in text
    assert results(folder)["weights"] == results(root / "adamw" / "run")["weights"], "it only takes longer"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["scalars"] for line in lines if "loss/train" in line["scalars"]]
    assert len(steps) == STEPS
    assert all(step["gradient_norm"] > 0 and step["lr"] == 3e-3 for step in steps)
    header = trajectory.read(folder / "trajectory.jsonl").header
    assert header.weights == "float32, by adamw of torch, from snapshots alone"

    status, text = run_cli(capsys, "evaluate", folder)
    assert status == 0, text
    assert f"{results(folder)['after']['loss']:.4f}"[:5] in text
    status, text = run_cli(capsys, "export", folder, tmp_path / "exported")
    assert status == 0, text
    exported, model = (path / "model.safetensors" for path in (tmp_path / "exported", folder / "model"))
    assert exported.read_bytes() == model.read_bytes()
    status, text = run_cli(capsys, "export", folder, tmp_path / "base", "--step", 0)
    assert status == 0, text
    assert (tmp_path / "base" / "model.safetensors").read_bytes() != model.read_bytes()
    status, text = run_cli(capsys, "evaluate", folder, "--step", 3)
    assert status == 2
    assert "there is none of step 3 that can be used (there: step-00000002, step-00000004, step-00000005)" in text
    status, text = run_cli(capsys, "replay", folder)
    assert status == 2
    assert "cannot be rebuilt from its losses" in text
    assert run_cli(capsys, "report", folder)[0] == 0


def test_without_snapshots_the_last_weights_are_saved_all_the_same(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(root, "sgd", tmp_path / "run", "output.snapshot_every=0", "output.export=false")
    assert [path.name for path in (folder / "snapshots").iterdir()] == ["step-00000005"]
    shutil.rmtree(folder / "snapshots")
    status, text = run_cli(capsys, "evaluate", folder)
    assert status == 2
    assert "there is none of the last step that can be used (there: none)" in text


def test_passes_are_counted(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A backward pass as two, and computing blocks again as one."""
    counted: list[int] = []
    step = Monitor.step

    def counting(monitor: Monitor, number: int, scalars: dict[str, float], *, samples: int) -> None:
        counted.append(samples)
        step(monitor, number, scalars, samples=samples)

    monkeypatch.setattr(Monitor, "step", counting)
    train(root, "sgd", tmp_path / "run", "train.steps=1")
    train(root, "sgd", tmp_path / "other", "train.steps=1", "train.gradient_checkpointing=true")
    assert counted == [3 * 5, 4 * 5]


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.objective=metric"], "train.objective: metric has no gradient, which algorithm.name: adamw needs"),
        (["law=lowrank"], "law: is about random directions, of which algorithm.name: adamw has none"),
        (
            ["layout.name=zero", "model.compute=bfloat16"],
            "model.compute: DeepSpeed's engine (layout.name: zero) computes gradients for algorithm.name: adamw in "
            "the dtype of model.weights; leave it out and set model.weights to bfloat16",
        ),
        (["layout.name=fsdp", "layout.gather=bfloat16"], "layout.gather: must be left out for algorithm.name: adamw"),
        (
            ["train.gradient_checkpointing=true", "model.peft.method=prefix"],
            "train.gradient_checkpointing: a block that is computed again would see its keys twice after the prefix of",
        ),
        (["algorithm.eps=1e-3"], "algorithm.eps is a setting of mezo and mezo-svrg and mezo-svrg-released, not of"),
        (["algorithm.directions=2"], "algorithm.directions is a setting of mezo and mezo-svrg, not of adamw"),
        (["algorithm.momentum=0.9"], "algorithm.momentum is a setting of mezo"),
        (
            ["algorithm.name=mezo", "train.gradient_checkpointing=true"],
            "train.gradient_checkpointing: is for algorithm.name: sgd and adamw",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_named(root: Path, changes: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        reader.load(root / "adamw" / "config.yaml", ["algorithm.name=adamw", *changes])
    assert message in str(error.value)


def test_rewards_have_no_gradient(tmp_path: Path) -> None:
    path = write_tiny_config(tmp_path, "llama", "adamw")
    config: dict[str, Any] = yaml.safe_load(path.read_text())
    config["task"] |= {"kind": "generation", "completion": "{{ text }}", "prompt": "It was", "metric": "reward"}
    for name in ("labels", "plain"):
        del config["task"][name]
    config |= {"reward": {"function": "rewards.py:any"}, "train": {"objective": "reward"}}
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"train\.objective: reward has no gradient, which algorithm\.name: adamw"):
        reader.load(path)


def test_a_model_without_blocks_cannot_be_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mezo_dist.engines.units.find_blocks", lambda *_: [])
    write_tiny_config(tmp_path / "sgd", "llama", "mezo", steps=1)
    with pytest.raises(UserError, match=r"train\.gradient_checkpointing: the model has no blocks"):
        train(tmp_path, "sgd", tmp_path / "run", "train.gradient_checkpointing=true")


@pytest.mark.parametrize("settings", [SGD(), AdamW()])
def test_loops_of_ones_own_use_torch(settings: Any) -> None:
    with pytest.raises(UserError, match=r"algorithm: use torch\.optim for a gradient; give settings such as MeZO"):
        Optimizer(tiny_model("llama"), settings)
    Optimizer(tiny_model("llama"), MeZO()).close()
