"""Shapes of instantiated models are kept, and what is kept is right or not used."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mezo_dist.planning import kept_shapes
from mezo_dist.planning.instantiated import shape_of_contents
from mezo_dist.planning.kept_shapes import keep_shape, kept_shape
from mezo_dist.planning.lookup import find_shape
from mezo_dist.planning.shapes import ModelShape

CONTENTS: dict[str, Any] = {"model_type": "mpt", "d_model": 32, "n_layers": 2, "vocab_size": 64, "n_heads": 2}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("MEZO_DIST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return shape_of_contents(CONTENTS, "mine")


def the_file(cache: Path) -> Path:
    (path,) = (cache / "shapes").iterdir()
    return path


def test_what_is_kept_comes_back(shape: ModelShape) -> None:
    assert kept_shape(CONTENTS, "mine") is None
    keep_shape(CONTENTS, shape)
    assert kept_shape(CONTENTS, "mine") == shape
    other = kept_shape(dict(reversed(CONTENTS.items())), "a copy")
    assert other is not None
    assert (other.name, other.units) == ("a copy", shape.units)


def test_it_is_kept_for_one_config_and_one_transformers(shape: ModelShape, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_shape(CONTENTS, shape)
    assert kept_shape({**CONTENTS, "vocab_size": 65}, "mine") is None
    monkeypatch.setattr(kept_shapes, "version", lambda _: "4.0")
    assert kept_shape(CONTENTS, "mine") is None


def test_a_damaged_file_is_ignored_and_rewritten(shape: ModelShape, cache: Path, tmp_path: Path) -> None:
    keep_shape(CONTENTS, shape)
    path = the_file(cache)
    good = path.read_text()
    (tmp_path / "config.json").write_text(json.dumps(CONTENTS))
    damages = [good[:-9], good.replace('"layers": 2', '"layers": 3'), "[]", "", "null", "[" * 100_000]
    for damaged in [*damages, '{"digest": "", "shape": {}}']:
        assert damaged != good
        path.write_text(damaged)
        assert kept_shape(CONTENTS, "mine") is None, damaged
    assert find_shape(str(tmp_path), []).units == shape.units
    assert path.read_text() == good


def test_a_cache_that_cannot_be_written_is_no_error(shape: ModelShape, cache: Path) -> None:
    cache.write_text("a file, where a folder should be")
    keep_shape(CONTENTS, shape)
    assert kept_shape(CONTENTS, "mine") is None


def test_the_second_answer_comes_without_torch(shape: ModelShape, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONTENTS))
    keep_shape(CONTENTS, shape)
    code = f"""
import sys
from mezo_dist.cli import main
assert main(["plan", {str(tmp_path)!r}, "--tokens", "32"]) == 0
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    assert "upper estimate" in done.stdout
    assert not done.stderr


def test_the_first_answer_says_why_it_takes_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONTENTS))
    find_shape(str(tmp_path), [])
    assert "'mpt'), which takes some seconds the first time" in capsys.readouterr().err
    find_shape(str(tmp_path), [])
    assert not capsys.readouterr().err


def test_nobody_is_asked_whether_to_run_code(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def ask(*words: object) -> str:
        asked.append(words)
        return "n"

    monkeypatch.setattr(builtins, "input", ask)
    contents = {"model_type": "clip_text_model", "hidden_size": 64, "auto_map": {"AutoModelForCausalLM": "a--b.C"}}
    assert shape_of_contents(contents, "mine").hidden == 64
    assert not asked
