"""Monitors through packages that not everybody has: what is asked of them, and that none can end a run."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from mezo_dist.config import reader
from mezo_dist.config.schema import RunConfig
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.errors import UserError
from mezo_dist.monitoring import curve_writers
from mezo_dist.monitoring.console import Monitor
from mezo_dist.runs import dry_run, training
from mezo_dist.testing import write_tiny_config
from tests.monitoring.consoles import plain

SETTINGS = {"seed": 1, "train": {"steps": 4, "batch": [1, 2]}, "model": {"name": "m" * 600}}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts modules in place of a package, for the module of ours that calls it."""
    ours = {"wandb": "wandb_run", "mlflow": "mlflow_run"}

    def put(package: str, **modules: Any) -> None:
        monkeypatch.delitem(sys.modules, f"mezo_dist.monitoring.{ours[package]}", raising=False)
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name.replace("__", "."), module)

    yield put
    for module in ours.values():
        sys.modules.pop(f"mezo_dist.monitoring.{module}", None)


def a_run(folder: Path, monitor: str, first_step: int | None, *steps: int) -> None:
    with Monitor.open(
        folder, is_main=True, num_steps=4, first_step=first_step, monitors=[monitor], console=plain()
    ) as opened:
        opened.settings(SETTINGS)
        for step in steps:
            opened.result("test", step, {"loss": step / 4})


def fake_wandb(calls: list[Any]) -> Any:
    def init(**arguments: Any) -> Any:
        calls.append(("init", arguments))
        return SimpleNamespace(
            url="https://wandb.example/run",
            config=SimpleNamespace(update=lambda settings, **how: calls.append(("config", settings, how))),
            log=lambda scalars, step: calls.append(("log", scalars, step)),
            finish=lambda exit_code: calls.append(("finish", exit_code)),
        )

    class Settings(SimpleNamespace):
        model_fields = ("init_timeout", "console", "silent")

    return SimpleNamespace(init=init, Settings=Settings)


def test_what_wandb_is_asked(tmp_path: Path, fake: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    fake("wandb", wandb=fake_wandb(calls))
    monkeypatch.setenv("WANDB_PROJECT", "films")
    a_run(tmp_path / "run", "wandb", None, 1, 2)
    (_, arguments), *others = calls
    assert vars(arguments.pop("settings")) == {"init_timeout": 60.0, "console": "off", "silent": True}
    known = arguments.pop("id")
    assert arguments == {"project": "films", "name": "run", "resume": "allow", "dir": str(tmp_path / "run")}
    assert others == [
        ("config", SETTINGS, {"allow_val_change": True}),
        ("log", {"eval/test/loss": 0.25}, 1),
        ("log", {"eval/test/loss": 0.5}, 2),
        ("finish", 0),
    ]
    calls.clear()
    a_run(tmp_path / "run", "wandb", 2, 3)
    assert calls[0][1]["id"] == known, "a run that goes on is the same there"
    calls.clear()
    a_run(tmp_path / "run", "wandb", 0, 1)
    assert calls[0][1]["id"] == known, "so is one that was stopped before its first step"
    a_run(tmp_path / "run", "wandb", None, 1)
    assert calls[4][1]["id"] != known, "a new run is not"


def fake_mlflow(calls: list[Any], known: set[str]) -> dict[str, Any]:
    class MlflowError(Exception):
        error_code = "RESOURCE_DOES_NOT_EXIST"

    class Client:
        def get_experiment_by_name(self, name: str) -> Any:
            calls.append(("experiment", name))

        def create_experiment(self, name: str) -> str:
            return "7"

        def create_run(self, experiment: str, run_name: str) -> Any:
            calls.append(("run", experiment, run_name))
            known.add(name := f"id{len(known)}")
            return SimpleNamespace(info=SimpleNamespace(run_id=name))

        def update_run(self, run_id: str, status: str) -> None:
            if run_id not in known:
                raise MlflowError
            calls.append(("goes on", run_id, status))

        def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
            calls.append((run_id, [(m.key, m.value, m.step) for m in metrics], [(p.key, p.value) for p in params]))

        def get_metric_history(self, run_id: str, key: str) -> list[Any]:
            return [SimpleNamespace(step=1)] * (run_id == "id0")

        def set_terminated(self, run_id: str, status: str) -> None:
            calls.append((run_id, status))

    entities = SimpleNamespace(
        Metric=lambda key, value, time, step: SimpleNamespace(key=key, value=value, step=step),
        Param=lambda key, value: SimpleNamespace(key=key, value=value),
    )
    return {
        "mlflow": SimpleNamespace(),
        "mlflow__entities": entities,
        "mlflow__exceptions": SimpleNamespace(MlflowException=MlflowError),
        "mlflow__tracking": SimpleNamespace(MlflowClient=Client),
    }


def test_what_mlflow_is_asked(tmp_path: Path, fake: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    known: set[str] = set()
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    fake("mlflow", **fake_mlflow(calls, known))
    a_run(tmp_path / "run", "mlflow", None, 1)
    params = [("seed", "1"), ("train.steps", "4"), ("train.batch", "[1, 2]"), ("model.name", "m" * 500)]
    assert calls == [
        ("experiment", "mezo_dist"),
        ("run", "7", "run"),
        ("id0", [], params),
        ("id0", [("eval/test/loss", 0.25, 1)], []),
        ("id0", "FINISHED"),
    ]
    calls.clear()
    a_run(tmp_path / "run", "mlflow", 0, 1, 2)  # step 1 is taken again
    assert calls == [("goes on", "id0", "RUNNING"), ("id0", [("eval/test/loss", 0.5, 2)], []), ("id0", "FINISHED")]
    calls.clear()
    known.clear()  # another server
    known.add("id9")
    a_run(tmp_path / "run", "mlflow", 2, 3)
    assert [call[0] for call in calls] == ["experiment", "run", "id1", "id1", "id1"]


def test_a_run_that_fails_is_not_finished_there(tmp_path: Path, fake: Callable[..., None]) -> None:
    calls: list[Any] = []
    fake("wandb", wandb=fake_wandb(calls))
    with (
        pytest.raises(KeyboardInterrupt),
        Monitor.open(tmp_path, is_main=True, num_steps=4, monitors=["wandb"], console=plain()),
    ):
        raise KeyboardInterrupt
    assert calls[-1] == ("finish", 1)


@pytest.mark.parametrize("when", ["init", "log", "finish"])
def test_a_service_that_is_gone_is_one_warning(
    when: str, tmp_path: Path, fake: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    module = fake_wandb([])

    def gone(*args: Any, **names: Any) -> Any:
        raise ConnectionError("no route to host")

    real = module.init
    module.init = gone if when == "init" else lambda **arguments: SimpleNamespace(**{**vars(real()), when: gone})
    fake("wandb", wandb=module)
    a_run(tmp_path, "wandb", 0, 1, 2, 3)
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith("monitor: wandb ")
    assert "ConnectionError: no route to host" in line
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_nobody_waits_for_a_service_that_hangs(
    tmp_path: Path, fake: Callable[..., None], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curve_writers, "LAST_WAIT_S", 0.2)
    monkeypatch.setattr(curve_writers, "MOST_WAITING", 5)
    wakes = threading.Event()
    module = fake_wandb([])
    module.init = lambda **arguments: wakes.wait(60)
    fake("wandb", wandb=module)
    a_run(tmp_path, "wandb", 0, 1)
    a_run(tmp_path, "wandb", 0, *range(1, 9))
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    wakes.set()
    assert len(lines) == 2
    assert "did not take the end of the curves in 0 s" in lines[0]
    assert "left 5 calls unanswered" in lines[1]


@pytest.mark.parametrize("content", ["{", '{"wandb": "../../etc"}', '{"wandb": 7}', "[]", "[" * 10**5])
def test_ids_that_are_none_make_a_new_run(tmp_path: Path, fake: Callable[..., None], content: str) -> None:
    calls: list[Any] = []
    fake("wandb", wandb=fake_wandb(calls))
    (tmp_path / "monitors.json").write_text(content)
    a_run(tmp_path, "wandb", 2, 3)
    assert len(calls[0][1]["id"]) == 16
    assert json.loads((tmp_path / "monitors.json").read_text()) == {"wandb": calls[0][1]["id"]}


@pytest.mark.parametrize("work", [training.train, dry_run.try_out])
def test_a_package_that_is_missing_is_said_before_the_model_is_loaded(
    tmp_path: Path, work: Callable[[RunConfig, Communicator], object]
) -> None:
    config = reader.load(write_tiny_config(tmp_path), ["monitor=[csv, wandb]"])
    real = importlib.util.find_spec
    with (
        mock.patch.object(importlib.util, "find_spec", lambda name: None if name == "wandb" else real(name)),
        mock.patch.object(training, "build_run", side_effect=AssertionError("loaded")),
        mock.patch.object(dry_run, "build_run", side_effect=AssertionError("loaded")),
        pytest.raises(UserError, match=r"monitor: wandb is not installed: pip install wandb"),
    ):
        work(config, Communicator())


def test_a_run_writes_what_it_is_told_to(tmp_path: Path) -> None:
    config = reader.load(write_tiny_config(tmp_path, steps=1), ["monitor=[csv]", "output.export=false"])
    folder = training.train(config, Communicator(), quiet=True)
    assert (folder / "metrics.csv").read_text().startswith("step,eval/test/loss,eval/test/accuracy")
    assert not (folder / "tensorboard").exists()


# With the packages themselves (pip install 'mezo_dist[monitors]'; CI does not have them)


@pytest.mark.filterwarnings("default")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    a_run(tmp_path, "wandb", 0, 1, 2)
    a_run(tmp_path, "wandb", 2, 3)
    known = json.loads((tmp_path / "monitors.json").read_text())["wandb"]
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*-{known}/run-{known}.wandb"))
    assert len(files) == 2
    content = b"".join(path.read_bytes() for path in files)
    assert content.count(b"eval/test/loss") >= 3
    assert b"batch" in content


@pytest.mark.filterwarnings("default")
def test_mlflow_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "server").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    a_run(tmp_path / "run", "mlflow", 0, 1, 2)
    a_run(tmp_path / "run", "mlflow", 2, 3)
    known = json.loads((tmp_path / "run" / "monitors.json").read_text())["mlflow"]
    client = MlflowClient()
    points = client.get_metric_history(known, "eval/test/loss")
    assert [(point.step, point.value) for point in points] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    run = client.get_run(known)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.steps"] == "4"
