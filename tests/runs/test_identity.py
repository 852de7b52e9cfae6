"""A run is its settings, base weights, model config, tokenizer and encoded data: with others it does not go on."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mezo_dist.config import reader
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.errors import UserError
from mezo_dist.runs import load, training
from mezo_dist.runs.replay import check_header
from mezo_dist.storage import trajectory
from mezo_dist.testing import write_tiny_config
from tests.run_folders import loaded_run

OPTIONS = ["output.test=false", "output.export=false", "train.full_size=12"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests put back what they change beside it."""
    root = tmp_path_factory.mktemp("identity")
    training.train(reader.load(write_tiny_config(root, steps=2), OPTIONS), Communicator())
    return root


def rows(change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Callable[[Path], None]:
    """A change of the data; size and time of the file stay, should the number of rows do."""

    def apply(root: Path) -> None:
        path = root / "data.jsonl"
        before = path.stat()
        lines = change([json.loads(line) for line in path.read_text().splitlines()])
        path.write_text("".join(json.dumps(row) + "\n" for row in lines))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    return apply


def edited(name: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """A change of a JSON file of the model."""

    def apply(root: Path) -> None:
        content = json.loads((root / "model" / name).read_text())
        change(content)
        (root / "model" / name).write_text(json.dumps(content))

    return apply


def swap_tokens(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["film"], vocabulary["movie"] = vocabulary["movie"], vocabulary["film"]


MODEL = "model config, saved buffers or code"
CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "labels flipped": (rows(lambda all_rows: [r | {"label": 1 - r["label"]} for r in all_rows]), "train split"),
    "rows reversed": (rows(lambda all_rows: all_rows[::-1]), "train split"),
    "rows added": (rows(lambda all_rows: [*all_rows, *all_rows[:5]]), "train split"),
    "tokens swapped": (edited("tokenizer.json", swap_tokens), "tokenizer"),
    "another activation": (
        edited("config.json", lambda c: c.update(hidden_act="gelu")),
        "model config, saved buffers or code",
    ),
    "another epsilon": (
        edited("config.json", lambda c: c.update(rms_norm_eps=1e-3)),
        "model config, saved buffers or code",
    ),
}


@contextlib.contextmanager
def changed(root: Path, change: Callable[[Path], None]) -> Iterator[None]:
    files = [root / "data.jsonl", *(root / "model").glob("*.json")]
    kept = {path: (path.read_bytes(), path.stat()) for path in files}
    change(root)
    try:
        yield
    finally:
        for path, (content, stat) in kept.items():
            path.write_bytes(content)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("what", CHANGES)
def test_a_run_does_not_go_on_with_something_else(root: Path, what: str) -> None:
    change, name = CHANGES[what]
    config = reader.load(root / "config.yaml", [*OPTIONS, "output.if_exists=resume"])
    with changed(root, change):
        with pytest.raises(UserError, match=f"the trajectory was made from another .*{name} \\("):
            training.train(config, Communicator())
        with pytest.raises(UserError, match=f"the trajectory was made from another .*{name} \\("):
            loaded_run(root / "run")  # for evaluate and export
        opened = load.open_run(root / "run", None, Communicator())
        if "split" in name:
            load.audit(opened, Communicator())  # needs no data
        else:
            with pytest.raises(UserError, match=f"the trajectory was made from another {name} \\("):
                load.audit(opened, Communicator())
    check_header(loaded_run(root / "run").header(), opened.log.header)


def test_edited_settings_do_not_fit_their_digest(root: Path, tmp_path: Path) -> None:
    first, *steps = (root / "run" / trajectory.FILE).read_bytes().splitlines(keepends=True)
    content = json.loads(first)
    del content["check"]
    content["config"]["task"]["prompt"] = "{{ text }} . {{ answer }}"
    (tmp_path / trajectory.FILE).write_bytes(b"".join([trajectory.to_line(content, "")[0], *steps]))
    with pytest.raises(UserError, match="settings do not fit their digest"):
        load.open_run(tmp_path, None, Communicator())
